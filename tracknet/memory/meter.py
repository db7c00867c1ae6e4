"""Bytes in use, as far as the device's allocator tells."""

from __future__ import annotations

import resource
import sys

import torch

GB = 1e9


def measure_memory(device: torch.device) -> dict[str, float]:
    """Return ``allocated_gb``, ``cached_gb`` and ``peak_gb`` (since the last reset).

    On CUDA by torch's allocator: allocated to tensors, held by the allocator, and the largest allocation. Elsewhere by the
    operating system: resident now, resident at most, for the whole process (``cached`` equals ``allocated``).
    """
    if device.type == "cuda":
        return {
            "allocated_gb": torch.cuda.memory_allocated(device) / GB,
            "cached_gb": torch.cuda.memory_reserved(device) / GB,
            "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    resident = _resident_bytes() or peak
    return {"allocated_gb": resident / GB, "cached_gb": resident / GB, "peak_gb": peak / GB}


def reset_peak(device: torch.device) -> None:
    """Start a new peak on CUDA; the operating system's cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc on this system
        return None

"""Bytes in use, as far as the device's allocator tells."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows has none
    resource = None

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
    if resource is None:
        return {"allocated_gb": float("nan"), "cached_gb": float("nan"), "peak_gb": float("nan")}
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators create while it is entered, exactly and on any device.

    It follows storages by weak references, so it also sees what Python objects hold on to. What existed before does not
    count, unless it was passed in.

    Attributes:
        live: bytes alive now.
        peak: largest ``live`` so far.
    """

    def __init__(self, existing: Sequence[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}
        self._ignored = {t.untyped_storage()._cdata for t in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and take note of the storages that it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in self._ignored or storage.filename is not None:  # a mapped file is not in memory
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.live -= size

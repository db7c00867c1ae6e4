"""Bytes in use: what the device's allocator tells, and what tensors take, counted one by one."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

resource: Any
try:
    import resource
except ImportError:  # Windows has none
    resource = None

GB = 1e9


def measure_memory(device: torch.device) -> dict[str, float]:
    """Return ``allocated_gb``, ``cached_gb`` and ``peak_gb`` (since the last reset).

    On CUDA by torch's allocator: allocated to tensors, held by the allocator, and the largest allocation. Elsewhere by
    the operating system: resident now, resident at most, for the whole process (``cached`` equals ``allocated``).
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


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of the GPU, or of the machine, its container's limit and the process's address
    space."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            stat.get("inactive_file", 0)
        )  # the cache of files gives way
        limits += [int(limit) - used] if limit != "max" else []
    except (OSError, ValueError):
        pass  # no such container
    if resource is not None:
        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits += (
            [address_space - psutil.Process().memory_info().vms] if address_space != resource.RLIM_INFINITY else []
        )
    return max(0, min(limits))


def count_flushes(device: torch.device) -> int:
    """How often CUDA's allocator has had to give its cache back before it could go on."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc on this system
        return None


def counts(tensor: Tensor, device_type: str | None) -> bool:
    """Whether a tensor takes memory of this type of device: none that is mapped from a file does, nor one without
    content."""
    there = tensor.device.type
    if there == "meta" or tensor.untyped_storage().filename is not None:
        return False
    return device_type is None or there == device_type


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators create while it is entered, exactly and on any device.

    It follows storages by weak references, so it also sees what Python objects hold on to. What existed before does not
    count, unless it was passed in. It makes every operator slower: for a step, not for a run.

    Attributes:
        live: bytes alive now.
        peak: largest ``live`` so far.
        device_type: whose tensors count; ``None`` = all, but those without content.
    """

    def __init__(self, existing: Iterable[Tensor] = (), device_type: str | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.device_type = device_type
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
        if key in self._seen or key in self._ignored or not counts(tensor, self.device_type):
            return
        size = storage.nbytes()
        self._born(key, size)
        self.live += size
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)
        if self.live > self.peak:
            self.peak = self.live
            self._peaked()

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.live -= size
            self._died(key, size)

    def _born(self, key: int, size: int) -> None: ...

    def _died(self, key: int, size: int) -> None: ...

    def _peaked(self) -> None: ...

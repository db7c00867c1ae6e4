"""Memory in use, as reported by the device's allocator or counted tensor by tensor."""

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

from tracknet.quantization.operators import OPERATORS

resource: Any
try:
    import resource
except ImportError:  # the module does not exist on Windows
    resource = None

GB = 1e9  # bytes


def measure_memory(device: torch.device) -> dict[str, float]:
    """Return ``allocated_gb``, ``cached_gb`` and ``peak_gb`` (the peak since the last reset), in GB.

    On CUDA the values come from torch's allocator: memory allocated to tensors, memory held by the allocator, and the
    largest allocation. Elsewhere they come from the operating system, for the whole process: the current and the
    largest resident memory (``cached_gb`` equals ``allocated_gb``), or NaN on a system without ``resource``.
    """
    if device.type == "cuda":
        return {
            "allocated_gb": torch.cuda.memory_allocated(device) / GB,
            "cached_gb": torch.cuda.memory_reserved(device) / GB,
            "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
        }
    if resource is None:
        return {"allocated_gb": float("nan"), "cached_gb": float("nan"), "peak_gb": float("nan")}
    # getrusage reports bytes on macOS and KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    resident = _resident_bytes() or peak
    return {"allocated_gb": resident / GB, "cached_gb": resident / GB, "peak_gb": peak / GB}


def reset_peak(device: torch.device) -> None:
    """Reset the peak on CUDA; the operating system's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def available_bytes(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated.

    For a GPU this is its free memory plus the unused part of the allocator's cache. Otherwise it is the smallest of the
    machine's available memory, the rest of the container's limit, and the rest of the process's address space.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [psutil.virtual_memory().available]
    # Limit of the container: these files exist where the process runs in a cgroup (version 2) with a memory controller.
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # The kernel drops the inactive page cache of files when memory is short, so it does not count as used.
        used = int((cgroup / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        limits += [int(limit) - used] if limit != "max" else []
    except (OSError, ValueError):
        pass  # no such container
    # Limit of the process (ulimit -v).
    if resource is not None:
        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits += (
            [address_space - psutil.Process().memory_info().vms] if address_space != resource.RLIM_INFINITY else []
        )
    return max(0, min(limits))


def synchronize(device: torch.device) -> None:
    """Wait until all kernels queued on a GPU have finished; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flushes(device: torch.device) -> int:
    """Return how often CUDA's allocator has had to free its cache to satisfy an allocation; 0 on other devices."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0


def _resident_bytes() -> int | None:
    """Return the resident memory of the process in bytes, or ``None`` on a system without ``/proc``."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def counts(tensor: Tensor, device_type: str | None) -> bool:
    """Return whether a tensor occupies memory of a type of device.

    A tensor mapped from a file and a tensor without content (on the meta device) occupy none.

    Args:
        tensor: tensor to check.
        device_type: type of device, such as ``cuda``; ``None`` for any.
    """
    tensor_device = tensor.device.type
    if tensor_device == "meta" or tensor.untyped_storage().filename is not None:
        return False
    return device_type is None or tensor_device == device_type


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all tensors that operators create in its context, exact and on any device.

    It tracks storages by weak references, so a storage counts for as long as anything keeps it alive, Python objects
    included. A storage that existed before is counted once an operator returns it (as a view, for example), unless it
    is in ``existing``. The mode slows every operator down: use it for a step, not for a run.

    Args:
        existing: tensors whose storages are never counted.
        device_type: type of device whose tensors are counted; ``None`` for all. Tensors without content never count.

    Attributes:
        live: bytes that are alive.
        peak: largest value of ``live`` so far, in bytes.
        device_type: type of device whose tensors are counted, or ``None``.
    """

    def __init__(self, existing: Iterable[Tensor] = (), device_type: str | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.device_type = device_type
        # Keys are addresses of C++ storages, which all views of a tensor share. An address may be reused after its
        # storage is freed; the finalizer has removed the key by then.
        self._tracked: dict[int, weakref.finalize] = {}
        self._ignored = {t.untyped_storage()._cdata for t in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and track the storages that it returns."""
        if func in OPERATORS:
            # A product that consists of operators: look inside, at the memory that it uses on the way.
            TorchDispatchMode.__enter__(self)
            try:
                return OPERATORS[func](*args, **(kwargs or {}))
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return out

    def _track(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed, unless it is tracked or ignored already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._tracked or key in self._ignored or not counts(tensor, self.device_type):
            return
        size = storage.nbytes()
        self._on_allocation(key, size)
        self.live += size
        # torch keeps the Python object of a storage alive for as long as the C++ storage, also when only autograd holds
        # that; so the finalizer runs when the memory is freed.
        self._tracked[key] = weakref.finalize(storage, self._release, key, size)
        if self.live > self.peak:
            self.peak = self.live
            self._on_peak()

    def _release(self, key: int, size: int) -> None:
        if self._tracked.pop(key, None) is not None:
            self.live -= size
            self._on_free(key, size)

    # Hooks for subclasses. `key` identifies a storage while it is alive, `size` is in bytes.

    def _on_allocation(self, key: int, size: int) -> None: ...

    def _on_free(self, key: int, size: int) -> None: ...

    def _on_peak(self) -> None: ...

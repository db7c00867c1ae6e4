"""Where activations wait for backward: on the device, in pinned host memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 18  # smaller ones cost more to move than they free


def offload_activations(model: nn.Module, device: torch.device, disk_dir: Path | None) -> AbstractContextManager:
    """Return a context in which forward puts what backward needs off the device.

    Weights stay where they are. On a CPU without ``disk_dir`` there is nothing to do: activations are in host memory.

    Args:
        model: its parameters and buffers are never moved.
        device: where the model runs.
        disk_dir: folder for memory-mapped files (removed from the folder as soon as they are mapped, so that a crash leaves
            nothing behind); ``None`` = pinned host memory.
    """
    if disk_dir is None and device.type == "cpu":
        return nullcontext()
    stays = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    write = _write_to_disk(disk_dir) if disk_dir is not None else _write_to_host

    def pack(tensor: Tensor) -> Tensor | tuple:
        size = tensor.numel() * tensor.element_size()
        if size < MIN_BYTES or tensor.untyped_storage().data_ptr() in stays or tensor.layout != torch.strided:
            return tensor
        return tensor.device, write(tensor.detach())

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        home, tensor = packed
        # A mapped tensor is copied too: what backward does in place must not reach the file.
        return tensor.clone() if home.type == "cpu" else tensor.to(home, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _write_to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)  # blocking: the device may reuse its memory at once


def _write_to_disk(folder: Path) -> Callable[[Tensor], Tensor]:
    folder.mkdir(parents=True, exist_ok=True)

    def write(tensor: Tensor) -> Tensor:
        handle, path = tempfile.mkstemp(dir=folder, prefix="activation-")
        try:
            os.ftruncate(handle, tensor.numel() * tensor.element_size())
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps the data; the name is not needed, and nothing is left after a crash
        return mapped.view(tensor.shape).copy_(tensor)

    return write

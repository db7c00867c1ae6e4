"""Tensors that lie in a file instead of in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tracknet.files import naming_the_file


def to_mmap(tensor: Tensor, folder: Path) -> Tensor:
    """Copy a tensor into a file of its size and return the tensor that is mapped from it, on the CPU, laid out alike.

    The name is removed at once: the mapping keeps the data, and nothing is left behind after a crash. The operating
    system writes its pages out where memory is short.

    Raises:
        OSError: the disk is full or forbidden; names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming_the_file(folder):
        handle, path = tempfile.mkstemp(dir=folder, prefix="tensor-")
        try:
            # Reserved now: a full disk is an error here, and not a signal in the middle of a computation.
            os.posix_fallocate(handle, 0, max(1, tensor.numel() * tensor.element_size()))
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(path)
    # Another order of dimensions in memory (channels last) would make kernels sum in another order.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        return mapped.view(tensor.shape).copy_(tensor)
    return mapped.view(ordered.shape).copy_(ordered).permute([order.index(d) for d in range(tensor.ndim)])


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file."""
    return tensor.untyped_storage().filename is not None

"""Tensors memory-mapped from files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tracknet.files import naming_the_file


def to_mmap(tensor: Tensor, folder: Path) -> Tensor:
    """Copy a tensor into a file and return the CPU tensor that is mapped from it.

    The file name is removed at once: the mapping keeps the data, and no file is left behind after a crash. The
    operating system writes the pages to the file when memory is short.

    Args:
        tensor: tensor to copy, on any device.
        folder: folder for the file; created if it does not exist.

    Returns:
        Tensor with the same content, dtype, shape and, unless ``tensor`` has gaps or repeated elements, strides.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the error names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming_the_file(folder):
        handle, path = tempfile.mkstemp(dir=folder, prefix="tensor-")
        try:
            # Reserve the space now, so that a full disk is an error here and not a signal (SIGBUS) in the middle of a
            # computation, at the first write to a page of a sparse file.
            os.posix_fallocate(handle, 0, max(1, tensor.numel() * tensor.element_size()))
            # A shared mapping writes to the file; a private one would hold every written page in memory.
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(path)
    # Keep the memory layout: with another order of dimensions (such as channels last) kernels would sum in another
    # order, and results would differ by rounding. So copy in the order of decreasing strides, and permute back.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():  # gaps or repeated elements
        return mapped.view(tensor.shape).copy_(tensor)
    return mapped.view(ordered.shape).copy_(ordered).permute([order.index(d) for d in range(tensor.ndim)])


def is_mapped(tensor: Tensor) -> bool:
    """Return whether the storage of a tensor is mapped from a file."""
    return tensor.untyped_storage().filename is not None

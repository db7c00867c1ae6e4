"""Devices on which the Triton kernels of this package run."""

from __future__ import annotations

import functools
import importlib.util

import torch

CAPABILITY = (8, 0)  # first CUDA capability (Ampere) that the kernels are made for


@functools.cache
def supports_triton(device: torch.device) -> bool:
    """Return whether the kernels run on a device."""
    has_triton = importlib.util.find_spec("triton") is not None  # it is not made for every system
    return has_triton and device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY

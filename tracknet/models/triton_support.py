"""Devices on which the Triton kernels of this package run."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from tracknet.errors import first_line

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # first CUDA capability (Ampere) that the kernels are made for


@functools.cache
def supports_triton(device: torch.device) -> bool:
    """Return whether the kernels run on a device, with a warning if only a compiler is missing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    if importlib.util.find_spec("triton") is None:  # it is not made for every system
        return False
    try:
        # Triton builds a module with the C compiler of the system, once.
        from triton.runtime import driver

        driver.active.utils  # noqa: B018
    except Exception as error:
        logger.warning(
            f"Triton cannot build its kernels ({first_line(error)}): steps take longer on this GPU. Install a C"
            " compiler (gcc) and the headers of Python."
        )
        return False
    return True

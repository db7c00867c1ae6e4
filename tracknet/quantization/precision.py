"""Resolution of a precision setting to the dtype in which a device computes."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from tracknet.errors import UserError

logger = logging.getLogger(__name__)

Precision = Literal["fp16", "bf16", "fp32"]
Int8Kernel = Literal["auto", "triton", "bitsandbytes"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def cpu_has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; others emulate bf16, several times slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_dtype(precision: Precision, device: torch.device, setting: str) -> torch.dtype:
    """Resolve a precision for a device, with a warning if a CPU computes in another dtype.

    Args:
        precision: configured precision.
        device: device on which the model runs.
        setting: full name of the setting, for messages.

    Returns:
        Dtype of matrix products.

    Raises:
        UserError: if a GPU does not support bf16. On a GPU another dtype would change the behavior of training.
    """
    dtype = DTYPES[precision]
    if device.type == "cuda":
        if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"{setting}=bf16 and training.device=cuda: {torch.cuda.get_device_name(device)} has no bf16 (from "
                f"Ampere, 2020, on): set {setting}=fp16."
            )
        return dtype
    # Tensors on the meta device have no content, so any dtype can be kept.
    if device.type == "meta" or dtype is torch.float32 or (dtype is torch.bfloat16 and cpu_has_bf16()):
        return dtype
    # A CPU computes in a dtype for which it has instructions.
    if cpu_has_bf16():
        logger.warning(f"{setting}={precision}: this CPU computes in bf16 instead (it has no fast fp16 instructions).")
        return torch.bfloat16
    logger.warning(f"{setting}={precision}: this CPU computes in fp32 (it has no {precision} instructions).")
    return torch.float32

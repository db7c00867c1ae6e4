"""Which dtype a device really multiplies in."""

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
    """Whether this CPU multiplies bf16 itself; others emulate it, several times slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_dtype(precision: Precision, device: torch.device, setting: str) -> torch.dtype:
    """Choose the dtype for a device; warn where a CPU computes in another than was asked for.

    Args:
        precision: what the configuration asks for.
        device: where the model runs.
        setting: name of the key, for messages.

    Returns:
        The dtype that matrix products are computed in.

    Raises:
        UserError: a GPU that lacks it; there, another dtype would change what training is like.
    """
    wanted = DTYPES[precision]
    if device.type == "cuda":
        if wanted is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"{setting}=bf16 and training.device=cuda: {torch.cuda.get_device_name(device)} has no bf16 (from "
                f"Ampere, 2020, on); set {setting}=fp16."
            )
        return wanted
    # Tensors on meta have no content, so nothing is computed in any dtype.
    if device.type == "meta" or wanted is torch.float32 or (wanted is torch.bfloat16 and cpu_has_bf16()):
        return wanted
    if cpu_has_bf16():
        logger.warning(f"{setting}={precision}: this CPU computes in bf16 instead (it has no fast fp16).")
        return torch.bfloat16
    logger.warning(f"{setting}={precision}: this CPU computes in fp32 (it has no native {precision}).")
    return torch.float32

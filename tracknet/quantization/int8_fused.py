"""The int8 product on a GPU as two operators of our own, whose shapes are known without a GPU (for plans and for ``torch.compile``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of a tile of rows and depth; the kernels' own are the same numbers, and need Triton to be read.
TILE_ROWS, TILE_DEPTH = 128, 64


@torch.library.custom_op("tracknet::quantize", mutates_args=())
def quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each row of ``[n, k]`` by the largest magnitude below the threshold (0 = by the largest).

    Returns:
        int8 codes ``[n, k]``, 0 where an outlier is; that magnitude, fp32 ``[n]``; int32 ``[n / 128, k / 64]``, 1 for tiles with outliers.
    """
    from tracknet.quantization import int8_kernels

    codes, scale, marks = _quantized(x, threshold)
    int8_kernels.quantize(x, threshold, codes, scale, marks.zero_())
    return codes, scale, marks


@quantize.register_fake
def _quantized(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    tiles = (math.ceil(x.shape[0] / TILE_ROWS), math.ceil(x.shape[1] / TILE_DEPTH)) if threshold > 0 else (1, 1)
    return (torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32),
            x.new_empty(tiles, dtype=torch.int32))  # fmt: skip


@torch.library.custom_op("tracknet::multiply_int8", mutates_args=())
def multiply_quantized(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    marks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply quantised rows by the quantised weight ``[m, k]``, and the outliers of ``x`` in TF32; ``[n, m]`` of ``dtype``."""
    from tracknet.quantization import int8_kernels

    out = _multiplied(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype)
    int8_kernels.multiply(x, codes, scale, marks, weight, weight_scale, bias, threshold, out)
    return out


@multiply_quantized.register_fake
def _multiplied(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=dtype)


def multiply(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float, dtype: torch.dtype
) -> Tensor:
    """Multiply ``[n, k]`` by the quantised weight, values of at least the threshold in TF32.

    Args:
        rows: what is multiplied, floating point, contiguous.
        weight: int8 ``[m, k]``.
        weight_scale: largest magnitude of each of the weight's rows, fp32 ``[m]``.
        bias: ``[m]``, added in fp32.
        threshold: see ``int8._multiply``; 0 = everything in int8.
        dtype: of the result.
    """
    return multiply_quantized(rows, *quantize(rows, threshold), weight, weight_scale, bias, threshold, dtype)

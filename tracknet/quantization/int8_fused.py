"""The int8 product on a GPU by two Triton kernels, and as operators whose shapes are known without one (for plans and
``torch.compile``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tracknet.quantization.int8_tiles import TILE_DEPTH, TILE_ROWS


def quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row of ``[n, k]`` by the largest magnitude below the threshold (0 = by the largest).

    Returns:
        int8 codes ``[n, k]``, 0 where an outlier is; that magnitude, fp32 ``[n]``; int32 ``[n / 128, k / 64]``, 1 for
        tiles with outliers.
    """
    from tracknet.quantization import int8_kernels

    x = x.contiguous()
    codes, scale, marks = _quantized(x, threshold)
    int8_kernels.quantize(x, threshold, codes, scale, marks.zero_() if threshold > 0 else marks)
    return codes, scale, marks


def _quantized(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what ``quantize`` returns. Numbers of rows may be symbols of the compiler."""
    tiles = (-(-x.shape[0] // TILE_ROWS), -(-x.shape[1] // TILE_DEPTH)) if threshold > 0 else (1, 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(tiles, dtype=torch.int32),
    )


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
    """Multiply quantized rows by the quantized weight ``[m, k]``, and the outliers of ``x`` in floating point; ``[n,
    m]`` of ``dtype``."""
    from tracknet.quantization import int8_kernels

    out = _multiplied(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype)
    int8_kernels.multiply(x.contiguous(), codes, scale, marks, weight.contiguous(), weight_scale, bias, threshold, out)
    return out


def _multiplied(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype) -> Tensor:
    """Allocate what ``multiply_quantized`` returns."""
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


quantize_op = torch.library.custom_op("tracknet::quantize", quantize, mutates_args=())
quantize_op.register_fake(_quantized)
multiply_op = torch.library.custom_op("tracknet::multiply_int8", multiply_quantized, mutates_args=())
multiply_op.register_fake(_multiplied)


def multiply(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float, dtype: torch.dtype
) -> Tensor:
    """Multiply ``[n, k]`` by the quantized weight, values of at least the threshold in floating point.

    Args:
        rows: what is multiplied, floating point.
        weight: int8 ``[m, k]``.
        weight_scale: largest magnitude of each of the weight's rows, fp32 ``[m]``.
        bias: ``[m]``, added in fp32.
        threshold: see ``int8._multiply``; 0 = everything in int8.
        dtype: of the result.
    """
    # Calling an operator takes 15 us of the host, a thousand times a step: only where a graph or a plan needs one.
    traced = torch.compiler.is_compiling() or isinstance(rows, FakeTensor)
    first, second = (quantize_op, multiply_op) if traced else (quantize, multiply_quantized)
    codes, scale, marks = first(rows, threshold)
    return second(rows, codes, scale, marks, weight, weight_scale, bias, threshold, dtype)

"""Int8 product on a GPU with two Triton kernels.

Both are also registered as operators with known shapes, for memory planning without a GPU and for ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tracknet.quantization.int8_tiles import TILE_DEPTH, TILE_ROWS


def quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row by its largest magnitude below the threshold.

    Args:
        x: floating point ``[n, k]``.
        threshold: smallest magnitude of an outlier; 0 for no outliers.

    Returns:
        int8 codes ``[n, k]``, 0 for outliers; the magnitudes, fp32 ``[n]``; and marks, int32 ``[ceil(n / 128),
        ceil(k / 64)]``, 1 for tiles with outliers (``[1, 1]`` and undefined for threshold 0).
    """
    # Imported here, because Triton is not installed on every machine that imports this module.
    from tracknet.quantization import int8_kernels

    x = x.contiguous()
    codes, scale, marks = _allocate_quantized(x, threshold)
    # The kernel only sets marks, so they start as zeros.
    int8_kernels.quantize(x, threshold, codes, scale, marks.zero_() if threshold > 0 else marks)
    return codes, scale, marks


def _allocate_quantized(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the result of ``quantize``. The number of rows may be a symbol of ``torch.compile``."""
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
    """Multiply quantized rows by a quantized weight, and outliers in floating point.

    Args:
        x: floating point ``[n, k]``, from which outliers are read.
        codes: codes of ``x`` from ``quantize``.
        scale: magnitudes from ``quantize``.
        marks: marks from ``quantize``.
        weight: int8 weight ``[m, k]``.
        weight_scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        bias: bias ``[m]``, or ``None``; added in fp32.
        threshold: threshold that was passed to ``quantize``.
        dtype: dtype of the result.

    Returns:
        ``[n, m]`` of ``dtype``.
    """
    from tracknet.quantization import int8_kernels

    out = _allocate_product(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype)
    int8_kernels.multiply(x.contiguous(), codes, scale, marks, weight.contiguous(), weight_scale, bias, threshold, out)
    return out


def _allocate_product(x, codes, scale, marks, weight, weight_scale, bias, threshold, dtype) -> Tensor:
    """Allocate the result of ``multiply_quantized``, whose arguments it takes."""
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


# As custom operators the kernels are opaque to torch.compile and to fake tensors, which call the functions that only
# allocate the results.
quantize_op = torch.library.custom_op("tracknet::quantize", quantize, mutates_args=())
quantize_op.register_fake(_allocate_quantized)
multiply_op = torch.library.custom_op("tracknet::multiply_int8", multiply_quantized, mutates_args=())
multiply_op.register_fake(_allocate_product)


def multiply(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float, dtype: torch.dtype
) -> Tensor:
    """Multiply by a quantized weight in int8, except values of at least the threshold.

    Args:
        rows: floating point ``[n, k]``.
        weight: int8 weight ``[m, k]``.
        weight_scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        bias: bias ``[m]``, or ``None``; added in fp32.
        threshold: smallest magnitude of an outlier, see ``int8._multiply``; 0 to multiply everything in int8.
        dtype: dtype of the result.

    Returns:
        ``[n, m]`` of ``dtype``.
    """
    # A call of a custom operator takes 15 us on the host, a thousand times per step, so operators are used only where
    # tracing requires them.
    traced = torch.compiler.is_compiling() or isinstance(rows, FakeTensor)
    quantize_fn, multiply_fn = (quantize_op, multiply_op) if traced else (quantize, multiply_quantized)
    codes, scale, marks = quantize_fn(rows, threshold)
    return multiply_fn(rows, codes, scale, marks, weight, weight_scale, bias, threshold, dtype)

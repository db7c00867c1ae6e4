"""Gradients of an int8 product, with both operands in int8.

The gradient of the input is a product with the codes that forward used: the scales of the weight's rows are folded into
the gradient, whose rows are then quantized by their largest magnitude. That of the weight is a sum over rows, so its
operands are quantized by column, over a limited number of rows at a time. ``benchmarks/int8_backward.py`` compares both
with fp32 on real activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that share a scale per column in a weight's gradient. A few tokens have most of the gradient: with 4096 rows,
# real activations lose 30 % of it to rounding, with 128 at most 5 %. (int32 sums overflow from 133,144 rows on.)
ROWS = 128


def input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the input of a product with a quantized weight, multiplied in int8.

    Args:
        grad: gradient of the output, floating point ``[n, m]``.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.

    Returns:
        ``[n, k]`` in the dtype of ``grad``.
    """
    # Not with the quantization kernel of bitsandbytes, which converts to fp16, where small gradients vanish.
    values, largest = _quantize(grad * (scale / 127))
    # On a GPU the int8 product requires the second operand by columns; the codes are a copy of one byte per weight.
    product = torch.ops.bitsandbytes.int8_linear_matmul(values, codes.t().contiguous())
    return (product * (largest / 127)).to(grad.dtype)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Return ``grad.T @ rows``, multiplied in int8, in fp32.

    Args:
        grad: gradient of the output, floating point ``[n, m]``.
        rows: input, floating point ``[n, k]``.
    """
    total = torch.zeros(grad.shape[1], rows.shape[1], device=grad.device)
    for part, part_rows in zip(grad.split(ROWS), rows.split(ROWS)):
        a, a_largest = _quantize(part.t())
        b, b_largest = _quantize(part_rows.t())
        product = torch.ops.bitsandbytes.int8_linear_matmul(a, b)
        total.addcmul_(product * (a_largest / 127), b_largest.t() / 127)
    return total


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row by its largest magnitude; return int8 codes ``[n, k]`` and the magnitudes, fp32 ``[n, 1]``.

    A magnitude that is not finite makes the whole result not finite, which the optimizer's step detects.
    """
    values = x.float()
    largest = values.abs().amax(dim=1, keepdim=True)
    codes = (values * (127 / largest.clamp_min(1e-30))).round_().to(torch.int8).contiguous()
    return codes, largest

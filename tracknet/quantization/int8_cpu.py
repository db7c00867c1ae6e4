"""Int8 product and its gradient on a CPU, in parts of a few rows whose intermediate results stay in the core's cache.

The integer product itself (VNNI) takes half the time of one in bf16. The passes over memory before and after it are
what costs. Over parts of 512 rows that reuse the same scratch memory, they take a third of the time that they take over
whole matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512  # rows that are processed at once
WIDTH = 64  # step of the number of columns of an outlier product


def multiply(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, out: Tensor) -> None:
    """Multiply by a quantized weight in int8, except values of at least the threshold, which are multiplied exactly.

    Args:
        rows: floating point ``[n, k]``.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        bias: bias ``[m]``, or ``None``.
        threshold: smallest magnitude of an outlier, see ``int8._multiply``; 0 to multiply everything in int8.
        out: result ``[n, m]`` of any floating-point dtype, written in place.
    """
    # Scratch memory that all parts reuse: fp32 values and magnitudes, their codes, int32 products, fp32 results.
    (n, k), m = rows.shape, len(codes)
    scratch = torch.empty(2, min(n, ROWS), k)
    integers = torch.empty(min(n, ROWS), k, dtype=torch.int8)
    products = torch.empty(min(n, ROWS), m, dtype=torch.int32)
    results = torch.empty(min(n, ROWS), m)
    weight, step = codes.t(), scale / 127
    outlier_product: _OutlierProduct | None = None  # made when the first outlier appears
    for part, part_out in zip(rows.split(ROWS), out.split(ROWS)):
        r = len(part)
        values, magnitudes, result = scratch[0, :r], scratch[1, :r], results[:r]
        # Convert to fp32, find the largest magnitude of each row, and move outliers out of the values.
        values.copy_(part)
        largest = torch.abs(values, out=magnitudes).amax(dim=1, keepdim=True)
        has_outliers = threshold > 0 and bool(largest.max() >= threshold)
        if has_outliers:
            if outlier_product is None:
                outlier_product = _OutlierProduct(rows, codes, threshold, out.dtype)
            outlier_product.take(values)
            largest = torch.abs(values, out=magnitudes).amax(dim=1, keepdim=True)
        # Quantize by the largest remaining magnitude and multiply. A row of zeros must not divide by zero.
        values *= 127 / largest.clamp_min_(1e-30)
        integers[:r].copy_(values.round_())
        torch._int_mm(integers[:r], weight, out=products[:r])
        # Scale by the magnitudes of the rows, add the outliers, and scale by the rows of the weight.
        result.copy_(products[:r]).mul_(largest.div_(127))
        if has_outliers and outlier_product is not None:
            outlier_product.add_to(result)
        # Add the bias in fp32 and round once, to the dtype of the output.
        part_out.copy_(result.mul_(step) if bias is None else torch.addcmul(bias, result, step, out=result))


class _OutlierProduct:
    """Product of outliers, which covers only the columns that contain some.

    Args:
        rows: all rows of the input.
        codes: int8 weight ``[m, k]``.
        threshold: smallest magnitude of an outlier.
        dtype: dtype of the output.
    """

    def __init__(self, rows: Tensor, codes: Tensor, threshold: float, dtype: torch.dtype):
        # Codes, and outliers in the dtype of the input, are exact in bf16, whose products add up in fp32 and are
        # several times as fast as those of fp32 operands. Only their sum is rounded to bf16, like the output.
        self._dtype = torch.bfloat16 if rows.dtype == dtype == torch.bfloat16 else torch.float32
        is_column = (rows.amax(dim=0) >= threshold) | (rows.amin(dim=0) <= -threshold)
        # Rounded up to a few widths, because oneDNN keeps a kernel for every shape that it has multiplied in bf16, and
        # the number of columns differs from call to call. The columns that fill up contain no outliers, only zeros.
        width = min(len(is_column), -(-int(is_column.sum()) // WIDTH) * WIDTH)
        self._columns = is_column.to(torch.uint8).sort(descending=True, stable=True).indices[:width]
        self._weight = codes.index_select(1, self._columns).to(self._dtype).t()
        self._products = torch.empty(min(len(rows), ROWS), len(codes), dtype=self._dtype)
        self._results = torch.empty(min(len(rows), ROWS), len(codes))
        # hardshrink keeps magnitudes strictly above its argument. The next smaller fp32 number makes it keep the
        # threshold itself too.
        self._below = torch.nextafter(torch.tensor(threshold), torch.tensor(-math.inf)).item()

    def take(self, values: Tensor) -> None:
        """Move the outliers out of fp32 ``values``, where they become 0, and multiply them."""
        outliers = F.hardshrink(values, self._below)  # 0 everywhere else
        values -= outliers
        outliers = outliers.index_select(1, self._columns).to(self._dtype)
        torch.mm(outliers, self._weight, out=self._products[: len(values)])

    def add_to(self, result: Tensor) -> None:
        """Add the product of the last ``take`` to fp32 ``result``, before the scales of the weight."""
        result += self._results[: len(result)].copy_(self._products[: len(result)])


def multiply_gradient(grad: Tensor, codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Compute the gradient of the input of a product with a quantized weight in int8.

    Args:
        grad: gradient of the output, floating point ``[n, m]``.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        out: result ``[n, k]`` of any floating-point dtype, written in place.
    """
    # Scratch memory that all parts reuse: fp32 values and magnitudes, their codes, int32 products, fp32 results.
    (n, m), k = grad.shape, codes.shape[1]
    scratch = torch.empty(2, min(n, ROWS), m)
    integers = torch.empty(min(n, ROWS), m, dtype=torch.int8)
    products = torch.empty(min(n, ROWS), k, dtype=torch.int32)
    results = torch.empty(min(n, ROWS), k)
    step = scale / 127
    for part, part_out in zip(grad.split(ROWS), out.split(ROWS)):
        r = len(part)
        values, magnitudes = scratch[0, :r], scratch[1, :r]
        # Fold the scales of the weight's rows into the gradient, then quantize each of its rows.
        torch.mul(part, step, out=values)
        largest = torch.abs(values, out=magnitudes).amax(dim=1, keepdim=True)
        values *= 127 / largest.clamp_min_(1e-30)
        integers[:r].copy_(values.round_())
        torch._int_mm(integers[:r], codes, out=products[:r])
        part_out.copy_(results[:r].copy_(products[:r]).mul_(largest.div_(127)))

"""Triton kernels of the fused int8 product: one quantizes rows, the other multiplies, scales and adds the bias.

The host needs no intermediate result. The first kernel marks the tiles that contain outliers, and the second reads one
mark per tile, which is all that a tile without outliers costs. The host therefore never waits for the GPU, and no int32
matrix is written to memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tracknet.quantization.int8_tiles import TILE_DEPTH as DEPTH
from tracknet.quantization.int8_tiles import TILE_ROWS as ROWS


@triton.jit
def _quantize(
    x,
    codes,
    scale,
    marks,
    width,
    threshold,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
):
    """Quantize one row of ``x``, with 0 for outliers, and mark the tiles that contain outliers.

    One program processes one row.

    Args:
        x: input ``[height, width]``, contiguous.
        codes: int8 result ``[height, width]``.
        scale: fp32 result ``[height]``.
        marks: int32 result ``[ceil(height / TILE_ROWS), ceil(width / TILE_DEPTH)]``, initialized with zeros.
        width: values per row.
        threshold: smallest magnitude of an outlier.
        TILE_ROWS: rows per tile of ``marks``.
        TILE_DEPTH: values of a row per tile.
        TILES: tiles per row, rounded up to a power of 2.
        HAS_OUTLIERS: whether the threshold is above 0.
    """
    # Load the whole row as [TILES, TILE_DEPTH]. Offsets are 64-bit, because a matrix may have more than 2**31 values.
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)[:, None]
    offsets = tile * TILE_DEPTH + tl.arange(0, TILE_DEPTH)[None, :]
    in_row = offsets < width
    values = tl.load(x + row * width + offsets, mask=in_row, other=0.0).to(tl.float32)
    if HAS_OUTLIERS:
        is_outlier = tl.abs(values) >= threshold
        values = tl.where(is_outlier, 0.0, values)
        any_outlier = tl.max(is_outlier.to(tl.int32), axis=1)[:, None]
        num_tiles = tl.cdiv(width, TILE_DEPTH)
        # Atomic, because the programs of all rows of a tile write to the same mark.
        tl.atomic_or(
            marks + (row // TILE_ROWS) * num_tiles + tile, any_outlier, mask=(any_outlier > 0) & (tile < num_tiles)
        )
    # Quantize by the largest remaining magnitude. A row of zeros must not divide by zero.
    largest = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    exact = values * (127.0 / tl.maximum(largest, 1e-30))
    # Near 1.5 * 2**23 the spacing of fp32 is 1, so the addition rounds to the nearest integer, ties to even.
    rounded = (exact + 12582912.0) - 12582912.0
    # A maximum ignores NaN, and a code cannot be NaN. The scale of the row becomes NaN instead, and thus the product.
    num_nan = tl.sum(tl.sum((values != values).to(tl.int32), axis=1), axis=0)
    largest = tl.where(num_nan > 0, float("nan"), largest)
    tl.store(codes + row * width + offsets, rounded.to(tl.int8), mask=in_row)
    tl.store(scale + row, largest)


@triton.jit
def _multiply(
    x,
    codes,
    scale,
    marks,
    weight,
    weight_scale,
    bias,
    out,
    height,
    columns,
    width,
    threshold,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of ``x @ weight.T + bias``.

    Args:
        x: input ``[height, width]``, from which outliers are read.
        codes: int8 codes of the input, 0 for outliers.
        scale: largest magnitude of each row of the input, fp32 ``[height]``.
        marks: int32 ``[ceil(height / TILE_ROWS), ceil(width / TILE_DEPTH)]``, nonzero for tiles with outliers.
        weight: int8 weight ``[columns, width]``.
        weight_scale: largest magnitude of each row of the weight, fp32 ``[columns]``.
        bias: bias ``[columns]``.
        out: result ``[height, columns]``.
        height: rows of the input.
        columns: rows of the weight, and columns of the result.
        width: values per row of input and weight.
        threshold: smallest magnitude of an outlier.
        TILE_ROWS: rows of the result per program.
        TILE_COLUMNS: columns of the result per program.
        TILE_DEPTH: values of a row that are multiplied at once.
        GROUP: tile rows whose programs run together.
        HAS_OUTLIERS: whether the threshold is above 0.
        HAS_BIAS: whether there is a bias.
        PRECISION: precision of the products of outliers, see ``layout_of``.
    """
    # Order the programs in groups of GROUP tile rows, column by column. Programs that run around the same time then
    # share rows or columns, which are still in the second-level cache.
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(height, TILE_ROWS), tl.cdiv(columns, TILE_COLUMNS)
    group = program // (GROUP * column_tiles)
    rows_in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
    index = program % (GROUP * column_tiles)
    tile_row, tile_column = group * GROUP + index % rows_in_group, index // rows_in_group

    # Product of the codes on int8 matrix units, summed exactly in int32. Offsets are 64-bit, as in `_quantize`.
    i = (tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    j = (tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)
    depth = tl.arange(0, TILE_DEPTH)
    in_rows, in_columns = i < height, j < columns
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.int32)
    for tile in range(tl.cdiv(width, TILE_DEPTH)):
        k = tile * TILE_DEPTH + depth
        a = tl.load(codes + i[:, None] * width + k[None, :], mask=in_rows[:, None] & (k < width)[None, :], other=0)
        b = tl.load(weight + j[None, :] * width + k[:, None], mask=in_columns[None, :] & (k < width)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    # Scale by the input's rows. The scale of the weight follows after the outliers, which it applies to as well.
    row_scale = tl.load(scale + i, mask=in_rows, other=0.0)
    result = sums.to(tl.float32) * (row_scale / 127.0)[:, None]
    if HAS_OUTLIERS:
        # Add the products of outliers, in floating point, for marked tiles only.
        num_tiles = tl.cdiv(width, TILE_DEPTH)
        for tile in range(num_tiles):
            if tl.load(marks + tile_row * num_tiles + tile) != 0:
                k = tile * TILE_DEPTH + depth
                v = tl.load(
                    x + i[:, None] * width + k[None, :], mask=in_rows[:, None] & (k < width)[None, :], other=0.0
                )
                # In the dtype of the input: 16 bits hold codes exactly.
                v = tl.where(tl.abs(v.to(tl.float32)) >= threshold, v, 0.0)
                b = tl.load(
                    weight + j[None, :] * width + k[:, None], mask=in_columns[None, :] & (k < width)[:, None], other=0
                )
                result = tl.dot(v, b.to(v.dtype), result, input_precision=PRECISION)
    # Scale by the weight's rows, add the bias, and round once, to the dtype of the result.
    result = result * (tl.load(weight_scale + j, mask=in_columns, other=0.0) / 127.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + j, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + i[:, None] * columns + j[None, :],
        result.to(out.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def quantize(x: Tensor, threshold: float, codes: Tensor, scale: Tensor, marks: Tensor) -> None:
    """Write the codes, scales and marks of rows; see ``int8_fused.quantize``.

    Args:
        x: contiguous input ``[n, k]``.
        threshold: smallest magnitude of an outlier; 0 for none.
        codes: int8 ``[n, k]``, written.
        scale: fp32 ``[n]``, written.
        marks: int32 zeros ``[ceil(n / 128), ceil(k / 64)]``, written if the threshold is above 0.
    """
    height, width = x.shape
    # Use one warp for a narrow row, because the results of several would have to be combined.
    warps = 1 if width <= 512 else 2 if width <= 1024 else 4 if width <= 4096 else 8
    tiles = triton.next_power_of_2(triton.cdiv(width, DEPTH))
    # Triton launches on the current device, which may be another one than that of the tensors.
    with torch.cuda.device_of(x):
        _quantize[(height,)](
            x,
            codes,
            scale,
            marks,
            width,
            threshold,
            TILE_ROWS=ROWS,
            TILE_DEPTH=DEPTH,
            TILES=tiles,
            HAS_OUTLIERS=threshold > 0,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def layout_of(dtype: torch.dtype, has_outliers: bool) -> dict:
    """Return the compile-time constants of the product.

    Args:
        dtype: dtype of the input.
        has_outliers: whether the threshold is above 0.
    """
    # 16-bit values are multiplied as they are. An fp32 value requires three TF32 parts, for which a wide tile leaves
    # too few registers.
    is_fp32 = dtype == torch.float32
    return {
        "TILE_ROWS": ROWS,
        "TILE_COLUMNS": 32 if is_fp32 and has_outliers else 128,
        "TILE_DEPTH": DEPTH,
        "GROUP": 8,  # tile rows
        "HAS_OUTLIERS": has_outliers,
        "PRECISION": "tf32x3",  # of fp32
    }


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    marks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    out: Tensor,
) -> None:
    """Write the product; see ``int8_fused.multiply_quantized``, whose contiguous arguments it takes.

    Args:
        x: input ``[n, k]``.
        codes: codes of the input from ``quantize``.
        scale: magnitudes from ``quantize``.
        marks: marks from ``quantize``.
        weight: int8 weight ``[m, k]``.
        weight_scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        bias: bias ``[m]``, or ``None``.
        threshold: threshold that was passed to ``quantize``.
        out: result ``[n, m]``, written.
    """
    (height, width), columns = x.shape, len(weight)
    layout = layout_of(x.dtype, threshold > 0)
    with torch.cuda.device_of(x):
        _multiply[(triton.cdiv(height, ROWS) * triton.cdiv(columns, layout["TILE_COLUMNS"]),)](
            x,
            codes,
            scale,
            marks,
            weight,
            weight_scale,
            bias,
            out,
            height,
            columns,
            width,
            threshold,
            **layout,
            HAS_BIAS=bias is not None,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=True,
        )

"""Triton kernels of the fused int8 product: rows are quantized by one, multiplied and scaled by another.

Nothing between them depends on what the host knows: which values are outliers is written down per tile, and a tile
without any costs one load. So there is nothing to wait for, and no int32 matrix in memory.
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
    """Quantize one row of ``x``, outliers as 0, and mark the tiles that have some."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)[:, None]
    at = tile * TILE_DEPTH + tl.arange(0, TILE_DEPTH)[None, :]
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_OUTLIERS:
        large = tl.abs(values) >= threshold
        values = tl.where(large, 0.0, values)
        any_large = tl.max(large.to(tl.int32), axis=1)[:, None]
        used = tl.cdiv(width, TILE_DEPTH)
        tl.atomic_or(marks + (row // TILE_ROWS) * used + tile, any_large, mask=(any_large > 0) & (tile < used))
    largest = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    exact = values * (127.0 / tl.maximum(largest, 1e-30))
    rounded = (exact + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest whole number, ties to even
    # A maximum passes over NaN, and a code cannot be one: the row's scale says it, so that the product is not a number
    # either.
    unknown = tl.sum(tl.sum((values != values).to(tl.int32), axis=1), axis=0)
    largest = tl.where(unknown > 0, float("nan"), largest)
    tl.store(codes + row * width + at, rounded.to(tl.int8), mask=inside)
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
    """Compute one tile of ``x @ weight.T + bias``."""
    # Tiles that are computed around the same time share rows or columns, which then are in the second-level cache.
    program, down, across = tl.program_id(0), tl.cdiv(height, TILE_ROWS), tl.cdiv(columns, TILE_COLUMNS)
    group = program // (GROUP * across)
    rows_in_group = tl.minimum(down - group * GROUP, GROUP)
    within = program % (GROUP * across)
    tile_row, tile_column = group * GROUP + within % rows_in_group, within // rows_in_group

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
    row_scale = tl.load(scale + i, mask=in_rows, other=0.0)
    result = sums.to(tl.float32) * (row_scale / 127.0)[:, None]
    if HAS_OUTLIERS:
        used = tl.cdiv(width, TILE_DEPTH)
        for tile in range(used):
            if tl.load(marks + tile_row * used + tile) != 0:
                k = tile * TILE_DEPTH + depth
                v = tl.load(
                    x + i[:, None] * width + k[None, :], mask=in_rows[:, None] & (k < width)[None, :], other=0.0
                )
                v = v.to(tl.float32)
                v = tl.where(tl.abs(v) >= threshold, v, 0.0)
                b = tl.load(
                    weight + j[None, :] * width + k[:, None], mask=in_columns[None, :] & (k < width)[:, None], other=0
                )
                result = tl.dot(v, b.to(tl.float32), result, input_precision=PRECISION)
    result = result * (tl.load(weight_scale + j, mask=in_columns, other=0.0) / 127.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + j, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + i[:, None] * columns + j[None, :],
        result.to(out.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def quantize(x: Tensor, threshold: float, codes: Tensor, scale: Tensor, marks: Tensor) -> None:
    """Fill the codes, scales and marks of rows; see ``int8_fused.quantize``."""
    height, width = x.shape
    # One warp for a narrow row: what several find would have to be brought together.
    warps = 1 if width <= 512 else 2 if width <= 1024 else 4 if width <= 4096 else 8
    tiles = triton.next_power_of_2(triton.cdiv(width, DEPTH))
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
    """Return the constants by which the product of rows of this type is compiled."""
    # TF32 holds codes and 16-bit values exactly; of fp32 it takes three parts, which find no room in registers beside a
    # wide tile.
    is_fp32 = dtype == torch.float32
    return {
        "TILE_ROWS": ROWS,
        "TILE_COLUMNS": 32 if is_fp32 and has_outliers else 128,
        "TILE_DEPTH": DEPTH,
        "GROUP": 8,
        "HAS_OUTLIERS": has_outliers,
        "PRECISION": "tf32x3" if is_fp32 else "tf32",
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
    """Fill the product; see ``int8_fused.multiply``."""
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

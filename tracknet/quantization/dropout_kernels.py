"""Triton kernels of a LoRA adapter's first half, ``A dropout(x)``, and of its gradients.

Each kernel derives the mask from counters (seed of the step, window, layer, position of the value) as it reads the
input, so no mask is written to memory. The seed and the window are read from a tensor, so that a CUDA graph is replayed
with those of its step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, DEPTH = 64, 64  # rows, and values of each row, that a program processes at once
SPLITS = 64  # programs over the rows of a gradient of A; their sums are added afterwards, in a fixed order


@triton.jit
def _mix(h):
    """Return a hash of uint32 values in which every input bit affects every output bit (a bijection)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _keep(state, offset, layer, rows, columns, rows_per_window, width, threshold):
    """Return the mask of a tile: whether its values are kept, ``[rows, columns]``.

    Args:
        state: seed of the step and index of a window, int64 ``[2]``.
        offset: windows between that window and the one of row 0.
        layer: number of the layer.
        rows: indices of the rows.
        columns: indices of the values in a row.
        rows_per_window: rows of each window.
        width: values per row.
        threshold: values of a byte for which a value is dropped.
    """
    seed, first = tl.load(state), tl.load(state + 1)
    window = first + offset + rows // rows_per_window
    # Two keys per window. The second is mixed in between the rounds, so that no window repeats a part of another one.
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key = _mix(_mix(low ^ window.to(tl.uint32)) ^ _mix(high + layer.to(tl.uint32) * 0x9E3779B9))
    second = _mix(key + 0x85EBCA6B)
    position = ((rows % rows_per_window) * width).to(tl.uint32)[:, None] + columns.to(tl.uint32)[None, :]
    h = position ^ key[:, None]
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) ^ second[:, None]
    h = _mix(h)
    return (h >> 24) >= threshold


# Not compiled again for a layer or an offset that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["offset", "layer"])
def _project(
    x,
    weight,
    out,
    state,
    offset,
    layer,
    rows_per_window,
    height,
    width,
    rank,
    threshold,
    scale,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
):
    """Compute ``dropout(x) @ weight.T`` for one tile of rows.

    Args:
        x: input ``[height, width]``.
        weight: matrix A ``[rank, width]``, in the dtype of ``x``.
        out: result ``[height, rank]``.
        state: see ``_keep``, also for ``offset``, ``layer``, ``rows_per_window`` and ``threshold``.
        offset: see ``_keep``.
        layer: see ``_keep``.
        rows_per_window: see ``_keep``.
        height: rows of the input.
        width: values per row.
        rank: rows of A.
        threshold: see ``_keep``.
        scale: factor of the result, which makes up for the dropped values.
        ROWS: rows per program.
        DEPTH: values of a row that are multiplied at once.
        RANK: ``rank``, rounded up to a power of 2 of at least 16.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, RANK)
    sums = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for tile in range(tl.cdiv(width, DEPTH)):
        k = tile * DEPTH + tl.arange(0, DEPTH)
        inside = (i < height)[:, None] & (k < width)[None, :]
        keep = _keep(state, offset, layer, i, k, rows_per_window, width, threshold)
        # Masked after loading: a mask that differs from value to value would split wide loads into single ones.
        values = tl.where(keep, tl.load(x + i[:, None] * width + k[None, :], mask=inside, other=0.0), 0.0)
        a = tl.load(
            weight + j[None, :] * width + k[:, None], mask=(j < rank)[None, :] & (k < width)[:, None], other=0.0
        )
        sums = tl.dot(values, a, sums, input_precision="ieee")
    tl.store(
        out + i[:, None] * rank + j[None, :],
        (sums * scale).to(out.dtype.element_ty),
        mask=(i < height)[:, None] & (j < rank)[None, :],
    )


@triton.jit(do_not_specialize=["offset", "layer"])
def _gradients(
    x,
    weight,
    grad,
    grad_x,
    grad_weight,
    state,
    offset,
    layer,
    rows_per_window,
    height,
    width,
    rank,
    threshold,
    scale,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    NEEDS_X: tl.constexpr,
):
    """Compute the gradients of ``_project`` for DEPTH columns and every SPLITS-th tile of rows.

    Args:
        x: input ``[height, width]``.
        weight: matrix A ``[rank, width]``.
        grad: gradient of the result ``[height, rank]``.
        grad_x: gradient of the input, written if NEEDS_X.
        grad_weight: this program's part of the gradient of A, fp32 ``[splits, rank, width]``.
        state: as for ``_project``, like all further arguments.
        offset: as for ``_project``.
        layer: as for ``_project``.
        rows_per_window: as for ``_project``.
        height: as for ``_project``.
        width: as for ``_project``.
        rank: as for ``_project``.
        threshold: as for ``_project``.
        scale: as for ``_project``.
        ROWS: as for ``_project``.
        DEPTH: columns per program.
        RANK: as for ``_project``.
        NEEDS_X: whether the input needs a gradient.
    """
    k = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    split, splits = tl.program_id(1), tl.num_programs(1)
    j = tl.arange(0, RANK)
    in_weight = (j < rank)[:, None] & (k < width)[None, :]
    a = tl.load(weight + j[:, None] * width + k[None, :], mask=in_weight, other=0.0)
    sums = tl.zeros((RANK, DEPTH), dtype=tl.float32)
    for tile in range(split, tl.cdiv(height, ROWS), splits):
        i = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (i < height)[:, None] & (k < width)[None, :]
        at = i[:, None] * width + k[None, :]
        keep = _keep(state, offset, layer, i, k, rows_per_window, width, threshold)
        g = tl.load(grad + i[:, None] * rank + j[None, :], mask=(i < height)[:, None] & (j < rank)[None, :], other=0.0)
        values = tl.where(keep, tl.load(x + at, mask=inside, other=0.0), 0.0)
        sums = tl.dot(tl.trans(g), values, sums, input_precision="ieee")
        if NEEDS_X:
            product = tl.dot(g, a, input_precision="ieee") * scale
            tl.store(grad_x + at, tl.where(keep, product, 0.0).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + split * rank * width + j[:, None] * width + k[None, :], sums * scale, mask=in_weight)


def _rank(rank: int) -> int:
    """Return the rank rounded up to what the matrix units multiply."""
    return max(16, triton.next_power_of_2(rank))


def project(
    x: Tensor, weight: Tensor, state: Tensor, offset: int, layer: int, rows_per_window: int, threshold: int
) -> Tensor:
    """Return ``dropout(x) @ weight.T``.

    Args:
        x: contiguous input ``[n, k]``.
        weight: contiguous matrix A ``[r, k]`` of the same dtype.
        state: seed of the step and index of a window, int64 ``[2]``.
        offset: windows between that window and the first one of ``x``.
        layer: number of the layer.
        rows_per_window: rows of each window.
        threshold: values of a byte, of 256, for which a value is dropped.
    """
    (height, width), rank = x.shape, len(weight)
    out = x.new_empty(height, rank)
    with torch.cuda.device_of(x):
        _project[(triton.cdiv(height, ROWS),)](
            x,
            weight,
            out,
            state,
            offset,
            layer,
            rows_per_window,
            height,
            width,
            rank,
            threshold,
            256 / (256 - threshold),
            ROWS=ROWS,
            DEPTH=DEPTH,
            RANK=_rank(rank),
            num_warps=4,
            num_stages=3,
        )
    return out


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    offset: int,
    layer: int,
    rows_per_window: int,
    threshold: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``project`` for its input and for A.

    Args:
        grad: contiguous gradient of the result, ``[n, r]``.
        x: as for ``project``, like the following arguments.
        weight: as for ``project``.
        state: as for ``project``.
        offset: as for ``project``.
        layer: as for ``project``.
        rows_per_window: as for ``project``.
        threshold: as for ``project``.
        needs_x: whether the gradient of the input is needed; if not, an empty tensor is returned for it.

    Returns:
        Gradient of the input in its dtype, and gradient of A in fp32.
    """
    (height, width), rank = x.shape, len(weight)
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    splits = min(SPLITS, triton.cdiv(height, ROWS))
    parts = x.new_empty(splits, rank, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradients[(triton.cdiv(width, DEPTH), splits)](
            x,
            weight,
            grad,
            grad_x,
            parts,
            state,
            offset,
            layer,
            rows_per_window,
            height,
            width,
            rank,
            threshold,
            256 / (256 - threshold),
            ROWS=ROWS,
            DEPTH=DEPTH,
            RANK=_rank(rank),
            NEEDS_X=needs_x,
            num_warps=4,
            num_stages=3,
        )
    return grad_x, parts.sum(0)

"""Triton kernels of GroupNorm and SiLU in one pass over memory each way.

One program processes one group of one sample, whose values are contiguous. It reads them several times, but only the
first time from memory: a group is small enough for the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16  # values at once, and warps: enough loads in flight to use the memory of a large GPU


@triton.jit
def _forward(
    x, weight, bias, out, means, deviations, channels, pixels, groups, eps, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute ``silu(group_norm(x))`` of one group.

    Args:
        x: input ``[batch, channels, pixels]``.
        weight: factor of each channel, fp32 ``[channels]``.
        bias: offset of each channel, fp32 ``[channels]``.
        out: result in the shape of ``x``.
        means: mean of each group, fp32 ``[batch, groups]``, written.
        deviations: inverse standard deviation of each group, fp32 ``[batch, groups]``, written.
        channels: number of channels.
        pixels: values per channel.
        groups: number of groups.
        eps: added to the variance.
        PER_GROUP: channels per group.
        BLOCK: values that are processed at once.
    """
    program = tl.program_id(0)
    first = (program % groups) * PER_GROUP  # channel
    start = ((program // groups).to(tl.int64) * channels + first) * pixels
    size = PER_GROUP * pixels
    # The variance as the mean of squared differences, because a difference of two large sums would lose its digits.
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(0, size, BLOCK):
        i = at + tl.arange(0, BLOCK)
        sums += tl.load(x + start + i, mask=i < size, other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=0) / size
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(0, size, BLOCK):
        i = at + tl.arange(0, BLOCK)
        difference = tl.load(x + start + i, mask=i < size, other=0.0).to(tl.float32) - mean
        sums += tl.where(i < size, difference * difference, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(sums, axis=0) / size + eps)
    tl.store(means + program, mean)
    tl.store(deviations + program, deviation)
    for c in range(PER_GROUP):
        w, b = tl.load(weight + first + c), tl.load(bias + first + c)
        for at in range(0, pixels, BLOCK):
            i = at + tl.arange(0, BLOCK)
            values = tl.load(x + start + c * pixels + i, mask=i < pixels, other=0.0).to(tl.float32)
            z = (values - mean) * deviation * w + b
            tl.store(out + start + c * pixels + i, (z * tl.sigmoid(z)).to(out.dtype.element_ty), mask=i < pixels)


@triton.jit
def _gradient(x, mean, deviation, w, b, grad):
    """Return the gradient before SiLU and the normalized values, from input and gradient of the result."""
    normalized = (x - mean) * deviation
    z = normalized * w + b
    sigmoid = tl.sigmoid(z)
    return grad * sigmoid * (1.0 + z * (1.0 - sigmoid)), normalized


@triton.jit
def _backward(
    x,
    weight,
    bias,
    means,
    deviations,
    grad,
    grad_x,
    grad_weight,
    grad_bias,
    channels,
    pixels,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of one group.

    Args:
        x: as for ``_forward``, like ``weight``, ``bias``, ``channels``, ``pixels``, ``groups`` and the constants.
        weight: see ``x``.
        bias: see ``x``.
        means: mean of each group.
        deviations: inverse standard deviation of each group.
        grad: gradient of the result, in the shape of ``x``.
        grad_x: gradient of the input, written.
        grad_weight: gradient of the factors by sample, fp32 ``[batch, channels]``, written.
        grad_bias: gradient of the offsets by sample, likewise.
        channels: see ``x``.
        pixels: see ``x``.
        groups: see ``x``.
        PER_GROUP: see ``x``.
        BLOCK: see ``x``.
    """
    program = tl.program_id(0)
    first = (program % groups) * PER_GROUP
    row = (program // groups).to(tl.int64) * channels + first
    mean, deviation = tl.load(means + program), tl.load(deviations + program)
    # Sums over the group of the gradient before SiLU, times the factor, and of its product with the normalized values.
    total, product = 0.0, 0.0
    for c in range(PER_GROUP):
        w, b, start = tl.load(weight + first + c), tl.load(bias + first + c), (row + c) * pixels
        sums, products = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for at in range(0, pixels, BLOCK):
            i = at + tl.arange(0, BLOCK)
            values = tl.load(x + start + i, mask=i < pixels, other=0.0).to(tl.float32)
            g = tl.load(grad + start + i, mask=i < pixels, other=0.0).to(tl.float32)
            dz, normalized = _gradient(values, mean, deviation, w, b, g)
            sums += dz
            products += dz * normalized
        channel_sum, channel_product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
        tl.store(grad_bias + row + c, channel_sum)
        tl.store(grad_weight + row + c, channel_product)
        total += channel_sum * w
        product += channel_product * w
    total, product = total / (PER_GROUP * pixels), product / (PER_GROUP * pixels)
    for c in range(PER_GROUP):
        w, b, start = tl.load(weight + first + c), tl.load(bias + first + c), (row + c) * pixels
        for at in range(0, pixels, BLOCK):
            i = at + tl.arange(0, BLOCK)
            values = tl.load(x + start + i, mask=i < pixels, other=0.0).to(tl.float32)
            g = tl.load(grad + start + i, mask=i < pixels, other=0.0).to(tl.float32)
            dz, normalized = _gradient(values, mean, deviation, w, b, g)
            dx = deviation * (dz * w - total - normalized * product)
            tl.store(grad_x + start + i, dx.to(grad_x.dtype.element_ty), mask=i < pixels)


def _settings(x: Tensor, groups: int) -> dict:
    """Return the compile-time settings for an input."""
    pixels = x.shape[2] * x.shape[3]
    block = min(BLOCK, max(128, triton.next_power_of_2(pixels)))
    return {"PER_GROUP": x.shape[1] // groups, "BLOCK": block, "num_warps": max(4, WARPS * block // BLOCK)}


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``silu(group_norm(x))``.

    Args:
        x: contiguous ``[n, c, h, w]`` of any floating-point dtype.
        weight: fp32 ``[c]``.
        bias: fp32 ``[c]``.
        groups: number of groups.
        eps: added to the variance.

    Returns:
        The result in the dtype of ``x``, and mean and inverse standard deviation of each group, fp32 ``[n, groups]``.
    """
    n, c, h, w = x.shape
    out = torch.empty_like(x)
    means, deviations = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        _forward[(n * groups,)](x, weight, bias, out, means, deviations, c, h * w, groups, eps, **_settings(x, groups))
    return out, means, deviations


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, deviations: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``forward`` for ``x``, ``weight`` and ``bias``.

    Args:
        grad: contiguous gradient of the result.
        x: input of ``forward``, like the following two.
        weight: see ``x``.
        bias: see ``x``.
        means: result of ``forward``.
        deviations: result of ``forward``.
        groups: number of groups.
    """
    n, c, h, w = x.shape
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (x.new_empty(n, c, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        _backward[(n * groups,)](
            x,
            weight,
            bias,
            means,
            deviations,
            grad,
            grad_x,
            grad_weight,
            grad_bias,
            c,
            h * w,
            groups,
            **_settings(x, groups),
        )
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)

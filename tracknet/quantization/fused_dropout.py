"""First half of a LoRA adapter, ``A dropout(x)``, on a GPU: one Triton kernel forward and one backward.

The operators of ``recomputed_dropout`` draw, compare, convert and mask in passes of their own, which on a GPU take
longer than all products of the model. A kernel does it while it reads the input. The masks have the same distribution
as those of other devices, but other values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tracknet.quantization.operators import operator

MAX_RANK = 64  # the kernels hold all rows of A at once, which is more shared memory than a GPU has at larger ranks


@operator("dropout_linear_fused")
def _project(
    x: Tensor, weight: Tensor, state: Tensor, offset: int, layer: int, rows_per_window: int, threshold: int
) -> Tensor:
    """Return ``dropout(x) @ weight.T``; see ``dropout_kernels.project`` for the arguments."""
    if isinstance(x, FakeTensor):
        return x.new_empty(x.shape[0], weight.shape[0])
    # Imported here, because Triton is not installed on every machine that imports this module.
    from tracknet.quantization import dropout_kernels

    return dropout_kernels.project(x, weight, state, offset, layer, rows_per_window, threshold)


class FusedDropoutProduct(torch.autograd.Function):
    """``dropout(x) @ weight.T`` of all windows, whose backward derives the mask again.

    Arguments are the input ``[..., k]``, matrix A ``[r, k]`` of the same dtype, state and offset as returned by
    ``WindowRng.device_state``, the number of the layer, the number of windows in the input, and the number of byte
    values for which a value is dropped.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, state, offset, layer, windows, threshold):
        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        ctx.drawn = offset, layer, len(rows) // windows, threshold
        ctx.save_for_backward(x, weight, state)
        return _project(rows, weight, state, *ctx.drawn).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        from tracknet.quantization import dropout_kernels

        x, weight, state = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        flat = grad.reshape(-1, grad.shape[-1]).contiguous()
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        offset, layer, rows_per_window, threshold = ctx.drawn
        grad_x, grad_weight = dropout_kernels.gradients(
            flat, rows, weight, state, offset, layer, rows_per_window, threshold, needs_x
        )
        return (
            grad_x.view_as(x) if needs_x else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            *[None] * 5,
        )

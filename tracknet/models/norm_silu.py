"""GroupNorm and SiLU as one operation that keeps nothing for backward but its input, in the input's dtype.

One after the other under autocast they keep ten bytes for every value: two of fp32 and the 16-bit copy that the next
convolution reads. At a decoder's resolution that is more than a backbone block keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 1 << 20  # values that are in fp32 at a time


class NormSilu(nn.GroupNorm):
    """``silu(group_norm(x))``, computed in fp32 and put out in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, h, w]`` to the same shape."""
        if not torch.is_grad_enabled():
            return F.silu(super().forward(x.float())).to(x.dtype)
        return _NormSilu.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """Samples are normalized by themselves, so a batch can be gone through in parts."""
    return x.split(max(1, CHUNK // max(1, x[0].numel())))


def _plain(x: Tensor) -> Tensor:
    """In fp32, channels first: the operators' kernels take all their tensors to be laid out like that."""
    return x.float().contiguous()


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized part in fp32, and the groups' means and inverse deviations."""
    n, c, h, w = x.shape
    return torch.ops.aten.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for part, part_out in zip(_split(x), _split(out)):
                part_out.copy_(F.silu(_normalize(_plain(part), weight, bias, groups, eps)[0], inplace=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for part, part_grad, part_grad_x in zip(_split(x), _split(grad), _split(grad_x)):
            values = _plain(part)
            z, mean, rstd = _normalize(values, weight, bias, ctx.groups, ctx.eps)
            z = torch.ops.aten.silu_backward(_plain(part_grad), z)
            n, c, h, w = values.shape
            dx, dw, db = torch.ops.aten.native_group_norm_backward(
                z, values, mean, rstd, weight, n, c, h * w, ctx.groups, [True, True, True]
            )
            part_grad_x.copy_(dx)
            grad_weight += dw
            grad_bias += db
        return grad_x, grad_weight, grad_bias, None, None

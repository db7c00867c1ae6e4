"""GroupNorm and SiLU as one operation that saves only its input for backward, in the input's dtype.

As two operations under autocast they save ten bytes per value: two fp32 tensors and the 16-bit copy that the next
convolution reads. At a decoder's resolution that is more than a backbone block saves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tracknet.models.triton_support import supports_triton

CHUNK = 1 << 20  # largest number of values that are held in fp32 at once


class NormSilu(nn.GroupNorm):
    """``silu(group_norm(x))``, computed in fp32 and returned in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, h, w]`` to the same shape."""
        if supports_triton(x.device) and not isinstance(x, FakeTensor):
            return _FusedNormSilu.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        # Without gradients nothing is saved for backward, so the standard operators suffice.
        if not torch.is_grad_enabled():
            return F.silu(super().forward(x.float())).to(x.dtype)
        return _NormSiluFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """Split a batch into parts of at most ``CHUNK`` values, but at least one sample, as samples are independent."""
    return x.split(max(1, CHUNK // max(1, x[0].numel())))


def _to_fp32(x: Tensor) -> Tensor:
    """Convert to contiguous fp32; the kernels of the operators assume that all their tensors are laid out like that."""
    return x.float().contiguous()


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize fp32 ``[n, c, h, w]``; return the result, and the mean and inverse deviation of each group."""
    n, c, h, w = x.shape
    return torch.ops.aten.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)


class _FusedNormSilu(torch.autograd.Function):
    """Autograd function of ``NormSilu`` on a GPU, with one kernel each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        # Imported here, because Triton is not installed on every machine that imports this module.
        from tracknet.models import norm_silu_kernels

        x, weight, bias = x.contiguous(), weight.float(), bias.float()
        out, means, deviations = norm_silu_kernels.forward(x, weight, bias, groups, eps)
        ctx.groups = groups
        ctx.save_for_backward(x, weight, bias, means, deviations)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from tracknet.models import norm_silu_kernels

        x, weight, bias, means, deviations = ctx.saved_tensors
        return (
            *norm_silu_kernels.backward(grad.contiguous(), x, weight, bias, means, deviations, ctx.groups),
            None,
            None,
        )


class _NormSiluFunction(torch.autograd.Function):
    """Autograd function of ``NormSilu``: backward recomputes the normalization from the saved input."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        # The input is saved as it is, in 16 bits under autocast. The fp32 intermediates exist for one part at a time.
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty_like(x)
        # Without autocast, which would change the dtypes inside. SiLU overwrites the normalized part.
        with torch.autocast(x.device.type, enabled=False):
            for part, part_out in zip(_split(x), _split(out)):
                part_out.copy_(F.silu(_normalize(_to_fp32(part), weight, bias, groups, eps)[0], inplace=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for part, part_grad, part_grad_x in zip(_split(x), _split(grad), _split(grad_x)):
            # Recompute the normalized values, which are the input of SiLU.
            values = _to_fp32(part)
            z, mean, rstd = _normalize(values, weight, bias, ctx.groups, ctx.eps)
            # Chain rule from the output to the input: first through SiLU, then through GroupNorm.
            # Reusing the name frees the normalized values before the second step.
            z = torch.ops.aten.silu_backward(_to_fp32(part_grad), z)
            n, c, h, w = values.shape
            dx, dw, db = torch.ops.aten.native_group_norm_backward(
                z, values, mean, rstd, weight, n, c, h * w, ctx.groups, [True, True, True]
            )
            part_grad_x.copy_(dx)
            # Parameter gradients are sums over the batch, so the parts add up in fp32.
            grad_weight += dw
            grad_bias += db
        return grad_x, grad_weight, grad_bias, None, None

"""The first half of an adapter, ``A dropout(x)``, that keeps nothing of its own for backward.

Dropout as usual keeps its mask, and the product keeps what dropout put out: three to four bytes for every value of the input, for each
of the adapters that read it. Here backward draws the mask again from a seed and needs the input only, which q, k and v share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes


def draw_seed() -> int:
    """Draw from torch's generator of the CPU: repeatable by ``manual_seed``, put back when a checkpointed block is run again."""
    # A number is wanted even where tensors have no content (memory.plan).
    with _disable_current_modes():
        return int(torch.randint(2**62, ()))


def _drop(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device)
    generator.manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, p, seed):
        ctx.p, ctx.seed = p, seed
        ctx.save_for_backward(x, weight)
        return F.linear(_drop(x, p, seed), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ _drop(x, ctx.p, ctx.seed).flatten(0, -2)
        if ctx.needs_input_grad[0]:
            # The same mask and scale, on the gradient.
            grad_x = _drop(grad @ weight, ctx.p, ctx.seed)
        return grad_x, grad_weight, None, None


class DroppedLinear(nn.Linear):
    """``A`` of an adapter with its dropout inside; takes over the weight of a linear layer without bias.

    Attributes:
        p: probability of dropping a value of the input, while training.
    """

    def __init__(self, linear: nn.Linear, p: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if not self.training or self.p == 0:
            return F.linear(x, self.weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return _DroppedProduct.apply(x.to(dtype), self.weight.to(dtype), self.p, draw_seed())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

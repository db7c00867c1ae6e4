"""The first half of an adapter, ``A dropout(x)``, that keeps nothing of its own for backward and draws for each window apart.

Dropout as usual keeps its mask, and the product keeps what dropout put out: three to four bytes for every value of the input, for each
of the adapters that read it. Here backward draws the mask again from a seed and needs the input only, which q, k and v share.
A window's mask depends on the step, the layer and the window's place in the batch, whatever parts the batch is run in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tracknet.models.windows import Windows


def _drop_(x: Tensor, p: float, seeds: list[int]) -> Tensor:
    generator = torch.Generator(x.device)
    mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for window, seed in zip(mask.view(len(seeds), -1), seeds):
        generator.manual_seed(seed)
        window.bernoulli_(1 - p, generator=generator)
    return x.mul_(mask).div_(1 - p)


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, p, seeds):
        ctx.p, ctx.seeds = p, seeds
        ctx.save_for_backward(x, weight)
        return F.linear(_drop_(x.clone(), p, seeds), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ _drop_(x.clone(), ctx.p, ctx.seeds).flatten(0, -2)
        if ctx.needs_input_grad[0]:
            # The same mask and scale, on the gradient.
            grad_x = _drop_(grad @ weight, ctx.p, ctx.seeds)
        return grad_x, grad_weight, None, None


class DroppedLinear(nn.Linear):
    """``A`` of an adapter with its dropout inside; takes over the weight of a linear layer without bias.

    Attributes:
        p: probability of dropping a value of the input, while training.
        windows: what the forward sees.
        number: of the layer, so that each draws its own masks.
    """

    def __init__(self, linear: nn.Linear, p: float, windows: Windows, number: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        self.p, self.windows, self.number = p, windows, number

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if not self.training or self.p == 0:
            return F.linear(x, self.weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return _DroppedProduct.apply(x.to(dtype), self.weight.to(dtype), self.p, self.windows.seeds(self.number))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

"""The first half of an adapter, ``A dropout(x)``, that keeps nothing of its own for backward and draws for each window
apart.

Dropout as usual keeps its mask, and the product keeps what dropout put out: three to four bytes for every value of the
input, for each of the adapters that read it. Here backward draws the mask again from a seed and needs the input only,
which q, k and v share. A window's mask depends on the step, the layer and the window's place in the batch, whatever
parts the batch is run in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tracknet.models.window_rng import WindowRng

# A mask is drawn as random bytes, eight at a time, and a value is kept where its byte reaches a threshold: on a CPU
# some fifteen times faster than a draw for each value, which would take as long as the model itself.
_LEVELS = 256
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _threshold(p: float) -> int:
    return min(max(round(p * _LEVELS), 1), _LEVELS - 1)


def _draw_keep(x: Tensor, p: float, seeds: list[int]) -> Tensor:
    """Draw which values of an input are kept: uint8 of its shape, 0 or 1."""
    values = x.numel() // len(seeds)
    words = torch.empty(len(seeds), -(-values // 8), dtype=torch.int64, device=x.device)
    generator = torch.Generator(x.device)
    for window, seed in zip(words, seeds):
        generator.manual_seed(seed)
        window.random_(-(2**63), None, generator=generator)  # all 64 bits
    return words.view(torch.uint8)[:, :values].ge_(_threshold(p)).reshape(x.shape)


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    """Return ``x`` where it is kept, else 0: an AND of its bits with all ones or none, several times faster than a
    product."""
    bits = _SAME_SIZE[x.element_size()]
    return keep.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


class _DropoutProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, p, seeds):
        ctx.p, ctx.seeds = p, seeds
        ctx.save_for_backward(x, weight)
        # What is kept is scaled up where it is small: after the product, not before.
        return F.linear(_masked(x, _draw_keep(x, p, seeds)), weight).mul_(_LEVELS / (_LEVELS - _threshold(p)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        grad = grad * (_LEVELS / (_LEVELS - _threshold(ctx.p)))
        keep = _draw_keep(x, ctx.p, ctx.seeds)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ _masked(x, keep).flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = _masked(grad @ weight, keep)
        return grad_x, grad_weight, None, None


class DropoutLinear(nn.Linear):
    """``A`` of an adapter with its dropout inside; takes over the weight of a linear layer without bias.

    Attributes:
        p: probability of dropping a value of the input, while training; in steps of 1/256.
        rng: source of its seeds by window.
        number: of the layer, so that each draws its own masks.
    """

    def __init__(self, linear: nn.Linear, p: float, rng: WindowRng, number: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.p, self.rng, self.number = p, rng, number

    @torch.compiler.disable  # the seeds are new in every step, and so would be the graph
    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if not self.training or self.p == 0:
            return F.linear(x, self.weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return _DropoutProduct.apply(x.to(dtype), self.weight.to(dtype), self.p, self.rng.seeds(self.number))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

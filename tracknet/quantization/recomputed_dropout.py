"""First half of a LoRA adapter, ``A dropout(x)``, without any saved mask or activation of its own.

Standard dropout saves its mask, and the product saves the output of dropout: three to four bytes per input value, for
each adapter that reads the input. Here backward draws the mask again from a seed and needs only the input, which q, k
and v share.

Every window has its own seed. Its mask depends on the step, the layer and the index of the window in the batch, but not
on the parts in which the batch is processed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tracknet.models.triton_support import supports_triton
from tracknet.models.window_rng import WindowRng
from tracknet.quantization import fused_dropout
from tracknet.quantization.operators import operator

# Masks are drawn as random bytes, eight per 64-bit word, and a value is kept if its byte reaches a threshold. On a CPU
# this is about fifteen times faster than one draw per value, which would take as long as the model itself.
_LEVELS = 256  # values of a byte, and therefore steps of the probability
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by bytes per element


def _threshold(p: float) -> int:
    """Return the number of byte values, from 1 to 255, for which an input value is dropped."""
    return min(max(round(p * _LEVELS), 1), _LEVELS - 1)


def _draw_keep(x: Tensor, p: float, seeds: list[int]) -> Tensor:
    """Draw the mask of an input.

    Args:
        x: input of the windows, one after the other, of equal size.
        p: probability of dropping a value.
        seeds: seed of each window.

    Returns:
        uint8 of the shape of ``x``: 1 for values to keep, 0 for values to drop.
    """
    # One row of words per window, rounded up to whole words.
    values = x.numel() // len(seeds)
    words = torch.empty(len(seeds), -(-values // 8), dtype=torch.int64, device=x.device)
    generator = torch.Generator(x.device)
    for window, seed in zip(words, seeds):
        generator.manual_seed(seed)
        window.random_(-(2**63), None, generator=generator)  # the full range: all 64 bits are random
    # The bytes of the words are compared in place. Bytes beyond the window's values are cut off.
    return words.view(torch.uint8)[:, :values].ge_(_threshold(p)).reshape(x.shape)


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    """Return ``x`` where ``keep`` is 1, else 0."""
    # A bitwise AND is several times faster than a product. The negative of 1 has all bits set, and that of 0 none.
    bits = _SAME_SIZE[x.element_size()]
    return keep.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


@operator("dropout_linear")
def _dropout_linear(x: Tensor, weight: Tensor, p: float, seeds: list[int]) -> Tensor:
    """Return ``dropout(x) @ weight.T``.

    Args:
        x: input of the windows, one after the other, of equal size.
        weight: weight ``[m, k]``.
        p: probability of dropping a value.
        seeds: seed of each window.
    """
    # The scale 1 / (1 - p), with the rounded p, is applied to the small product instead of the large input.
    return F.linear(_masked(x, _draw_keep(x, p, seeds)), weight).mul_(_LEVELS / (_LEVELS - _threshold(p)))


class _DropoutProduct(torch.autograd.Function):
    """``dropout(x) @ weight.T``, whose backward draws the mask again."""

    @staticmethod
    def forward(ctx, x, weight, p, seeds):
        # Seeds instead of the mask. The input is the tensor that other layers save too, so it takes no memory.
        ctx.p, ctx.seeds = p, seeds
        ctx.save_for_backward(x, weight)
        return _dropout_linear(x, weight, p, seeds)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        # Both gradients contain the scale, which is again applied to the smallest tensor.
        grad = grad * (_LEVELS / (_LEVELS - _threshold(ctx.p)))
        keep = _draw_keep(x, ctx.p, ctx.seeds)  # the mask of forward
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ _masked(x, keep).flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = _masked(grad @ weight, keep)
        return grad_x, grad_weight, None, None


class DropoutLinear(nn.Linear):
    """Matrix ``A`` of a LoRA adapter, with dropout of its input.

    Args:
        linear: linear layer without bias, whose weight is used.
        p: probability of dropping a value of the input in training, in steps of 1/256.
        rng: source of seeds by window.
        number: number of the layer, which gives every layer its own masks.
    """

    def __init__(self, linear: nn.Linear, p: float, rng: WindowRng, number: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.p, self.rng, self.number = p, rng, number

    @torch.compiler.disable  # the seeds change in every step, and with them the graph would be compiled again
    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if not self.training or self.p == 0:
            return F.linear(x, self.weight)
        # Convert to autocast's dtype here, because autograd saves the arguments of the function.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            if self.runs_fused(x.device) and not isinstance(x, FakeTensor):
                state, offset = self.rng.device_state(x.device)
                windows = 1 if self.rng.seed is None else self.rng.count
                return fused_dropout.FusedDropoutProduct.apply(
                    x.to(dtype), self.weight.to(dtype), state, offset, self.number, windows, _threshold(self.p)
                )
            return _DropoutProduct.apply(x.to(dtype), self.weight.to(dtype), self.p, self.rng.seeds(self.number))

    def runs_fused(self, device: torch.device) -> bool:
        """Return whether a single kernel draws the mask and multiplies, on a device."""
        return self.out_features <= fused_dropout.MAX_RANK and supports_triton(device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

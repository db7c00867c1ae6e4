"""Linear layers whose int8 weight itself is trained, by stochastic rounding.

A weight that is only stored in int8 cannot take a step smaller than half the distance of two codes: rounded to nearest,
it would never move. Rounded up or down at random, with the probability that makes it right on average, it does. The
approach is torchao's quantized training; the 8-bit AdamW is bitsandbytes', which sees an ordinary fp32 weight for one
layer at a time.

Bytes per weight: 1 code, 4 gradient, 2 optimizer state, against 16 for AdamW in mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracknet.quantization.bnb_types import BitsandbytesOptimizer
from tracknet.quantization.int8 import Int8Linear, Int8MatMul
from tracknet.quantization.precision import Int8Kernel


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with the probability of the fraction, else down: the expectation is ``x``. Returns int8."""
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    return (x + noise).floor_().clamp_(-127, 127).to(torch.int8)


class TrainableInt8Linear(Int8Linear):
    """``Int8Linear`` whose codes train: gradients come to ``weight_grad_proxy``, ``store_`` takes the new weight.

    Attributes:
        weight_grad_proxy: where autograd puts the weight's gradient (fp32 ``[out, in]``): one zero in memory, seen as a
            matrix. No part of the state.
    """

    def __init__(self, linear: nn.Linear, threshold: float, kernel: Int8Kernel = "bitsandbytes"):
        super().__init__(linear, threshold, False, kernel)
        self._make_place()

    def _make_place(self) -> None:
        zero = torch.zeros((), device=self.weight.device)
        self.weight_grad_proxy = nn.Parameter(zero.expand(self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return Int8MatMul.apply(
            x, self.weight_grad_proxy, self.weight, self.scale, self.bias, self.threshold, self.kernel
        )

    @torch.no_grad()
    def store_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Replace codes and scales by those of a new weight, fp32 ``[out, in]``."""
        largest = weight.abs().amax(dim=1)
        codes = round_stochastically(weight * (127 / largest.clamp_min(1e-30))[:, None], generator)
        before = self.scale.clone()
        try:
            self.scale.copy_(largest)
            self.weight.copy_(codes)
        except BaseException:
            self.scale.copy_(before)
            raise

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # Moved like any parameter, the place would become a full matrix.
        trains = self.weight_grad_proxy.requires_grad
        del self.weight_grad_proxy
        super()._apply(fn, recurse)
        self._make_place()
        self.weight_grad_proxy.requires_grad_(trains)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight_grad_proxy"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        missing_keys.remove(f"{prefix}weight_grad_proxy")


class StochasticRounding(BitsandbytesOptimizer):
    """Over an 8-bit optimizer of bitsandbytes: updates int8 layers one at a time through an fp32 copy.

    Attributes:
        layers: int8 layer by the parameter that holds its gradient.
        seed: the rounding of a step depends on it, the step and the parameter only, so that a resumed run rounds alike.
    """

    layers: Mapping[Any, Any] = {}
    seed: int = 0

    def update_step(self, group: dict, p: Any, gindex: int, pindex: int) -> None:
        """Update one parameter (called by bitsandbytes)."""
        layer = self.layers.get(p)
        if layer is None:
            super().update_step(group, p, gindex, pindex)
            return
        place = p.data
        try:
            p.data = layer.dequantize()
            super().update_step(group, p, gindex, pindex)
            generator = torch.Generator(p.device)
            generator.manual_seed(hash((self.seed, self.state[p]["step"], gindex, pindex)) % 2**63)
            layer.store_(p.data, generator)
        finally:
            p.data = place


def int8_layers(model: nn.Module) -> dict[nn.Parameter, TrainableInt8Linear]:
    """Find the int8 layers that train, by the parameter that holds their gradient."""
    return {m.weight_grad_proxy: m for m in model.modules() if isinstance(m, TrainableInt8Linear)}

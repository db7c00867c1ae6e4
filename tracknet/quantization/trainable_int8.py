"""Linear layers whose int8 weight itself is trained, with stochastic rounding.

A weight that is stored in int8 only cannot take a step smaller than half the distance between two codes: rounded to the
nearest code, it would never move. Stochastic rounding rounds up or down at random, such that the expected value is
correct, so small steps take effect on average. The approach is that of torchao's quantized training. The 8-bit AdamW is
that of bitsandbytes, which sees an ordinary fp32 weight of one layer at a time.

Bytes per weight: 1 for the code, 4 for the gradient and 2 for the optimizer state, compared to 16 for AdamW in mixed
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracknet.quantization.bnb_types import BitsandbytesOptimizer
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.precision import Int8Kernel


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with a probability equal to the fractional part, else down, so that the expected value is ``x``.

    Args:
        x: fp32 values from -127 to 127, of any shape.
        generator: source of random numbers, on the device of ``x``.

    Returns:
        int8 codes of the same shape.
    """
    # x + u with u uniform in [0, 1) reaches the next integer with exactly that probability.
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    return (x + noise).floor_().clamp_(-127, 127).to(torch.int8)


class TrainableInt8Linear(Int8Linear):
    """``Int8Linear`` whose codes can be trained.

    int8 tensors cannot require gradients. The gradient of the weight is therefore accumulated in ``weight_grad_proxy``,
    and ``store_`` quantizes an updated weight.

    Attributes:
        weight_grad_proxy: parameter that receives the gradient of the weight, fp32 ``[out_features, in_features]``. It
            is a single zero expanded to a matrix, so it takes 4 bytes. It is not part of the state dict.
    """

    def __init__(
        self, linear: nn.Linear, threshold: float, kernel: Int8Kernel = "bitsandbytes", int8_backward: bool = False
    ):
        super().__init__(linear, threshold, False, kernel, int8_backward)
        self._make_grad_proxy()

    def _make_grad_proxy(self) -> None:
        """Create ``weight_grad_proxy`` on the device of the codes."""
        # An expanded tensor has strides 0. Autograd still accepts a gradient of its full shape.
        zero = torch.zeros((), device=self.weight.device)
        self.weight_grad_proxy = nn.Parameter(zero.expand(self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return self._multiply(x, self.weight_grad_proxy, self.weight, self.scale)

    @torch.no_grad()
    def store_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Replace codes and scales by those of a new weight.

        Args:
            weight: fp32 ``[out_features, in_features]``.
            generator: source of random numbers for the rounding.
        """
        # Everything that allocates memory, and may fail, comes before the first change.
        largest = weight.abs().amax(dim=1)
        codes = round_stochastically(weight * (127 / largest.clamp_min(1e-30))[:, None], generator)
        previous_scale = self.scale.clone()
        # Codes and scales change together: if the second copy fails or is interrupted, restore the scale.
        try:
            self.scale.copy_(largest)
            self.weight.copy_(codes)
        except BaseException:
            self.scale.copy_(previous_scale)
            raise

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # Moving or converting the proxy like other parameters would allocate a full matrix, so it is created again.
        requires_grad = self.weight_grad_proxy.requires_grad
        del self.weight_grad_proxy
        super()._apply(fn, recurse)
        self._make_grad_proxy()
        self.weight_grad_proxy.requires_grad_(requires_grad)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The proxy has no content to save.
        del destination[f"{prefix}weight_grad_proxy"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        # Never saved, so not missing: strict loading must accept its absence.
        missing_keys.remove(f"{prefix}weight_grad_proxy")


class StochasticRounding(BitsandbytesOptimizer):
    """Mixin for an 8-bit optimizer of bitsandbytes that updates int8 layers one at a time through an fp32 copy.

    Attributes:
        layers: int8 layers by the parameter that holds their gradient.
        seed: seed of the rounding, which otherwise depends only on the step and the parameter, so that a resumed run
            rounds in the same way.
    """

    layers: Mapping[Any, Any] = {}
    seed: int = 0

    def update_step(self, group: dict, p: Any, gindex: int, pindex: int) -> None:
        """Update one parameter (called by bitsandbytes).

        Args:
            group: parameter group.
            p: parameter, or gradient proxy of an int8 layer.
            gindex: index of the group.
            pindex: index of the parameter in the group.
        """
        layer = self.layers.get(p)
        if layer is None:
            super().update_step(group, p, gindex, pindex)
            return
        # Replace the proxy by the dequantized weight, let the optimizer update that, and store the result as codes. The
        # fp32 copy exists for one layer at a time.
        proxy = p.data
        try:
            p.data = layer.dequantize()
            super().update_step(group, p, gindex, pindex)
            # The optimizer has incremented its step. Each step, group and parameter has its own seed.
            generator = torch.Generator(p.device)
            generator.manual_seed(hash((self.seed, self.state[p]["step"], gindex, pindex)) % 2**63)
            layer.store_(p.data, generator)
        finally:
            p.data = proxy  # also after an error, so that the copy is freed


def int8_layers(model: nn.Module) -> dict[nn.Parameter, TrainableInt8Linear]:
    """Return the trainable int8 layers of a model by the parameter that holds their gradient."""
    return {m.weight_grad_proxy: m for m in model.modules() if isinstance(m, TrainableInt8Linear)}

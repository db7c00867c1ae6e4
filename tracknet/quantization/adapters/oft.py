"""OFT (Qiu et al., NeurIPS 2023): rotation of a layer's input by a trained block-diagonal orthogonal matrix."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tracknet.errors import UserError
from tracknet.quantization.adapters.base import Adapter, LoraConfig


class OftAdapter(Adapter):
    """Rotation of the input, which keeps the angles between the rows of the weight."""

    FIELDS = frozenset({"bias"})
    OPTIONS: ClassVar = {"oft_block_size": 32}

    def peft_config(self, config: LoraConfig, targets: list[str], initialize: bool) -> Any:
        import peft

        # peft calls the biases of adapted layers `oft_only`.
        bias = "oft_only" if config.bias == "lora_only" else config.bias
        return peft.OFTConfig(oft_block_size=self._block_size(config), r=0, target_modules=targets, bias=bias)

    def check_targets(self, backbone: nn.Module, config: LoraConfig, targets: list[str]) -> None:
        size = self._block_size(config)
        for name in targets:
            layer: Any = backbone.get_submodule(name)
            if size < 2 or layer.in_features % size:
                raise UserError(
                    f"training.lora.options: oft_block_size={size} must be at least 2 and divide the"
                    f" {layer.in_features} inputs of {name}."
                )

    def _block_size(self, config: LoraConfig) -> int:
        return int({**self.OPTIONS, **config.options}["oft_block_size"])

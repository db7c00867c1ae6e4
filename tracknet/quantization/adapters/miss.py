"""MiSS (Kang and Yin, 2024): one trained block per layer, which is repeated over the columns of its weight."""

from __future__ import annotations

from typing import Any

from tracknet.quantization.adapters.base import Adapter, LoraConfig


class MissAdapter(Adapter):
    """Sum of groups of inputs, times one matrix ``[r, out_features]``: half of LoRA's values, and a single product."""

    def peft_config(self, config: LoraConfig, targets: list[str], initialize: bool) -> Any:
        import peft

        return peft.MissConfig(r=config.r, target_modules=targets, bias=config.bias)

"""LoRA through peft (Hu et al., ICLR 2022): ``W x + (lora_alpha / r) B A x`` with trained A and B of rank r."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import peft
from torch import nn

from tracknet.errors import UserError, nearest

# What the same projections are called in other model families: a target of the left column also finds the right ones.
ALIASES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "dense": ("o_proj",),
}


@dataclass
class LoraConfig:
    """Adapters inside the backbone; the fields are peft's."""

    enabled: bool = True
    """Switches LoRA."""
    r: int = 16
    """Rank of the update: more can learn more, and trains ``r * (in + out)`` values per layer."""
    lora_alpha: int = 32
    """The update is scaled by ``lora_alpha / r``."""
    lora_dropout: float = 0.1
    """Dropout on the adapters' input."""
    target_modules: list[str] = field(default_factory=list)
    """Names (or their last part) of the layers that get an adapter; ``[]`` = every linear layer of the backbone."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the backbone train along."""
    task_type: Literal["FEATURE_EXTRACTION"] = "FEATURE_EXTRACTION"
    """Recorded in the adapter, as peft expects it of a feature extractor."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise UserError(f"training.lora: r={self.r} and lora_alpha={self.lora_alpha} are at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"training.lora.lora_dropout={self.lora_dropout}: give a probability below 1.")


def add_lora(backbone: nn.Module, config: LoraConfig) -> None:
    """Put adapters into the backbone; everything else of it is frozen (but for biases, if so configured).

    Args:
        backbone: a transformers model, quantised or not; changed in place.

    Raises:
        UserError: a target matches no linear layer; lists the names that exist.
    """
    targets = match_targets(backbone, config.target_modules)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            bias=config.bias,
            task_type=config.task_type,
        ),
        backbone,
    )
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            # peft follows the base's compute dtype; a 16-bit weight would round small updates away. Autocast computes in
            # 16 bit all the same.
            parameter.data = parameter.data.float()


def match_targets(backbone: nn.Module, wanted: list[str]) -> list[str]:
    """Resolve target names to the full names of linear layers."""
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not wanted:
        return layers
    found: list[str] = []
    for target in wanted:
        names = (target, *ALIASES.get(target, ()))
        hits = [layer for layer in layers if any(layer == n or layer.endswith(f".{n}") for n in names)]
        if not hits:
            kinds = sorted({layer.rsplit(".", 1)[-1] for layer in layers if not re.fullmatch(r"\d+", layer)})
            raise UserError(f"training.lora.target_modules: '{target}' matches no linear layer of the backbone; there are "
                            f"{', '.join(kinds)}{nearest(target, kinds)}")  # fmt: skip
        found += hits
    return sorted(set(found), key=layers.index)

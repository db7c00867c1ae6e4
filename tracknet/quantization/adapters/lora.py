"""LoRA (Hu et al., ICLR 2022): ``W x + (lora_alpha / r) B A x`` with trained A and B of rank r."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from tracknet.errors import UserError, nearest
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.adapters.base import Adapter, LoraConfig
from tracknet.quantization.adapters.targets import layer_kinds, matches
from tracknet.quantization.recomputed_dropout import DropoutLinear


class LoraAdapter(Adapter):
    """Low-rank update of a linear layer, with rsLoRA, DoRA, and peft's initializations."""

    FIELDS = frozenset(f.name for f in fields(LoraConfig))

    def peft_config(self, config: LoraConfig, targets: list[str], initialize: bool) -> Any:
        import peft

        return peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            bias=config.bias,
            task_type=config.task_type,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=config.init_lora_weights if initialize and not config.initialized_later else True,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        )

    def prepare(self, layers: dict[str, Any], config: LoraConfig, rng: WindowRng) -> None:
        # DoRA reads A itself, to compute column norms, so it keeps the dropout of peft.
        if config.lora_dropout == 0 or config.use_dora:
            return
        # Move the dropout from peft's own module into A, which draws its mask again in backward instead of saving it.
        for number, layer in enumerate(layers.values()):
            for name, a in layer.lora_A.items():
                layer.lora_A[name] = DropoutLinear(a, config.lora_dropout, rng, number)
                layer.lora_dropout[name] = nn.Identity()

    def check_targets(self, backbone: nn.Module, config: LoraConfig, targets: list[str]) -> None:
        _check_patterns(config, targets)
        _check_ranks(backbone, config, targets)


def _check_patterns(config: LoraConfig, targets: list[str]) -> None:
    """Raise a ``UserError`` for a rank or alpha pattern that matches no target."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(matches(pattern, target) for target in targets):
                raise UserError(
                    f"training.lora.{key}: '{pattern}' matches no layer with an adapter; their names are "
                    f"{', '.join(layer_kinds(targets))}{nearest(pattern, layer_kinds(targets))}"
                )


def _check_ranks(backbone: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    """Raise a ``UserError`` for ranks that the initialization does not support."""
    init = config.init_lora_weights
    for name in targets:
        matching = (r for pattern, r in config.rank_pattern.items() if matches(pattern, name))
        layer: Any = backbone.get_submodule(name)
        rank = next(matching, config.r)
        if init == "orthogonal" and rank % 2:
            raise UserError(
                f"training.lora: init_lora_weights=orthogonal requires even ranks, but {name} has r={rank}."
            )
        largest = {"eva": layer.in_features, "loftq": min(layer.in_features, layer.out_features)}.get(str(init))
        if largest is not None and rank > largest:
            raise UserError(
                f"training.lora: init_lora_weights={init} takes r directions of the layer, but {name} has {largest} of"
                f" them, fewer than r={rank}."
            )
        # PiSSA and OLoRA take the adapter from a decomposition of the weight, which has limited rank.
        if config.changes_base and rank > min(layer.in_features, layer.out_features):
            raise UserError(
                f"training.lora: init_lora_weights={init} takes r directions of the weight, but {name} has "
                f"{min(layer.in_features, layer.out_features)} of them, fewer than r={rank}."
            )

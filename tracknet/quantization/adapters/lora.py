"""LoRA (Hu et al., ICLR 2022): ``W x + (lora_alpha / r) B A x`` with trained A and B of rank r."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
        # DoRA reads A itself, to compute column norms, so it keeps the forward and the dropout of peft.
        if config.use_dora:
            return
        for layer in layers.values():
            layer.forward = partial(_forward, layer, layer.forward)
        if config.lora_dropout == 0:
            return
        # Move the dropout from peft's own module into A, which draws its mask again in backward instead of saving it.
        for number, layer in enumerate(layers.values()):
            for name, a in layer.lora_A.items():
                layer.lora_A[name] = DropoutLinear(a, config.lora_dropout, rng, number)
                layer.lora_dropout[name] = nn.Identity()

    def check_targets(self, backbone: nn.Module, config: LoraConfig, targets: list[str]) -> None:
        _check_patterns(config, targets)
        _check_ranks(backbone, config, targets)


def _forward(layer: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply an adapted layer, with the second half of the adapter added in one product.

    peft multiplies by B, scales and adds in passes of their own over the output, which is many times as large as the
    output of A that is scaled here. Its forward is called for everything but a single active adapter.

    Args:
        layer: layer of peft.
        forward: its forward.
        x: input.
        args: further arguments, which are passed to ``forward``.
        kwargs: further arguments, which are passed to ``forward``.
    """
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A or args or kwargs:
        return forward(x, *args, **kwargs)
    b = layer.lora_B[names[0]]
    if b.bias is not None:
        return forward(x)
    out = layer.base_layer(x)
    a = layer.lora_A[names[0]](layer.lora_dropout[names[0]](x)) * layer.scaling[names[0]]
    # Autocast would convert the operands too, but not those of a layer that runs in fp32 without it.
    product = torch.addmm(out.flatten(0, -2), a.flatten(0, -2).to(out.dtype), b.weight.to(out.dtype).T)
    return product.view(out.shape)


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

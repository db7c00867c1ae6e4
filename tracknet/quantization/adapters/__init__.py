"""Adapters through peft. A new kind is one module here that subclasses ``Adapter`` and one line below."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracknet.models.components import component_by_name, is_adapted
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.adapters.base import ADAPTERS, Adapter, LoraConfig
from tracknet.quantization.adapters.lora import LoraAdapter
from tracknet.quantization.adapters.miss import MissAdapter
from tracknet.quantization.adapters.oft import OftAdapter
from tracknet.quantization.adapters.targets import match_targets, select_in_blocks
from tracknet.quantization.adapters.vera import VeraAdapter

ADAPTERS.register("LORA", LoraAdapter)
ADAPTERS.register("VERA", VeraAdapter)
ADAPTERS.register("MISS", MissAdapter)
ADAPTERS.register("OFT", OftAdapter)

__all__ = ["ADAPTERS", "Adapter", "LoraConfig", "adapted_layers", "add_adapters", "match_targets"]


def add_adapters(
    backbone: nn.Module, blocks: list[nn.Module], config: LoraConfig, rng: WindowRng, initialize: bool = True
) -> None:
    """Add adapters to linear layers of the backbone, and freeze the rest (except biases, if so configured).

    Args:
        backbone: transformers model, quantized or not; changed in place.
        blocks: its blocks that get adapters.
        config: kind, targets and settings of the adapters.
        rng: source of dropout by window.
        initialize: ``False`` where a checkpoint brings all values, so that no expensive initialization is computed.

    Raises:
        UserError: a target or pattern matches no linear layer; the message lists the names that exist.
    """
    adapter = ADAPTERS.lookup(config.peft_type)()
    targets = match_targets(backbone, config.target_modules)
    targets = select_in_blocks(backbone, blocks, targets)
    adapter.check_targets(backbone, config, targets)
    adapter.inject(backbone, adapter.peft_config(config, targets, initialize))
    layers = adapted_layers(backbone)
    for layer in layers.values():
        # peft would cast the input of each layer to the adapters' fp32, a copy of 4 bytes a value for each of q, k and
        # v. Without that, autocast casts the small adapters instead, and backward keeps one input that they share.
        layer.cast_input_dtype_enabled = False
    adapter.prepare(layers, config, rng)
    components = component_by_name(backbone)
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if components[name] == "adapters" and tensor.is_floating_point():
            # peft gives adapters the dtype of the base, of 4-bit codes that of their storage; a 16-bit weight would
            # round small updates away.
            tensor.data = tensor.data.float()


def adapted_layers(backbone: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in backbone.named_modules() if is_adapted(module)}

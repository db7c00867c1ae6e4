"""Component of a model that a tensor belongs to."""

from __future__ import annotations

from typing import Literal

from torch import nn

Component = Literal["decoder", "adapters", "backbone"]


def component_by_name(model: nn.Module) -> dict[str, Component]:
    """Return the component of every parameter and buffer of a model.

    A tensor is an adapter's where a layer of peft holds it beside its ``base_layer``, whatever the kind of adapter.

    Args:
        model: a ``HeatmapModel``, or a part of one under its names there.

    Returns:
        Components by full name of the tensor.
    """
    tuned = tuple(f"{name}." for name, module in model.named_modules() if is_adapted(module))
    bases = tuple(f"{prefix}base_layer." for prefix in tuned)

    def component(name: str) -> Component:
        if name.startswith("head."):
            return "decoder"
        return "adapters" if name.startswith(tuned) and not name.startswith(bases) else "backbone"

    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return {name: component(name) for name in names}


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft around a base layer. Duck-typed: a model without adapters needs no peft."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")

"""Assignment of a model's tensors to its components: decoder, adapters and backbone."""

from __future__ import annotations

from typing import Literal

from torch import nn

Component = Literal["decoder", "adapters", "backbone"]


def component_by_name(model: nn.Module) -> dict[str, Component]:
    """Return the component of every parameter and buffer of a model.

    A tensor belongs to an adapter if a layer of peft holds it outside its ``base_layer``. This covers every kind of
    adapter.

    Args:
        model: ``HeatmapModel``, or a part of it. The decoder's tensors are those below ``head.``.

    Returns:
        Components by full tensor name.
    """
    # Tensors below `<layer>.base_layer.` are original weights; all others below `<layer>.` were added by peft.
    adapted_prefixes = tuple(f"{name}." for name, module in model.named_modules() if is_adapted(module))
    base_prefixes = tuple(f"{prefix}base_layer." for prefix in adapted_prefixes)

    def component(name: str) -> Component:
        if name.startswith("head."):
            return "decoder"
        return "adapters" if name.startswith(adapted_prefixes) and not name.startswith(base_prefixes) else "backbone"

    # A tensor that several modules share is listed under each of its names.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return {name: component(name) for name in names}


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a layer of peft around a base layer.

    The check is by attributes, so that a model without adapters does not require peft.
    """
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")

"""Selection of the linear layers of a backbone that get an adapter."""

from __future__ import annotations

import re

from torch import nn

from tracknet.errors import UserError, nearest

# Names of the same projections in other model families: a target on the left also matches those on the right.
ALIASES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "dense": ("o_proj",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("dense",),
    "fc1": ("up_proj", "weights_in"),
    "fc2": ("down_proj", "weights_out"),
    "pwconv1": ("pointwise_conv1",),
    "pwconv2": ("pointwise_conv2",),
}


def match_targets(backbone: nn.Module, wanted: list[str]) -> list[str]:
    """Resolve target names to the full names of linear layers.

    Args:
        backbone: transformers model.
        wanted: full names, or their last parts; empty for every linear layer.

    Returns:
        Full names in the order of the model, each once.

    Raises:
        UserError: if a target matches no layer; the message lists the names that exist.
    """
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not wanted:
        return layers
    selected: list[str] = []
    for target in wanted:
        names = (target, *ALIASES.get(target, ()))
        # A target matches the end of a name, from a dot on, and so do its aliases.
        matched = [layer for layer in layers if any(layer == n or layer.endswith(f".{n}") for n in names)]
        if not matched:
            # Suggest names that exist, and names whose alias exists.
            kinds = layer_kinds(layers)
            aliased = [name for name, aliases in ALIASES.items() if not {*aliases}.isdisjoint(kinds)]
            raise UserError(
                f"training.lora.target_modules: '{target}' matches no linear layer of the backbone; their names are "
                f"{', '.join(kinds)}{nearest(target, kinds + aliased)}"
            )
        selected += matched
    return sorted(set(selected), key=layers.index)


def layer_kinds(layers: list[str]) -> list[str]:
    """Return the distinct last parts of layer names, except names that are only a number, for messages."""
    return sorted({layer.rsplit(".", 1)[-1] for layer in layers if not re.fullmatch(r"\d+", layer)})


def select_in_blocks(backbone: nn.Module, blocks: list[nn.Module], targets: list[str]) -> list[str]:
    """Return the targets that are in certain blocks.

    Args:
        backbone: transformers model.
        blocks: blocks of the model.
        targets: full names of layers.

    Raises:
        UserError: if no target is in the blocks.
    """
    # Compare modules rather than names, which differ between model families.
    modules = {id(module) for block in blocks for module in block.modules()}
    kept = [name for name in targets if id(backbone.get_submodule(name)) in modules]
    if not kept:
        raise UserError(
            f"training.train_last_blocks={len(blocks)}: none of training.lora.target_modules is in the last"
            f" {len(blocks)} blocks."
        )
    return kept


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of ``rank_pattern`` or ``alpha_pattern`` matches a layer.

    As in peft, the regular expression is matched against the end of the name, from a dot on.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None

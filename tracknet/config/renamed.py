"""Renamed settings: their old names are accepted for two releases, with a warning."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable

from tracknet.errors import UserError

logger = logging.getLogger(__name__)

LAST_VERSION = "0.3"  # last version that accepts the old names
RENAMED = {  # current name by old name
    "data.csv.normalised": "data.csv.normalized",
    "evaluation.subcell": "evaluation.subpixel",
    "training.backbone_trains": "training.trainable",
    "training.lora.layers": "training.train_last_blocks",
    "training.quantization.int8_kernel": "training.int8_kernel",
}


def _to_number_of_blocks(value: object) -> object:
    """Convert ``last-4`` to ``4``; ``null`` stays."""
    if value is None or value == "null":
        return value
    match = re.fullmatch(r"last-([1-9]\d*)", str(value))
    if match is None:
        raise UserError(
            f"training.lora.layers={value}: use training.train_last_blocks=<k>, such as 4, or null for all blocks."
        )
    return match[1]


# Conversion of the value, by old name; other values stay the same.
CONVERSIONS: dict[str, Callable[[object], object]] = {"training.lora.layers": _to_number_of_blocks}


def current_override(override: str, warn: bool = True) -> str:
    """Return a ``section.key=value`` argument with the current name of its key.

    Args:
        override: argument with a current or an old name.
        warn: whether to log a warning about an old name.
    """
    key, equals, value = override.partition("=")
    if key not in RENAMED:
        return override
    if warn:
        _warn([key], f"'{override}'")
    return f"{RENAMED[key]}{equals}{_convert(key, value)}"


def rename_keys(tree: dict, source: str) -> dict:
    """Replace old names of settings by their current names.

    Args:
        tree: settings as read from YAML, with sections as dicts; it is not modified.
        source: file of the settings, for messages.

    Returns:
        The settings under their current names.

    Raises:
        UserError: if a setting is given under both names.
    """
    found = [key for key in RENAMED if _has(tree, key)]
    if not found:
        return tree
    _warn(found, source)
    tree = copy.deepcopy(tree)
    # The new name may be in another section, which may not exist yet.
    for key in found:
        value, new = _pop(tree, key), RENAMED[key]
        if _has(tree, new):
            raise UserError(f"{source}: {key} is the old name of {new}, and both are given: remove {key}.")
        *sections, name = new.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = _convert(key, value)
    return tree


def _convert(key: str, value: object) -> object:
    """Return the value of a setting under its current name."""
    return CONVERSIONS[key](value) if key in CONVERSIONS else value


def _warn(keys: list[str], source: str) -> None:
    """Log one warning about all old names in a source."""
    pairs = ", ".join(f"{key} is now {RENAMED[key]}" for key in keys)
    logger.warning(f"{source}: {pairs}. Old names are accepted up to version {LAST_VERSION}.")


def _has(tree: object, key: str) -> bool:
    """Return whether a nested dict contains a key such as ``data.csv.x``."""
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _pop(tree: dict, key: str) -> object:
    """Remove a key from a nested dict and return its value."""
    *sections, name = key.split(".")
    for part in sections:
        tree = tree[part]
    return tree.pop(name)

"""Settings that had another name: read for two releases, with a warning, wherever they stand."""

from __future__ import annotations

import copy
import logging

from tracknet.errors import UserError

logger = logging.getLogger(__name__)

LAST_VERSION = "0.3"  # that reads the names on the left
RENAMED = {
    "data.csv.normalised": "data.csv.normalized",
    "evaluation.subcell": "evaluation.subpixel",
    "training.backbone_trains": "training.trainable",
    "training.quantization.int8_kernel": "training.int8_kernel",
}


def current_override(override: str, warn: bool = True) -> str:
    """Return a ``section.key=value`` argument under today's name of its key."""
    key, equals, value = override.partition("=")
    if key not in RENAMED:
        return override
    if warn:
        _warn([key], f"'{override}'")
    return f"{RENAMED[key]}{equals}{value}"


def rename_keys(tree: dict, source: str) -> dict:
    """Move settings to today's names.

    Args:
        tree: settings as read from YAML, sections as dicts; left as it is.
        source: file that they come from, for messages.

    Returns:
        The same settings, old names replaced.

    Raises:
        UserError: a setting is given under both names.
    """
    found = [key for key in RENAMED if _has(tree, key)]
    if not found:
        return tree
    _warn(found, source)
    tree = copy.deepcopy(tree)
    for key in found:
        value, new = _pop(tree, key), RENAMED[key]
        if _has(tree, new):
            raise UserError(f"{source}: {key} is the old name of {new}, and both are given: leave {key} out.")
        *sections, name = new.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def _warn(keys: list[str], source: str) -> None:
    pairs = ", ".join(f"{key} is now {RENAMED[key]}" for key in keys)
    logger.warning(f"{source}: {pairs}. The old name is read up to version {LAST_VERSION}.")


def _has(tree: object, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _pop(tree: dict, key: str) -> object:
    *sections, name = key.split(".")
    for part in sections:
        tree = tree[part]
    return tree.pop(name)

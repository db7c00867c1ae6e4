"""Renamed settings and values: the old ones are accepted for two releases, with a warning."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

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
RENAMED_VALUES = {"data.cvat.unmarked": {"unlabelled": "unlabeled"}}  # current value by old value, by setting


def current_override(override: str, warn: bool = True) -> str:
    """Return a ``section.key=value`` argument with the current name of its key, and the current value.

    Args:
        override: argument with a current or an old name.
        warn: whether to log a warning about an old name.
    """
    key, equals, value = override.partition("=")
    if key in RENAMED:
        current = f"{RENAMED[key]}{equals}{_convert(key, value)}"
        change = f"{key} is now {RENAMED[key]}"
    elif value in RENAMED_VALUES.get(key, {}):
        current = f"{key}={RENAMED_VALUES[key][value]}"
        change = f"{value} is now {RENAMED_VALUES[key][value]}"
    else:
        return override
    if warn:
        _warn([change], f"'{override}'")
    return current


def rename_keys(tree: dict, source: str) -> dict:
    """Replace old names and values of settings by the current ones.

    Args:
        tree: settings as read from YAML, with sections as dicts; it is not modified.
        source: file of the settings, for messages.

    Raises:
        UserError: if a setting is given under both names.
    """
    tree = copy.deepcopy(tree)
    changes = _rename(tree, "", source)
    # The datasets of `data.mix` have the settings of the data section.
    data = tree.get("data")
    mix = data.get("mix") if isinstance(data, dict) else None
    for item in mix if isinstance(mix, list) else ():
        changes += _rename(item, "data.", source)
    if changes:
        _warn(list(dict.fromkeys(changes)), source)
    return tree


def _rename(tree: Any, prefix: str, source: str) -> list[str]:
    """Rename the settings of a tree in place, and return the changes for a message.

    Args:
        tree: settings as nested dicts.
        prefix: full name of the section that the tree is, with a dot; empty for the whole configuration.
        source: file of the settings, for messages.
    """
    changes = []
    for old, new in RENAMED.items():
        found = _find(tree, old.removeprefix(prefix)) if old.startswith(prefix) else None
        if found is None:
            continue
        if _find(tree, new.removeprefix(prefix)) is not None:
            raise UserError(f"{source}: {old} is the old name of {new}, and both are given: remove {old}.")
        section, name = found
        value = section.pop(name)
        # The new name may be in another section, which may not exist yet.
        *sections, name = new.removeprefix(prefix).split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = _convert(old, value)
        changes.append(f"{old} is now {new}")
    for key, values in RENAMED_VALUES.items():
        found = _find(tree, key.removeprefix(prefix)) if key.startswith(prefix) else None
        if found is not None:
            section, name = found
            old_value = section[name]
            if isinstance(old_value, str) and old_value in values:
                section[name] = values[old_value]
                changes.append(f"{key}={old_value} is now {values[old_value]}")
    return changes


def _convert(key: str, value: object) -> object:
    """Return the value of a setting under its current name, given its old name: ``last-4`` becomes ``4``."""
    if key != "training.lora.layers" or value is None or value == "null":
        return value
    match = re.fullmatch(r"last-([1-9]\d*)", str(value))
    if match is None:
        raise UserError(f"{key}={value}: use training.train_last_blocks=<k>, such as 4, or null for all blocks.")
    return int(match[1])


def _warn(changes: list[str], source: str) -> None:
    """Log one warning about all old names in a source."""
    logger.warning(f"{source}: {', '.join(changes)}. Old names are accepted up to version {LAST_VERSION}.")


def _find(tree: object, key: str) -> tuple[dict, str] | None:
    """Return the section that contains a key such as ``data.csv.x``, and the last part of the key, if there is one."""
    *sections, name = key.split(".")
    for part in sections:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return (tree, name) if isinstance(tree, dict) and name in tree else None

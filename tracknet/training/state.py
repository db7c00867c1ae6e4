"""The ``state.json`` of a checkpoint: read and checked at this one boundary, before anything is built from it.

A run may come from a stranger. So every value that is used later has its type and bounds checked here, and the files
beside it are compared with the hashes that were taken when they were saved.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracknet.errors import UserError
from tracknet.files import hash_file, read_json

FORMAT = 2
MAX_BYTES = 50_000_000
_REQUIRED = ("transformers", "backbone", "from_base_sha256")
_REQUIRED_TO_RESUME = ("progress", "best", "scaler", "optimizer")

Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    # Compared, not converted: JSON knows whole numbers that no float holds.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 4096


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(v) for v in value.values())


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


# What each entry is, by its path; an entry that is not there is not looked at.
_CHECKS: dict[str, tuple[Check, str]] = {
    "transformers": (_is_text, "a version"),
    "from_base_sha256": (_or_none(_is_hash), "a SHA-256 or null"),
    "sha256": (_dict_of(_is_hash), "SHA-256 by file"),
    "stored_as": (lambda value: value == "bf16", "bf16"),
    "progress": (_dict_of(_is_count), "numbers of steps"),
    "best": (_dict_of(_or_none(_is_number)), "scores by name"),
    "scaler": (_or_none(_dict_of(_is_number)), "numbers by name, or null"),
    "micro_batch": (_or_none(_is_dict), "a section or null"),
    "micro_batch.size": (lambda value: _is_count(value) and value > 0, "a number of windows"),
    "micro_batch.failed": (_or_none(_is_count), "a number of windows or null"),
    "micro_batch.clean": (_is_count, "a number of steps"),
    "micro_batch.setting": (_is_text, "text"),
    "optimizer": (_is_dict, "a section"),
    "optimizer.id": (_is_text, "text"),
    "optimizer.groups": (lambda value: isinstance(value, list) and all(map(_is_dict, value)), "a list of groups"),
    "optimizer.values": (_dict_of(_is_dict), "sections by parameter"),
    "backbone": (_or_none(_is_dict), "a section or null"),
    "backbone.architecture": (_is_dict, "a section"),
    "backbone.mean": (_is_rgb, "three numbers"),
    "backbone.std": (lambda value: _is_rgb(value) and min(value) > 0, "three numbers above 0"),
    "backbone.base": (_or_none(_is_dict), "a section or null"),
    "backbone.base.name": (_is_text, "a name"),
    "backbone.base.revision": (_or_none(_is_text), "a name or null"),
    "backbone.base.sha256": (_is_hash, "a SHA-256"),
}
_INNER = {
    "backbone": ("architecture", "mean", "std", "base"),
    "backbone.base": ("name", "revision", "sha256"),
    "micro_batch": ("size", "failed", "clean", "setting"),
    "optimizer": ("groups", "values"),
}


def load_state(folder: Path) -> dict:
    """Read the JSON of a checkpoint.

    Raises:
        UserError: it is damaged, of another format, or an entry is missing or of another kind; names the entry.
    """
    path = folder / "state.json"
    state = read_json(path, MAX_BYTES)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{folder}: is of format {found!r}, this version reads format {FORMAT}.")
    needed = _REQUIRED + (_REQUIRED_TO_RESUME if (folder / "optimizer.safetensors").exists() else ())
    missing = [key for key in needed if key not in state]
    for key, (check, expected) in _CHECKS.items():
        found, is_there = _find(state, key)
        if is_there and not check(found):
            raise UserError(f"{path}: damaged ({key} is {json.dumps(found)[:60]}, expected {expected}).")
        if is_there and found is not None:
            missing += [f"{key}.{inner}" for inner in _INNER.get(key, ()) if inner not in found]
    if missing:
        raise UserError(f"{path}: damaged ({', '.join(missing)} missing).")
    return state


def _find(state: dict, key: str) -> tuple[Any, bool]:
    value: Any = state
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return None, False
        value = value[name]
    return value, True


def check_hash(path: Path, state: dict) -> bool:
    """Compare a file of a checkpoint with the hash that was taken when it was saved.

    Returns:
        Whether the state, of an older version, holds none.

    Raises:
        UserError: it is another file, or a damaged one.
    """
    wanted = state.get("sha256", {}).get(path.name)
    if wanted is None:
        return True
    try:
        found = hash_file(path)
    except OSError as error:
        raise UserError(f"{path}: damaged or missing ({error.strerror}).") from error
    if found != wanted:
        raise UserError(
            f"{path}: damaged, or not the file that was saved with the state.json beside it (SHA-256 {found[:12]}…,"
            f" saved as {wanted[:12]}…). Put back a copy, or take the run's other checkpoint."
        )
    return False

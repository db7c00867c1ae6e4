"""Reading and validation of ``state.json``, the description of a checkpoint.

A run may come from an untrusted source. Therefore the type and the range of every value that is used later are checked
here, before anything is built from it, and the other files of the checkpoint are compared with their saved hashes.
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

FORMAT = 2  # version of the checkpoint format
MAX_BYTES = 50_000_000  # maximum size of state.json
_REQUIRED = ("transformers", "backbone", "from_base_sha256")  # entries of every checkpoint
_REQUIRED_TO_RESUME = ("progress", "best", "scaler", "optimizer")  # entries of a checkpoint with an optimizer

Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    # `type` rather than `isinstance`: a bool is an int, too. Up to 2^53, a float represents every integer.
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    # Compared without conversion: JSON allows integers that are too large for a float. NaN fails every comparison.
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


# Check of each entry and description of a valid value, by the path of the entry. Absent entries are not checked.
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
_INNER = {  # keys that a section must contain, if the section is present
    "backbone": ("architecture", "mean", "std", "base"),
    "backbone.base": ("name", "revision", "sha256"),
    "micro_batch": ("size", "failed", "clean", "setting"),
    "optimizer": ("groups", "values"),
}


def load_state(folder: Path) -> dict:
    """Read and validate the ``state.json`` of a checkpoint.

    Args:
        folder: folder of the checkpoint.

    Returns:
        Content of the file.

    Raises:
        UserError: if the file is damaged or has another format, or an entry is missing or invalid; the message names
            the entry.
    """
    path = folder / "state.json"
    state = read_json(path, MAX_BYTES)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{folder}: has checkpoint format {found!r}, but this version reads format {FORMAT}.")
    needed = _REQUIRED + (_REQUIRED_TO_RESUME if (folder / "optimizer.safetensors").exists() else ())
    # Invalid entries are reported one at a time, missing ones together at the end.
    missing = [key for key in needed if key not in state]
    for key, (check, expected) in _CHECKS.items():
        found, is_present = _find(state, key)
        if is_present and not check(found):
            raise UserError(f"{path}: damaged ({key} is {json.dumps(found)[:60]}, expected {expected}).")
        if is_present and found is not None:
            missing += [f"{key}.{inner}" for inner in _INNER.get(key, ()) if inner not in found]
    if missing:
        raise UserError(f"{path}: damaged ({', '.join(missing)} missing).")
    return state


def _find(state: dict, key: str) -> tuple[Any, bool]:
    """Return the value of an entry by its path, and whether the entry is present."""
    value: Any = state
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return None, False
        value = value[name]
    return value, True


def check_hash(path: Path, state: dict) -> bool:
    """Compare a file of a checkpoint with its saved hash.

    Args:
        path: file of the checkpoint.
        state: content of its ``state.json``.

    Returns:
        Whether the state contains no hash of the file, because an older version has saved it.

    Raises:
        UserError: if the file differs from the one that was saved, or cannot be read.
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
            f"{path}: damaged, or not the file that was saved with this state.json (SHA-256 {found[:12]}…, expected"
            f" {wanted[:12]}…). Restore the file from a copy, or use the run's other checkpoint."
        )
    return False

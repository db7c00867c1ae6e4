"""Saving and validated loading of an optimizer's state: tensors in safetensors, other values in JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracknet.errors import UserError
from tracknet.training.state import check_hash

FILE = "optimizer.safetensors"
BLOCK = 256  # number of consecutive values that share a scale in bitsandbytes' 8-bit state
LEVELS = 256  # number of entries in the code book of that state, one per value of a byte
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of tensors by name


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, id: str) -> dict:
    """Write the tensors of an optimizer's state to a file.

    Args:
        path: file to write.
        optimizer: optimizer to save.
        id: unique identifier of this checkpoint, stored with both the tensors and the other values.

    Returns:
        The other values, JSON-serializable, for ``state.json``.
    """
    arrays, plain = _split(optimizer.state_dict())
    # The id detects a file of another checkpoint, whose tensors may have the same names and shapes.
    save_file(arrays, path, {"id": id})
    return {**plain, "id": id}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore the state that ``save_optimizer`` has saved.

    Settings of the parameter groups, such as learning rates, are not restored: they come from the configuration.

    Args:
        folder: folder of the checkpoint.
        optimizer: optimizer of the same kind over the same parameters.
        state: content of ``state.json``.

    Raises:
        UserError: if the file is damaged, belongs to another checkpoint or does not match the optimizer. Without this
            check, update kernels would read a tensor of the wrong shape or dtype beyond its end.
    """
    # Read the file and check that it belongs to this checkpoint.
    path, plain = folder / FILE, state["optimizer"]
    check_hash(path, state)
    try:
        arrays = load_file(path)
        with safe_open(path, "pt") as file:
            id = (file.metadata() or {}).get("id")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error
    if id != plain.get("id"):
        raise UserError(
            f"{path}: belongs to another checkpoint than this state.json; restore the file that was saved with it."
        )

    # Check it against the optimizer: the same parameters in the same groups, and valid tensors for each of them.
    groups = optimizer.state_dict()["param_groups"]
    if [g.get("params") for g in plain["groups"]] != [g["params"] for g in groups]:
        raise UserError(f"{path}: was saved by an optimizer with other parameters than this run's configuration gives.")
    if problems := list(_problems(arrays, plain["values"], optimizer)):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: does not match the optimizer of the run: {'; '.join(problems[:3])}{more}.")

    # Restore the state, with the groups of the new optimizer.
    optimizer.load_state_dict({"state": _join(arrays, plain["values"]), "param_groups": groups})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """Move the loaded state of a paged optimizer of bitsandbytes to pageable memory."""
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            # bitsandbytes loads the state to ordinary GPU memory, which cannot be paged out. `get_state_buffer` returns
            # a paged buffer for every tensor that is large enough to be paged.
            buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = buffer.copy_(state[key].view_as(buffer))


def _problems(arrays: dict[str, Tensor], values: dict, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Yield a description of each mismatch between a saved state and an optimizer.

    A parameter may have no state, because it is created with the first gradient, but it may not have a part of it.

    Args:
        arrays: tensors from the file, by ``index/key``.
        values: other values from ``state.json``, by parameter index.
        optimizer: optimizer to restore.
    """
    # Tensors that the file must contain: the complete state of each parameter that has any.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected: Shapes = {}
    for index, parameter in enumerate(parameters):
        parameter_state = {f"{index}/{key}": shape for key, shape in expected_state(optimizer, parameter).items()}
        if any(name.partition("/")[0] == str(index) for name in arrays):
            expected |= parameter_state
    for name in sorted(expected.keys() - {_without_wrapping(n) for n in arrays}):
        yield f"{name} is missing"
    # Tensors that it does contain.
    for name, tensor in arrays.items():
        plain_name = _without_wrapping(name)
        if plain_name not in expected:
            yield f"{name} is not part of its state"
        elif (tuple(tensor.shape), tensor.dtype) != expected[plain_name]:
            shape, dtype = expected[plain_name]
            yield f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            yield f"{name} contains values that are not finite"
        elif plain_name.endswith(("/exp_avg_sq", "/step", "/absmax1", "/absmax2")) and tensor.lt(0).any():
            yield f"{name} contains negative values"
    # Values in JSON: only the step counters that bitsandbytes keeps as integers.
    for index, parameter_values in values.items():
        if not index.isdecimal() or int(index) >= len(parameters):
            yield f"parameter {index} does not exist"
        for key, value in _flatten(parameter_values):
            if key.rpartition("/")[2] != "step" or type(value) is not int or not 0 <= value < 2**31:
                yield f"{index}/{key} is {str(value)[:40]}, expected a number of steps"


def expected_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Shapes:
    """Return shape and dtype of each tensor that an AdamW of torch or bitsandbytes keeps for a parameter, by key."""
    shape = tuple(parameter.shape)
    # torch: a step counter and two moments.
    if not hasattr(optimizer, "get_config"):
        moments = {key: (shape, parameter.dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": ((), torch.float32), **moments}
    # bitsandbytes: two moments, in 8 bits or, for small parameters, in fp32. The step counter is a plain int.
    group, index = next(
        (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p is parameter
    )
    config = optimizer.get_config(group, index, optimizer.param_groups[group])
    if config["optim_bits"] != 8 or parameter.numel() < config["min_8bit_size"]:
        return {key: (shape, torch.float32) for key in ("state1", "state2")}
    # In 8 bits each moment has codes, a code book, and one scale (absolute maximum) per block.
    blocks = -(-parameter.numel() // BLOCK)
    return {
        **{key: (shape, torch.uint8) for key in ("state1", "state2")},
        **{key: ((LEVELS,), torch.float32) for key in ("qmap1", "qmap2")},
        **{key: ((blocks,), torch.float32) for key in ("absmax1", "absmax2")},
    }


def _without_wrapping(name: str) -> str:
    """Return ``index/key`` without the level in between that bitsandbytes adds to its state."""
    parts = name.split("/")
    return f"{parts[0]}/{parts[-1]}"


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested dicts, with their keys joined by slashes."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _split(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Split an optimizer's state into tensors and JSON-serializable values.

    Args:
        state: result of ``optimizer.state_dict()``.

    Returns:
        Tensors on the CPU by ``index/key``, or ``index/level/key`` for bitsandbytes, which nests one level deeper; and
        ``groups`` and ``values`` for JSON.
    """
    arrays: dict[str, Tensor] = {}

    def take(values: dict, prefix: str) -> dict:
        plain = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                # Cloned, because safetensors refuses tensors that share memory.
                arrays[f"{prefix}{key}"] = value.detach().contiguous().cpu().clone()
            else:
                plain[str(key)] = take(value, f"{prefix}{key}/") if isinstance(value, dict) else value
        return plain

    return arrays, {"groups": state["param_groups"], "values": take(state["state"], "")}


def _join(arrays: dict[str, Tensor], plain: dict) -> dict[int, dict]:
    """Rebuild the nested state by parameter index; the inverse of ``_split``."""
    state: dict[int, dict] = {}
    for key, value in itertools.chain(_flatten(plain), arrays.items()):
        index, *path, last = key.split("/")
        target = state.setdefault(int(index), {})
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return state

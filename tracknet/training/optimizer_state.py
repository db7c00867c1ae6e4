"""An optimizer's state in a checkpoint: tensors in safetensors, plain values in JSON, and nothing taken on trust."""

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
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit state
LEVELS = 256  # values that a byte of it can stand for
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, id: str) -> dict:
    """Write an optimizer's tensors; return the plain rest as JSON, under the id that both carry."""
    arrays, plain = _split(optimizer.state_dict())
    save_file(arrays, path, {"id": id})  # a file of another checkpoint may have the same shapes
    return {**plain, "id": id}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put back what ``save_optimizer`` took from an optimizer of the same settings.

    Learning rates and their like stay those of the configuration.

    Raises:
        UserError: the file is damaged, of another checkpoint, or not of this optimizer: a tensor of another name, shape
            or dtype would be read beyond its end by the kernels that update.
    """
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
            f"{path}: is of another checkpoint than the state.json beside it; put back the file that was saved with it."
        )
    groups = optimizer.state_dict()["param_groups"]
    if [g.get("params") for g in plain["groups"]] != [g["params"] for g in groups]:
        raise UserError(f"{path}: is of an optimizer over other parameters than this run's configuration makes.")
    if problems := list(_problems(arrays, plain["values"], optimizer)):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: does not fit the optimizer of the run: {'; '.join(problems[:3])}{more}.")
    optimizer.load_state_dict({"state": _join(arrays, plain["values"]), "param_groups": groups})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            # bitsandbytes loads into plain memory of the GPU, which cannot be paged out; where it pages at all, make
            # its buffer.
            buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = buffer.copy_(state[key].view_as(buffer))


def _problems(arrays: dict[str, Tensor], values: dict, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Yield what of a file does not fit. A parameter may lack its state, which is made with its first gradient, but not
    a part of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected: Shapes = {}
    for index, parameter in enumerate(parameters):
        of_parameter = {f"{index}/{key}": shape for key, shape in expected_state(optimizer, parameter).items()}
        if any(name.partition("/")[0] == str(index) for name in arrays):
            expected |= of_parameter
    for name in sorted(expected.keys() - {_without_wrapping(n) for n in arrays}):
        yield f"{name} is missing"
    for name, tensor in arrays.items():
        plain_name = _without_wrapping(name)
        if plain_name not in expected:
            yield f"{name} is not part of it"
        elif (tuple(tensor.shape), tensor.dtype) != expected[plain_name]:
            shape, dtype = expected[plain_name]
            yield f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            yield f"{name} holds values that are not finite"
        elif plain_name.endswith(("/exp_avg_sq", "/step", "/absmax1", "/absmax2")) and tensor.lt(0).any():
            yield f"{name} holds negative values"
    for index, of_parameter in values.items():
        if not index.isdecimal() or int(index) >= len(parameters):
            yield f"there is no parameter {index}"
        for key, value in _flatten(of_parameter):
            if key.rpartition("/")[2] != "step" or type(value) is not int or not 0 <= value < 2**31:
                yield f"{index}/{key} is {str(value)[:40]}, expected a number of steps"


def expected_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Shapes:
    """Return shape and dtype of each tensor that an AdamW keeps for a parameter, torch's or bitsandbytes'."""
    shape = tuple(parameter.shape)
    if not hasattr(optimizer, "get_config"):
        moments = {key: (shape, parameter.dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": ((), torch.float32), **moments}
    group, index = next(
        (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p is parameter
    )
    config = optimizer.get_config(group, index, optimizer.param_groups[group])
    if config["optim_bits"] != 8 or parameter.numel() < config["min_8bit_size"]:
        return {key: (shape, torch.float32) for key in ("state1", "state2")}
    blocks = -(-parameter.numel() // BLOCK)
    return {
        **{key: (shape, torch.uint8) for key in ("state1", "state2")},
        **{key: ((LEVELS,), torch.float32) for key in ("qmap1", "qmap2")},
        **{key: ((blocks,), torch.float32) for key in ("absmax1", "absmax2")},
    }


def _without_wrapping(name: str) -> str:
    """Drop the level that bitsandbytes wraps its state in."""
    parts = name.split("/")
    return f"{parts[0]}/{parts[-1]}"


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _split(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Separate an optimizer's state into tensors by ``index/key`` and plain JSON (bitsandbytes nests one level
    deeper)."""
    arrays: dict[str, Tensor] = {}

    def take(values: dict, prefix: str) -> dict:
        plain = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                arrays[f"{prefix}{key}"] = value.detach().contiguous().cpu().clone()
            else:
                plain[str(key)] = take(value, f"{prefix}{key}/") if isinstance(value, dict) else value
        return plain

    return arrays, {"groups": state["param_groups"], "values": take(state["state"], "")}


def _join(arrays: dict[str, Tensor], plain: dict) -> dict[int, dict]:
    state: dict[int, dict] = {}
    for key, value in itertools.chain(_flatten(plain), arrays.items()):
        index, *path, last = key.split("/")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return state

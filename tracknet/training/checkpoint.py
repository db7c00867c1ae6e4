"""A run on disk: ``config.yaml``, ``last/``, ``best/``, ``metrics.json``, ``report/``.

A checkpoint is a folder of safetensors and one small JSON; nothing in it is pickled. It holds what was trained, and names the
base that the frozen rest comes from by id, revision and hash; or, self-contained, it holds every tensor, quantised ones as they are
stored, so that loading needs neither the hub nor the original backbone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.models.pretrained import describe_backbone
from tracknet.quantization.storage import Storage, divide

FORMAT = 2
REQUIRED_OF_BACKBONE = ("architecture", "mean", "std", "base")
REQUIRED = ("transformers", "backbone", "from_base_sha256")  # in state.json
REQUIRED_TO_RESUME = ("progress", "best", "scaler", "optimizer")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path, model: HeatmapModel, storage: Storage, state: dict, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        folder: ``last`` or ``best`` of a run; what it held before is replaced once the new one is complete.
        model: its tensors are saved, but for those that come from its base.
        storage: says which these are.
        state: plain JSON that comes back from ``load_state``.
        optimizer: saved along, for resuming.
    """
    state = {**state, "backbone": None, "from_base_sha256": storage.sha256}
    if model.backbone is not None:
        state["backbone"] = describe_backbone(model.backbone)
        if not storage.from_base:
            state["backbone"]["base"] = None
    for left in folder.parent.glob(f".{folder.name}.part-*"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.part-"))
    try:
        tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()
                   if name not in storage.from_base}  # fmt: skip
        save_file(tensors, work / "model.safetensors")
        if optimizer is not None:
            arrays, plain = _split(optimizer.state_dict())
            plain["id"] = uuid.uuid4().hex  # a file of another checkpoint may have the same shapes
            save_file(arrays, work / "optimizer.safetensors", {"id": plain["id"]})
            state = {**state, "optimizer": plain}
        (work / "state.json").write_text(
            json.dumps({"format": FORMAT, "transformers": transformers.__version__, **state}) + "\n", encoding="utf-8"
        )
        for path in (work, *work.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary folders are for their owner only
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(work, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def find_checkpoint(run: Path, name: str, said: str = "--run ") -> Path:
    """Return the folder of a run's checkpoint.

    Args:
        run: folder of the run.
        name: ``best`` or ``last``.
        said: what the user named the run by, for messages.

    Raises:
        UserError: it is no run, or has no such checkpoint.
    """
    if not (run / "config.yaml").is_file():
        hint = f"; did you mean {run.parent}?" if (run.parent / "config.yaml").is_file() else ""
        raise UserError(
            f"{said}{run}: no config.yaml there; it takes the folder of a run, <output-dir>/runs/<run_id>{hint}"
        )
    for folder in (run / name, run / f"{name}.old"):  # .old: the process was killed between two renames
        if (folder / "state.json").is_file():
            return folder
    there = [n for n in ("best", "last") if (run / n / "state.json").is_file()]
    option = f": --checkpoint {there[0]}" if there and said == "--run " else ""
    raise UserError(f"{said}{run}: has no checkpoint '{name}'; " + (f"it has '{there[0]}'{option}." if there
                    else "the run ended before it saved one."))  # fmt: skip


def load_state(folder: Path) -> dict:
    """Read the JSON of a checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / 'state.json'}: damaged ({error}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{folder}: is of format {found}, this version reads format {FORMAT}.")
    needed = REQUIRED + (REQUIRED_TO_RESUME if (folder / "optimizer.safetensors").exists() else ())
    missing = [key for key in needed if key not in state]
    if isinstance(backbone := state.get("backbone"), dict):
        missing += [f"backbone.{key}" for key in REQUIRED_OF_BACKBONE if key not in backbone]
    if missing:
        raise UserError(f"{folder / 'state.json'}: damaged ({', '.join(missing)} missing).")
    return state


def load_weights(folder: Path, model: HeatmapModel) -> list[str]:
    """Load what a checkpoint holds into a model of the same settings, whose base weights are in place if it names a base.

    Returns:
        Lines for the user.

    Raises:
        UserError: a tensor is missing, surplus, or of another shape or dtype, or the file is damaged. The model is unchanged.
    """
    state, tensors = load_state(folder), _load_tensors(folder / "model.safetensors")
    storage = divide(model, self_contained=not (state["backbone"] and state["backbone"]["base"]))
    own = model.state_dict()
    wanted = own.keys() - storage.from_base
    if state.get("stored_as") == "bf16":  # a merged model at half the size; computing is another matter
        tensors = {n: t.float() if n in own and own[n].dtype == torch.float32 else t for n, t in tensors.items()}
    problems = [f"{n} is missing" for n in sorted(wanted - tensors.keys())]
    problems += [f"{n} is not part of the model" for n in sorted(tensors.keys() - wanted)]
    problems += [f"{n} is {list(t.shape)} {t.dtype}, expected {list(own[n].shape)} {own[n].dtype}"
                 for n, t in tensors.items() if n in own and (t.shape, t.dtype) != (own[n].shape, own[n].dtype)]  # fmt: skip
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        version = state["transformers"]
        if version != transformers.__version__:
            more += f" (saved with transformers {version}, this is {transformers.__version__}: layers may be named otherwise)"
        raise UserError(f"{folder}: does not fit the model of its config.yaml: {'; '.join(problems[:3])}{more}.")
    model.load_state_dict(tensors, strict=False)  # exactly the wanted ones, as just checked
    if storage.sha256 != state.get("from_base_sha256"):
        return ["The base's weights are those of training, but this machine or version quantises them a little differently: "
                "outputs may differ in the last digits. A run trained with --self-contained carries its codes."]  # fmt: skip
    return []


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, plain: dict) -> None:
    """Put back what ``save_checkpoint`` took from the optimizer.

    Raises:
        UserError: the file is damaged, or of another checkpoint.
    """
    path = folder / "optimizer.safetensors"
    arrays = _load_tensors(path)
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("id") != plain.get("id"):
            raise UserError(
                f"{path}: is of another checkpoint than the state.json beside it; put back the file that was saved with it."
            )
    optimizer.load_state_dict(_join(arrays, plain))
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            # bitsandbytes loads into plain memory of the GPU, which cannot be paged out; where it pages at all, make its buffer.
            buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = buffer.copy_(state[key].view_as(buffer))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error


def _split(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Separate an optimizer's state into tensors by ``index/key`` and plain JSON (bitsandbytes nests one level deeper)."""
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


def _join(arrays: dict[str, Tensor], plain: dict) -> dict:
    state = json.loads(json.dumps(plain["values"]))
    for name, tensor in arrays.items():
        *path, key = name.split("/")
        place = state
        for part in path:
            place = place.setdefault(part, {})
        place[key] = tensor
    return {"state": {int(index): values for index, values in state.items()}, "param_groups": plain["groups"]}

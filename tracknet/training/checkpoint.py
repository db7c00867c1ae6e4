"""A run on disk: ``config.yaml``, ``last/``, ``best/``, ``metrics.json``, ``report/``.

A checkpoint is a folder of safetensors and one small JSON; nothing in it is pickled. It holds what was trained, and
names the base that the frozen rest comes from by id, revision and hash; or, self-contained, it holds every tensor,
quantized ones as they are stored, so that loading needs neither the hub nor the original backbone.
"""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracknet.errors import UserError
from tracknet.files import hash_file, new_folder
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.models.pretrained import describe_backbone
from tracknet.quantization.storage import CheckpointSplit, split_state_dict
from tracknet.training.optimizer_state import FILE as OPTIMIZER_FILE
from tracknet.training.optimizer_state import save_optimizer
from tracknet.training.state import FORMAT, check_hash, load_state

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path,
    model: HeatmapModel,
    split: CheckpointSplit,
    state: dict,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        folder: ``last`` or ``best`` of a run; what it held before is replaced once the new one is complete.
        model: its tensors are saved, but for those that come from its base.
        split: which of its tensors these are.
        state: plain JSON that comes back from ``load_state``.
        optimizer: saved along, for resuming.
    """
    state = {**state, "backbone": None, "from_base_sha256": split.sha256}
    if model.backbone is not None:
        state["backbone"] = describe_backbone(model.backbone)
        if not split.base_keys:
            state["backbone"]["base"] = None
    with new_folder(folder, replace=True) as work:
        tensors = {
            name: t.detach().contiguous().cpu() for name, t in model.state_dict().items() if name not in split.base_keys
        }
        save_file(tensors, work / "model.safetensors")
        if optimizer is not None:
            state["optimizer"] = save_optimizer(work / OPTIMIZER_FILE, optimizer, uuid.uuid4().hex)
        hashes = {path.name: hash_file(path) for path in sorted(work.iterdir())}
        content = {"format": FORMAT, "transformers": transformers.__version__, **state, "sha256": hashes}
        (work / "state.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


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
    raise UserError(
        f"{said}{run}: has no checkpoint '{name}'; "
        + (f"it has '{there[0]}'{option}." if there else "the run ended before it saved one.")
    )


def load_weights(folder: Path, model: HeatmapModel) -> None:
    """Load what a checkpoint holds into a model of the same settings, whose base weights are in place if it names a
    base.

    Raises:
        UserError: a tensor is missing, surplus, of another shape or dtype, or not finite, or the file is damaged. The
            model is unchanged.
    """
    state = load_state(folder)
    has_no_hash = check_hash(folder / "model.safetensors", state)
    tensors = _load_tensors(folder / "model.safetensors")
    split = split_state_dict(model, self_contained=not (state["backbone"] and state["backbone"]["base"]))
    own = model.state_dict()
    wanted = own.keys() - split.base_keys
    if state.get("stored_as") == "bf16":  # a merged model at half the size; computing is another matter
        tensors = {n: t.float() if n in own and own[n].dtype == torch.float32 else t for n, t in tensors.items()}
    problems = [f"{n} is missing" for n in sorted(wanted - tensors.keys())]
    problems += [f"{n} is not part of the model" for n in sorted(tensors.keys() - wanted)]
    problems += [
        f"{n} is {list(t.shape)} {t.dtype}, expected {list(own[n].shape)} {own[n].dtype}"
        for n, t in tensors.items()
        if n in own and (t.shape, t.dtype) != (own[n].shape, own[n].dtype)
    ]
    problems += [
        f"{n} holds values that are not finite"
        for n, t in tensors.items()
        if t.is_floating_point() and not t.isfinite().all()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        version = state["transformers"]
        if version != transformers.__version__:
            more += (
                f" (saved with transformers {version}, this is {transformers.__version__}: layers may be named"
                " otherwise)"
            )
        raise UserError(f"{folder}: does not fit the model of its config.yaml: {'; '.join(problems[:3])}{more}.")
    model.load_state_dict(tensors, strict=False)  # exactly the wanted ones, as just checked
    if has_no_hash:
        logger.warning(
            f"{folder}: was saved by an older version, without hashes of its files: whether they are as they were"
            " cannot be checked."
        )
    if split.sha256 != state.get("from_base_sha256"):
        logger.warning(
            "The base's weights are those of training, but this machine or version quantizes them a little differently:"
            " outputs may differ in the last digits. A run trained with --self-contained carries its codes."
        )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error

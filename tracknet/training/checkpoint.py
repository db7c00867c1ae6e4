"""Checkpoints of a run.

The folder of a run contains ``config.yaml``, the checkpoints ``last/`` and ``best/``, ``metrics.json`` and ``report/``.
A checkpoint is a folder with safetensors files and one small JSON file, ``state.json``; nothing in it is pickled. It
contains the trained tensors and identifies the base of the frozen ones by id, revision and hash. A self-contained
checkpoint contains all tensors, quantized ones in their stored form, so that loading requires neither the hub nor the
original backbone.
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
from tracknet.quantization.storage import CheckpointSplit, split_state_dict, unique_state_dict
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
    """Write a checkpoint atomically.

    Args:
        folder: folder ``last`` or ``best`` of a run; a previous checkpoint there is replaced once the new one is
            complete.
        model: model to save.
        split: division of its tensors; those that come from the base are not saved.
        state: further entries of ``state.json``, which ``load_state`` returns; must be JSON-serializable.
        optimizer: optimizer to save, for resuming; ``None`` to save none.

    Raises:
        OSError: if the folder cannot be written.
    """
    # Description of the backbone. Without tensors from a base, the checkpoint is self-contained and names none.
    state = {**state, "backbone": None, "from_base_sha256": split.sha256}
    if model.backbone is not None:
        state["backbone"] = describe_backbone(model.backbone)
        if not split.base_keys:
            state["backbone"]["base"] = None
    with new_folder(folder, replace=True) as work:
        # safetensors requires contiguous tensors.
        tensors = {
            name: t.detach().contiguous().cpu()
            for name, t in unique_state_dict(model).items()
            if name not in split.base_keys
        }
        save_file(tensors, work / "model.safetensors")
        if optimizer is not None:
            state["optimizer"] = save_optimizer(work / OPTIMIZER_FILE, optimizer, uuid.uuid4().hex)
        # Hashes come last, of the files as written. Loading compares them, so that a mixed-up or damaged file is found.
        hashes = {path.name: hash_file(path) for path in sorted(work.iterdir())}
        content = {"format": FORMAT, "transformers": transformers.__version__, **state, "sha256": hashes}
        (work / "state.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def find_checkpoint(run: Path, name: str, option: str = "--run ") -> Path:
    """Return the folder of a checkpoint.

    Args:
        run: folder of the run.
        name: ``best`` or ``last``.
        option: command-line option that names the run in messages, with a trailing space, or an empty string.

    Raises:
        UserError: if the folder is not a run, or the run has no such checkpoint.
    """
    if not (run / "config.yaml").is_file():
        hint = f"; did you mean {run.parent}?" if (run.parent / "config.yaml").is_file() else ""
        raise UserError(
            f"{option}{run}: config.yaml not found; give the folder of a run, <output-dir>/runs/<run_id>{hint}"
        )
    for folder in (run / name, run / f"{name}.old"):  # .old if a save was killed between its two renames
        if (folder / "state.json").is_file():
            return folder
    available = [n for n in ("best", "last") if (run / n / "state.json").is_file()]
    remedy = f"; use --checkpoint {available[0]}" if available and option == "--run " else ""
    raise UserError(
        f"{option}{run}: checkpoint '{name}' not found; "
        + (f"the run has '{available[0]}'{remedy}." if available else "the run ended before it saved one.")
    )


def load_weights(folder: Path, model: HeatmapModel) -> None:
    """Load the tensors of a checkpoint into a model.

    Args:
        folder: folder of the checkpoint.
        model: model built with the settings of the run; if the checkpoint names a base, with the base's weights.

    Raises:
        UserError: if a tensor is missing, unexpected, not finite or of another shape or dtype, or if a file is damaged.
            The model is unchanged then.
    """
    # Read the files and determine the tensors that the checkpoint must contain.
    state = load_state(folder)
    has_no_hash = check_hash(folder / "model.safetensors", state)
    tensors = _load_tensors(folder / "model.safetensors")
    split = split_state_dict(model, self_contained=not (state["backbone"] and state["backbone"]["base"]))
    expected = unique_state_dict(model)
    wanted = expected.keys() - split.base_keys
    if state.get("stored_as") == "bf16":  # merged and exported at half size; the model still uses fp32
        tensors = {
            n: t.float() if n in expected and expected[n].dtype == torch.float32 else t for n, t in tensors.items()
        }
    # Check every tensor before the model is changed.
    problems = [f"{n} is missing" for n in sorted(wanted - tensors.keys())]
    problems += [f"{n} is not part of the model" for n in sorted(tensors.keys() - wanted)]
    problems += [
        f"{n} is {list(t.shape)} {t.dtype}, expected {list(expected[n].shape)} {expected[n].dtype}"
        for n, t in tensors.items()
        if n in expected and (t.shape, t.dtype) != (expected[n].shape, expected[n].dtype)
    ]
    problems += [
        f"{n} contains values that are not finite"
        for n, t in tensors.items()
        if t.is_floating_point() and not t.isfinite().all()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        # Another version of transformers may name layers differently, which is the likely cause.
        version = state["transformers"]
        if version != transformers.__version__:
            more += (
                f" (saved with transformers {version}, loaded with {transformers.__version__}, which may name layers"
                " differently)"
            )
        raise UserError(f"{folder}: does not match the model in config.yaml: {'; '.join(problems[:3])}{more}.")
    # Not strict, because the tensors of the base are absent; all others were checked above.
    model.load_state_dict(tensors, strict=False)

    # Warn about what could not be verified or may differ.
    if has_no_hash:
        logger.warning(
            f"{folder}: was saved by an older version without hashes of its files, so their integrity cannot be"
            " checked."
        )
    if split.sha256 != state.get("from_base_sha256"):
        logger.warning(
            "The base's weights are those used in training, but this machine or version quantizes them slightly"
            " differently: outputs may differ in the last digits. Train with --self-contained to save the quantized"
            " weights with the run."
        )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU; raise a ``UserError`` if it is damaged or missing."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error

"""Transfer of the weights of a run into another model, to start fine-tuning or to swap adapters on the same base."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracknet.config import load_config
from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.merge import merge_
from tracknet.quantization.storage import split_state_dict
from tracknet.runs.load import load_run, locate_run
from tracknet.training.checkpoint import find_checkpoint, load_weights
from tracknet.training.state import load_state

logger = logging.getLogger(__name__)


def init_from_run(model: HeatmapModel, run: str | Path, input_wh: tuple[int, int]) -> None:
    """Initialize a full-precision model with the best weights of a trained run, to fine-tune it in any mode.

    What the run's mode added is folded into plain weights: codes are dequantized, adapters merged. A backbone that the
    run left as it was keeps its base, which later runs name instead of saving its weights. A backbone that the run
    changed has no base: it exists in that run only, and is saved with every run that starts from it.

    Args:
        model: model as returned by ``build_model``; changed in place.
        run: folder of a run, hub id or ``embedded/NAME``.
        input_wh: width and height in pixels of the frames for the model.

    Raises:
        UserError: if the run's model is a different one; the message names the first difference.
    """
    config, source, _ = load_run(locate_run(run), "best", ["training.device=cpu"], "training.init_from=")
    ours = model.base
    theirs = source.base
    state = source.state_dict()
    # Tensors of the backbone that a checkpoint must contain are those that the run trained.
    trained = {n for n in state if n.startswith("backbone.hf.")} - split_state_dict(source).base_keys
    keeps_base = theirs is not None and not trained
    if theirs is not None and keeps_base:
        # Take the decoder only: the model has loaded the backbone's weights from the same base.
        if ours is None or ours.sha256 != theirs.sha256:
            raise UserError(
                f"training.init_from={run} was trained on the frozen base {theirs.name} (sha256 {theirs.sha256[:12]}…),"
                " which this model does not have: set model.backbone.name to it."
            )
        state = {n: t for n, t in state.items() if not n.startswith("backbone.")}
    else:
        state = {n: t.float() for n, t in merge_(source).state_dict().items()}
    # Both must have the same tensors. Compare them here, because the message can then name the setting.
    model_state = {n: t for n, t in model.state_dict().items() if not (keeps_base and n.startswith("backbone."))}
    problems = [f"the run lacks {n}" for n in sorted(model_state.keys() - state.keys())]
    problems += [f"the run contains {n}, which this model lacks" for n in sorted(state.keys() - model_state.keys())]
    problems += [
        f"{n} has shape {list(state[n].shape)} in the run and {list(t.shape)} in this model"
        for n, t in model_state.items()
        if n in state and t.shape != state[n].shape
    ]
    if problems:
        raise UserError(
            f"training.init_from={run} is of another model ({config.model.name}, {config.data.sequence.length} frames):"
            f" {problems[0]}{f', and {len(problems) - 1} more' if len(problems) > 1 else ''}. Choose the same model,"
            " decoder and data.sequence.length."
        )
    model.load_state_dict({**model.state_dict(), **state})
    if model.backbone is not None and not keeps_base:
        model.backbone.base = None
    # Another size of frames is allowed, but the user should know.
    theirs_wh = tuple(config.data.preprocess.resize)
    size_note = (
        ""
        if theirs_wh == tuple(input_wh)
        else (
            f" They were trained on frames of {theirs_wh[0]}x{theirs_wh[1]}, and these are resized to"
            f" {input_wh[0]}x{input_wh[1]} (data.preprocess.resize): balls have another size."
        )
    )
    logger.info(f"Starting from the weights of {run}.{size_note}")


def swap_adapter(model: HeatmapModel, run: str | Path, checkpoint: str = "best", revision: str | None = None) -> None:
    """Replace the adapters and the decoder of a loaded model by those of another run on the same base.

    The base itself is not loaded again.

    Args:
        model: model as returned by ``load``; changed in place, or not at all after an error.
        run: run with the same settings on the same base, such as one for another venue or another sport.
        checkpoint: ``best`` or ``last``.
        revision: commit, tag or branch of a hub id.

    Raises:
        UserError: if the two differ in model, mode, input or base, or one of them has no base.
    """
    path = locate_run(run, revision)
    folder = find_checkpoint(path, checkpoint, "")
    ours: Any = model.config
    theirs: Any = load_config(path / "config.yaml")
    state = load_state(folder)
    # Compare the bases by hash, because their names may differ.
    our_base = model.base
    their_base = (state["backbone"] or {}).get("base")
    if our_base is None or their_base is None:
        subject = "The loaded model" if our_base is None else str(run)
        raise UserError(
            f"{subject} has no base to share: its weights were all trained, started at random, or are self-contained. "
            "Load it whole with tracknet.load."
        )
    if their_base["sha256"] != our_base.sha256:
        raise UserError(
            f"{run} was trained on another base ({their_base['name']}) than the loaded model ({our_base.name})."
        )
    # Compare everything that decides which tensors a checkpoint contains and what they mean.
    for name, a, b in (
        ("model.decoder", ours.model.decoder, theirs.model.decoder),
        ("model.events", ours.model.events, theirs.model.events),
        ("model.backbone.layers", ours.model.backbone.layers, theirs.model.backbone.layers),
        ("training.quantization", ours.training.quantization, theirs.training.quantization),
        ("training.lora", ours.training.lora, theirs.training.lora),
        ("training.trainable", ours.training.trainable, theirs.training.trainable),
        ("training.train_last_blocks", ours.training.train_last_blocks, theirs.training.train_last_blocks),
        ("training.precision", ours.training.precision, theirs.training.precision),
        ("data.preprocess", ours.data.preprocess, theirs.data.preprocess),
        ("data.sequence.length", ours.data.sequence.length, theirs.data.sequence.length),
    ):
        if a != b:
            raise UserError(f"{run} differs from the loaded model in {name}; load it with tracknet.load.")
    load_weights(folder, model)
    # The int8 kernel depends on the device and is kept.
    model.config = replace(theirs, training=replace(theirs.training, int8_kernel=ours.training.int8_kernel))

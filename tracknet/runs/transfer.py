"""The weights of one run in the model of another: as the start of fine-tuning, or as other adapters on the same
base."""

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
    """Give a model at full precision the weights of a trained one: the start of fine-tuning, in whatever mode.

    What the other mode added is folded in: codes are dequantized, adapters merged. A backbone that was frozen as it is
    stays the same base, which runs name; one that was changed exists in that run only, and is saved with every run that
    begins from it.

    Args:
        model: as ``build_model`` gave it.
        run: folder of a run, hub id or ``embedded/NAME``; its best state is taken.
        input_wh: size of the frames that the model will see.

    Raises:
        UserError: the run is of another model; names the first difference.
    """
    config, source, _ = load_run(locate_run(run), "best", ["training.device=cpu"], "training.init_from=")
    ours = model.base
    theirs = source.base
    state = source.state_dict()
    trained = {n for n in state if n.startswith("backbone.hf.")} - split_state_dict(source).base_keys
    keeps_base = theirs is not None and not trained
    if theirs is not None and keeps_base:
        if ours is None or ours.sha256 != theirs.sha256:
            raise UserError(
                f"training.init_from={run} was trained on the frozen base {theirs.name} (sha256 {theirs.sha256[:12]}…),"
                " which this model does not have: set model.backbone.name to it."
            )
        state = {n: t for n, t in state.items() if not n.startswith("backbone.")}
    else:
        state = {n: t.float() for n, t in merge_(source).state_dict().items()}
    own = {n: t for n, t in model.state_dict().items() if not (keeps_base and n.startswith("backbone."))}
    problems = [f"{n} is not in it" for n in sorted(own.keys() - state.keys())]
    problems += [f"{n} is in it, and not in this model" for n in sorted(state.keys() - own.keys())]
    problems += [
        f"{n} is {list(state[n].shape)} there, {list(t.shape)} here"
        for n, t in own.items()
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
    theirs_wh = tuple(config.data.preprocess.resize)
    other = (
        ""
        if theirs_wh == tuple(input_wh)
        else (
            f" They were trained on frames of {theirs_wh[0]}x{theirs_wh[1]}, and these are brought to"
            f" {input_wh[0]}x{input_wh[1]} (data.preprocess.resize): balls have another size."
        )
    )
    logger.info(f"Beginning from the weights of {run}.{other}")


def swap_adapter(model: HeatmapModel, run: str | Path, checkpoint: str = "best", revision: str | None = None) -> None:
    """Put another run's adapters and decoder onto the base that a model holds; the base itself stays where it is.

    Args:
        model: as ``load`` gave it; changed in place, or not at all.
        run: a run of the same settings on the same base: another venue, another sport.
        checkpoint: ``best`` or ``last``.
        revision: commit, tag or branch, of a hub id.

    Raises:
        UserError: the two differ in model, mode, input or base, or the model holds no base.
    """
    path = locate_run(run, revision)
    folder = find_checkpoint(path, checkpoint, "")
    ours: Any = model.config
    theirs: Any = load_config(path / "config.yaml")
    state = load_state(folder)
    mine = model.base
    base = (state["backbone"] or {}).get("base")
    if mine is None or base is None:
        who = "The loaded model" if mine is None else str(run)
        raise UserError(
            f"{who} has no base to share: its weights were all trained, started at random, or are self-contained. "
            "Load it whole with tracknet.load."
        )
    if base["sha256"] != mine.sha256:
        raise UserError(f"{run} was trained on another base ({base['name']}) than the loaded model ({mine.name}).")
    for name, a, b in (
        ("model.decoder", ours.model.decoder, theirs.model.decoder),
        ("model.events", ours.model.events, theirs.model.events),
        ("model.backbone.layers", ours.model.backbone.layers, theirs.model.backbone.layers),
        ("training.quantization", ours.training.quantization, theirs.training.quantization),
        ("training.lora", ours.training.lora, theirs.training.lora),
        ("training.trainable", ours.training.trainable, theirs.training.trainable),
        ("training.precision", ours.training.precision, theirs.training.precision),
        ("data.preprocess", ours.data.preprocess, theirs.data.preprocess),
        ("data.sequence.length", ours.data.sequence.length, theirs.data.sequence.length),
    ):
        if a != b:
            raise UserError(f"{run} differs from the loaded model in {name}; load it with tracknet.load.")
    load_weights(folder, model)
    # What multiplies is a matter of the device, and stays.
    model.config = replace(theirs, training=replace(theirs.training, int8_kernel=ours.training.int8_kernel))

"""A training run from its configuration to its folder: data, model, plan and loop put together."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from tracknet.api.plan import planner_of
from tracknet.config import Config, save_config
from tracknet.data.checks import validate_dataset
from tracknet.data.clips import WindowDataset, describe, num_workers
from tracknet.data.config import Split
from tracknet.data.splits import read_mix, read_split
from tracknet.errors import UserError, of_dead_worker
from tracknet.files import expand_user, write_json
from tracknet.labels import Clip
from tracknet.memory.meter import available_bytes
from tracknet.memory.streaming import place_
from tracknet.models.heatmap_model import build_model
from tracknet.planning.estimate import ALLOCATOR_SHARE
from tracknet.planning.planner import Planner
from tracknet.quantization.apply import apply_mode
from tracknet.quantization.parts import describe_parts
from tracknet.reporting.console import render_table
from tracknet.reporting.tables import build_parts_table
from tracknet.runs.load import parameters_in, resolve_device
from tracknet.runs.transfer import init_from_run
from tracknet.training.checkpoint import find_checkpoint, load_weights
from tracknet.training.config import MemoryConfig
from tracknet.training.distributed import all_reduce_min, broadcast_object, describe_launch, rank, world_size
from tracknet.training.features import build_features
from tracknet.training.interruption import Terminated
from tracknet.training.run_lock import lock_run
from tracknet.training.state import load_state
from tracknet.training.trainer import Trainer, TrainerConfig

logger = logging.getLogger(__name__)


def train_run(config: Config, run: Path, resume: bool = False) -> dict:
    """Build what the configuration describes, train it, and write the run.

    Args:
        config: everything.
        run: folder of the run, ``<output-dir>/runs/<run_id>``; created once data and model are sound, under a numbered
            name where another has it.
        resume: continue from its ``last/``.

    Returns:
        What ``metrics.json`` holds.
    """
    with contextlib.ExitStack() as held:
        return _train(config, run, resume, held)


def _train(config: Config, run: Path, resume: bool, held: contextlib.ExitStack) -> dict:
    """Train, with the run's folder locked in ``held`` from the moment there is one."""
    device = resolve_device(config.training.device)
    # Several processes (accelerate launch, torchrun) find each other here; the first one speaks for all.
    PartialState(cpu=device.type == "cpu")
    if rank() > 0:
        logging.getLogger("tracknet").setLevel(logging.ERROR)
    if warning := describe_launch(os.environ):
        logger.warning(warning)
    last = find_checkpoint(run, "last", "--resume ") if resume else None
    if resume:
        _first_alone(lambda: held.enter_context(lock_run(run)))
    planner = planner_of(config, device.type)
    if not resume:
        # What cannot train is said before anything is rendered or read: the plan builds the model, without its weights.
        _ = planner.estimate
    splits: tuple[Split, ...] = ("train", "val")
    clips = {split: read_split(config.data, split, render=not resume) for split in splits}
    for split, of_split in clips.items():
        logger.info(describe(of_split, split, config.data.occluded))
    mix = read_mix(config.data, render=not resume)
    for other, of_other in zip(config.data.mix, mix):
        logger.info(describe(of_other, f"mixed in, {other.root}", config.data.occluded))
    if not resume:
        _look_over(config, clips, mix)
    torch.manual_seed(config.seed)
    saved = load_state(last)["backbone"] if last else None
    model = build_model(
        config.model, config.data.sequence.length, saved, parameters_in(last / "model.safetensors") if last else None
    )
    if config.training.init_from and not resume:
        init_from_run(model, config.training.init_from, config.data.preprocess.resize)
    memory = config.training.memory_optimization
    place = partial(place_, device=device, blocks_stay=memory.streams_weights and model.backbone is not None)
    apply_mode(model, config.training.mode, device, last is None, place)
    _warn_of_useless_offload(memory, device)
    first_size = _first_size(planner, device)
    logger.info(render_table(build_parts_table(describe_parts(model))))
    train_set = WindowDataset(clips["train"], config.data, training=True, seed=config.seed, mix=mix)
    val_set = WindowDataset(clips["val"], config.data, training=False, stride=config.evaluation.stride)
    if last:
        load_weights(last, model)
    if config.training.cache_features:
        train_set.features = build_features(
            model, train_set, device, expand_user(config.data.cache_dir, "data.cache_dir")
        )
    opened: list[Path] = []

    def open_run() -> Path:
        opened.append(run if resume else _claim(run))
        if not resume:
            held.enter_context(lock_run(opened[0]))
        save_config(config, opened[0] / "config.yaml")
        logger.info(f"run: {opened[0]}   watch: tensorboard --logdir={run.parent.parent / 'logs'}")
        return opened[0]

    try:
        settings = TrainerConfig(
            config.training, config.evaluation, device, config.seed, num_workers(config.data, device), first_size
        )
        result = Trainer(model, train_set, val_set, settings, planner).fit(open_run, last)
    except (UserError, KeyboardInterrupt, Terminated, OSError, RuntimeError) as error:
        if opened:
            _end_early(opened[0])
        if refusal := of_dead_worker(error):
            raise refusal from error
        raise
    if rank() > 0:
        return result
    run = Path(result["run"])
    write_json(run / "metrics.json", result)
    logger.info(
        f"Best validation F1 {result['val_f1_strict']:.3f} (strict, {config.evaluation.tolerance_px:g} px) at step "
        f"{result['best_step']}. Next: tracknet evaluate --run {shlex.quote(str(run))}{_split_to_score(config)}"
    )
    return result


def _split_to_score(config: Config) -> str:
    """Return the option that scores the split that there is: a dataset of one's own may have no test games."""
    try:
        read_split(config.data, "test", render=False)
    except UserError:
        return " --split val"
    return ""


def _end_early(run: Path) -> None:
    """Say what is left of a run that stopped; one that has saved nothing yet leaves nothing behind."""
    if any((run / name).exists() for name in ("last", "last.old")):
        logger.info(
            f"What was saved before is in {run}. Go on from last/: tracknet train --resume {shlex.quote(str(run))}"
        )
    if any(
        (run / name).exists() for name in ("last", "last.old", "best", "best.old")
    ):  # .old: killed between two renames
        return
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run.parent.parent / "logs" / run.name, ignore_errors=True)


def _first_alone(act: Callable[[], object]) -> None:
    """Do something in the first process alone; what it refuses, all refuse."""
    refusal: str | None = None
    if rank() == 0:
        try:
            act()
        except UserError as error:
            refusal = str(error)
    if refusal := broadcast_object(refusal):
        raise UserError(refusal)


def _look_over(config: Config, clips: dict[Split, list[Clip]], mix: list[list[Clip]]) -> None:
    """Check the data in the first process; what it refuses, all refuse."""
    _first_alone(lambda: validate_dataset(config.data, clips, [c for others in mix for c in others]))
    train = [*clips["train"], *(c for others in mix for c in others)]
    if config.model.events and not any(label.event is not None for clip in train for label in clip.labels.values()):
        raise UserError(
            "model.events=true, and no training label says what happens to the ball (the status column of layout"
            " tracknet): set it to false, or add the column."
        )


def _warn_of_useless_offload(memory: MemoryConfig, device: torch.device) -> None:
    if memory.use_cpu_offload and device.type == "cpu":
        logger.warning(
            "training.memory_optimization.use_cpu_offload: this run is on the CPU, so all of it is in host memory"
            " already."
        )
    if memory.offloads and memory.checkpointing == "none":
        logger.warning(
            "training.memory_optimization: without gradient_checkpointing only activations are offloaded; weights stay,"
            " because autograd would keep a copy of each until backward."
        )


def _first_size(planner: Planner, device: torch.device) -> int | None:
    """Return the windows per micro-batch that should fit into what is free, ``None`` if the configuration sets it."""
    training = planner.training
    if not training.adaptive_micro_batch or training.micro_batch_size is not None:
        return None
    estimate, batch = planner.estimate, math.ceil(training.batch_size / world_size())
    # The weights are there already.
    resident = estimate.weights + estimate.trained_weights
    free = int(available_bytes(device) * ALLOCATOR_SHARE)
    size = estimate.largest_micro_batch(free + resident, batch)
    # All processes begin alike.
    size = all_reduce_min(size, device)
    if size == batch:
        return size
    needed = estimate.peak_bytes(batch if size else 1) - resident
    begin = max(size, training.min_micro_batch_size)
    logger.info(
        f"Planned: {batch if size else 'a single one'} windows at once would take {needed / 1e9:.1f} GB, and"
        f" {free / 1e9:.1f} GB are free; beginning with micro-batches of {begin}."
    )
    return begin


def new_run(output_dir: Path, name: str) -> Path:
    """Name a run by time and choice."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return output_dir / "runs" / f"{stamp}-{name}"


def _claim(run: Path) -> Path:
    """Make the run's folder; where one that started in the same second has it, a numbered one."""
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        mine = run.with_name(run.name + suffix)
        try:
            mine.mkdir(parents=True)
        except FileExistsError:
            continue
        return mine
    raise UserError(f"{run}: a hundred runs of this name exist.")

"""Training run: from a configuration to a run folder, combining data, model, memory plan and trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from tracknet.api.plan import planner_of
from tracknet.config import Config, save_config
from tracknet.data.checks import validate_dataset
from tracknet.data.clips import WindowDataset, describe, num_workers
from tracknet.data.config import Split
from tracknet.data.labels import Clip
from tracknet.data.splits import read_mix, read_split
from tracknet.errors import UserError, of_dead_worker
from tracknet.files import expand_user, write_json
from tracknet.memory.streaming import place_
from tracknet.models.heatmap_model import build_model
from tracknet.planning.step_plan import plan_training
from tracknet.progress import track
from tracknet.quantization.adapters.initialization import start_from_inputs_
from tracknet.quantization.apply import active, apply_mode
from tracknet.quantization.parts import describe_parts
from tracknet.reporting.console import render_table
from tracknet.reporting.tables import build_parts_table
from tracknet.runs.load import parameters_in, resolve_device
from tracknet.runs.transfer import init_from_run
from tracknet.training.batches import epoch_batches
from tracknet.training.checkpoint import find_checkpoint, load_weights
from tracknet.training.config import MemoryConfig
from tracknet.training.distributed import broadcast_object, describe_launch, rank
from tracknet.training.features import build_features
from tracknet.training.interruption import Terminated
from tracknet.training.run_lock import lock_run
from tracknet.training.state import load_state
from tracknet.training.trainer import Trainer, TrainerConfig

logger = logging.getLogger(__name__)

EVA_WINDOWS = 32  # windows whose inputs initialize adapters


def train_run(
    config: Config, run: Path, resume: bool = False, clips: Mapping[Split, Sequence[Clip]] | None = None
) -> dict:
    """Build and train the model that a configuration describes, and write the run.

    Args:
        config: complete configuration.
        run: folder of the run, ``<output-dir>/runs/<run_id>``. It is created after data and model were checked, with a
            number appended if the name is taken.
        resume: whether to continue from the checkpoint ``last/`` of ``run``.
        clips: clips of the splits ``train`` and ``val`` to use instead of those of the data section.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UserError: if the configuration, the data or the memory does not allow the training.
    """
    with contextlib.ExitStack() as stack:
        return _train(config, run, resume, stack, clips)


def _train(
    config: Config,
    run: Path,
    resume: bool,
    stack: contextlib.ExitStack,
    own_clips: Mapping[Split, Sequence[Clip]] | None,
) -> dict:
    """Run ``train_run``; the lock of the run folder is entered into ``stack`` as soon as the folder exists."""
    # Processes of accelerate launch or torchrun connect to each other here; only the first one logs.
    device = resolve_device(config.training.device)
    PartialState(cpu=device.type == "cpu")
    if rank() > 0:
        logging.getLogger("tracknet").setLevel(logging.ERROR)
    if warning := describe_launch(os.environ):
        logger.warning(warning)
    last = find_checkpoint(run, "last", "--resume ") if resume else None
    if resume:
        _run_on_first_process(lambda: stack.enter_context(lock_run(run)))
    # Estimating builds the model without its weights, so that a configuration that cannot be trained is
    # reported before any data is rendered or read.
    planner = planner_of(config, device.type)
    if not resume:
        _ = planner.estimate
    # Read and check the clips of all splits.
    splits: tuple[Split, ...] = ("train", "val")
    if own_clips is None:
        clips = {split: read_split(config.data, split, render=not resume) for split in splits}
    elif missing := [split for split in splits if not own_clips.get(split)]:
        raise UserError(f"clips: no clips for '{missing[0]}'; give lists of clips for 'train' and for 'val'.")
    else:
        clips = {split: list(own_clips[split]) for split in splits}
    for split, split_clips in clips.items():
        logger.info(describe(split_clips, split, config.data.occluded))
    mix = read_mix(config.data, render=not resume)
    for dataset, mixed_clips in zip(config.data.mix, mix):
        logger.info(describe(mixed_clips, f"mixed in, {dataset.root}", config.data.occluded))
    if not resume:
        _validate_data(config, clips, mix)
    # Build the model. The seed determines the initial weights of decoder and adapters. A resumed run takes the
    # backbone's architecture from its checkpoint, whose file size also bounds the number of parameters.
    torch.manual_seed(config.seed)
    saved = load_state(last)["backbone"] if last else None
    model = build_model(
        config.model, config.data.sequence.length, saved, parameters_in(last / "model.safetensors") if last else None
    )
    if config.training.init_from and not resume:
        init_from_run(model, config.training.init_from, config.data.preprocess.resize)
    memory = config.training.memory_optimization
    place = partial(place_, device=device, blocks_stay=config.training.streams_weights and model.backbone is not None)
    apply_mode(model, config.training.mode, device, last is None, place)
    _warn_of_useless_offload(memory, device)
    logger.info(render_table(build_parts_table(describe_parts(model))))
    train_set = WindowDataset(clips["train"], config.data, training=True, seed=config.seed, mix=mix)
    val_set = WindowDataset(clips["val"], config.data, training=False, stride=config.evaluation.stride)
    if last:
        load_weights(last, model)
    # Planned after the weights were placed: what is free now is available for gradients, optimizer and activations.
    # The run records the plan, so that a resumed run takes the same steps.
    config = dataclasses.replace(config, training=plan_training(planner, model, device))
    planner = planner_of(config, device.type)
    lora = active(config.training.lora)
    if lora is not None and lora.init_lora_weights == "eva" and last is None:
        start_from_inputs_(model, _first_windows(train_set, device))
        # The signs of eigenvectors are arbitrary: all processes take those of the first one.
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.data.copy_(broadcast_object(parameter.data.cpu()))
    # Features depend on the weights of the backbone, so they are computed after the checkpoint was loaded.
    if config.training.cache_features:
        train_set.features = build_features(
            model, train_set, device, expand_user(config.data.cache_dir, "data.cache_dir")
        )
    # The trainer calls `open_run` in the first process once everything that can fail early succeeded.
    opened: list[Path] = []  # folder of the run, once it exists

    def open_run() -> Path:
        opened.append(run if resume else _create_run_folder(run))
        if not resume:
            stack.enter_context(lock_run(opened[0]))
        save_config(config, opened[0] / "config.yaml")
        logger.info(f"run: {opened[0]}   monitor: tensorboard --logdir={run.parent.parent / 'logs'}")
        return opened[0]

    try:
        settings = TrainerConfig(
            config.training, config.evaluation, device, config.seed, num_workers(config.data, device)
        )
        result = Trainer(model, train_set, val_set, settings, planner).fit(open_run, last)
    except (UserError, KeyboardInterrupt, Terminated, OSError, RuntimeError) as error:
        if opened:
            _clean_up_stopped_run(opened[0])
        # torch reports a killed loading process as a RuntimeError; its cause is one that the user can fix.
        if refusal := of_dead_worker(error):
            raise refusal from error
        raise
    # Write the results, in the first process only.
    if rank() > 0:
        return result
    run = Path(result["run"])
    write_json(run / "metrics.json", result)
    logger.info(
        f"Best validation F1 {result['val_f1_strict']:.3f} (strict, {config.evaluation.tolerance_px:g} px) at step "
        f"{result['best_step']}. Next: tracknet evaluate --run {shlex.quote(str(run))}{_split_option(config)}"
    )
    return result


def _split_option(config: Config) -> str:
    """Return ``" --split val"`` if the dataset has no test games, otherwise an empty string."""
    try:
        read_split(config.data, "test", render=False)
    except UserError:
        return " --split val"
    return ""


def _clean_up_stopped_run(run: Path) -> None:
    """Log how to resume a stopped run, or delete its folder and logs if it contains no checkpoint."""
    # A checkpoint is named .old if the process was killed between the two renames that replace it.
    if any((run / name).exists() for name in ("last", "last.old")):
        logger.info(
            f"Saved checkpoints are in {run}. Continue from last/: tracknet train --resume {shlex.quote(str(run))}"
        )
    if any((run / name).exists() for name in ("last", "last.old", "best", "best.old")):
        return
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run.parent.parent / "logs" / run.name, ignore_errors=True)


def _run_on_first_process(act: Callable[[], object]) -> None:
    """Call ``act`` in the first process only; a ``UserError`` it raises is raised in all processes.

    So all processes stop with the same message, instead of waiting for the first one in their next collective call.
    """
    refusal: str | None = None
    if rank() == 0:
        try:
            act()
        except UserError as error:
            refusal = str(error)
    if refusal := broadcast_object(refusal):
        raise UserError(refusal)


def _first_windows(train_set: WindowDataset, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the frames of the first training windows, a few at a time; the same ones in all processes."""
    order = epoch_batches(train_set, EVA_WINDOWS, train_set.seed, 0)[0]
    for index in track(order, "reading windows for training.lora.init_lora_weights=eva"):
        yield train_set[index]["frames"][None].to(device)


def _validate_data(config: Config, clips: dict[Split, list[Clip]], mix: list[list[Clip]]) -> None:
    """Check the training data, once for all processes.

    Args:
        config: complete configuration.
        clips: clips of the training and validation splits.
        mix: clips of each additional training dataset (``data.mix``).

    Raises:
        UserError: if the data has an error, or ``model.events`` is set but no training label contains an event.
    """
    _run_on_first_process(lambda: validate_dataset(config.data, clips, [c for mixed in mix for c in mixed]))
    train = [*clips["train"], *(c for mixed in mix for c in mixed)]
    if config.model.events and not any(label.event is not None for clip in train for label in clip.labels.values()):
        raise UserError(
            "model.events=true, but no training label contains an event (the status column of layout tracknet): set"
            " model.events=false, or add the column."
        )


def _warn_of_useless_offload(memory: MemoryConfig, device: torch.device) -> None:
    """Warn about offload settings that save no memory, or less than they could."""
    if memory.use_cpu_offload and device.type == "cpu":
        logger.warning(
            "training.memory_optimization.use_cpu_offload has no effect: this run is on the CPU, so all tensors are in"
            " host memory already."
        )
    if memory.offloads and memory.checkpointing == "none":
        logger.warning(
            "training.memory_optimization: without gradient_checkpointing, only activations are offloaded; weights stay"
            " on the device, because autograd would keep a copy of each until backward."
        )


def new_run(output_dir: Path, name: str) -> Path:
    """Return the folder of a new run, ``<output_dir>/runs/<time>-<name>``, without creating it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return output_dir / "runs" / f"{stamp}-{name}"


def _create_run_folder(run: Path) -> Path:
    """Create the folder of a run, with a number appended if a run of the same second has the name already.

    ``mkdir`` is atomic, so two processes that start at once cannot create the same folder.
    """
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        candidate = run.with_name(run.name + suffix)
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise UserError(f"{run}: a hundred runs of this name exist. Use another name or --output-dir.")

"""Overhead of the training loop, compared with a minimal PyTorch loop."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tracknet.benchmark.speed import UNTIMED, Runner
from tracknet.config import Config
from tracknet.data.clips import WindowDataset, num_workers
from tracknet.data.transforms import apply_augmentation
from tracknet.memory.meter import synchronize
from tracknet.planning.planner import Planner
from tracknet.progress import quiet, track
from tracknet.training.batches import epoch_batches
from tracknet.training.losses import heatmap_loss, loss_normalizer
from tracknet.training.trainer import Trainer, TrainerConfig


def measure_loop(
    config: Config,
    runner: Runner,
    train_set: WindowDataset,
    val_set: WindowDataset,
    rounds: int,
    steps: int,
    scratch: Path,
) -> dict:
    """Compare the training loop, including its monitoring, with a minimal PyTorch loop on the same model and batches.

    The two loops alternate. The step times of the training loop are taken from its own log. The first ``UNTIMED`` steps
    of each turn are not counted.

    Args:
        config: configuration of a mode without checkpointing.
        runner: runner of the model that both loops train.
        train_set: training windows.
        val_set: windows for the validation at the end, which is not timed.
        rounds: number of turns of each loop.
        steps: timed steps per turn.
        scratch: folder for the files of the training loop.

    Returns:
        ``ratio`` of step times (1.01 means 1 % slower than the minimal loop), the median of ``by_round``, and the
        median step time of both loops in ``seconds``: ``loop`` and ``bare``.
    """
    device, images = runner.device, config.training.batch_size * config.data.sequence.length
    loop_times: list[list[float]] = []  # seconds of each timed step, by turn
    bare_times: list[list[float]] = []
    for number in track(range(rounds), "training loop against a bare one"):
        training = dataclasses.replace(
            config.training, max_steps=steps + UNTIMED, epochs=10**6, limit_val_batches=1, validate_every_epochs=10**6
        )
        run = scratch / "runs" / str(number)
        planner = Planner(config.model, training, config.data.sequence.length, config.data.training_wh, device.type)

        def open_run(run: Path = run) -> Path:
            run.mkdir(parents=True)
            return run

        # The order of the two loops changes every round, so that a drift of the machine's speed cancels.
        if number % 2:
            bare_times.append(_bare_loop(runner, train_set, config, steps + UNTIMED)[UNTIMED:])
        with quiet():
            settings = TrainerConfig(training, config.evaluation, device, config.seed, num_workers(config.data, device))
            Trainer(runner.model, train_set, val_set, settings, planner).fit(open_run)
        # The trainer logs images per second for every step: its inverse is the time of the step.
        log = EventAccumulator(str(scratch / "logs" / run.name))
        log.Reload()
        loop_times.append([images / event.value for event in log.Scalars("train/images_per_s")[UNTIMED:]])
        if not number % 2:
            bare_times.append(_bare_loop(runner, train_set, config, steps + UNTIMED)[UNTIMED:])
    by_round = [statistics.median(a) / statistics.median(b) for a, b in zip(loop_times, bare_times)]
    return {
        "ratio": statistics.median(by_round),  # of turns that are adjacent in time: a slower machine slows down both
        "by_round": by_round,
        "seconds": {
            "loop": statistics.median(t for r in loop_times for t in r),
            "bare": statistics.median(t for r in bare_times for t in r),
        },
    }


def _bare_loop(runner: Runner, train_set: WindowDataset, config: Config, steps: int) -> list[float]:
    """Train with a minimal PyTorch loop, without accumulation, monitoring or checks; return the seconds per step."""
    model, device, training = runner.model, runner.device, config.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)  # a tiny learning rate, so that the weights hardly change
    order = epoch_batches(train_set, training.batch_size, config.seed, 0)[:steps]
    loader = DataLoader(
        train_set, batch_sampler=order, num_workers=num_workers(config.data, device), pin_memory=device.type == "cuda"
    )
    times, begin = [], time.perf_counter()
    for batch in loader:
        batch = apply_augmentation(
            {
                k: v.to(device, non_blocking=True) if k in ("frames", "xy", "visible", "weight") else v
                for k, v in batch.items()
            },
            config.data.augment.crop,
        )
        loss = heatmap_loss(model(batch["frames"]), batch, training.loss) / loss_normalizer(
            batch, training.loss
        ).clamp_min(1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip or 1e9)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return times

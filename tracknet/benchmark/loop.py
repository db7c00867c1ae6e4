"""What the training loop costs beside the shortest one that PyTorch allows."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tracknet.benchmark.speed import UNTIMED, Runner, synchronize
from tracknet.config import Config
from tracknet.data.clips import WindowDataset, num_workers
from tracknet.data.transforms import apply_augmentation
from tracknet.planning.planner import Planner
from tracknet.progress import quiet, track
from tracknet.training.batches import epoch_batches
from tracknet.training.losses import heatmap_loss
from tracknet.training.trainer import Trainer, TrainerConfig


def measure_loop(
    config: Config,
    model_of: Runner,
    train_set: WindowDataset,
    val_set: WindowDataset,
    rounds: int,
    steps: int,
    scratch: Path,
) -> dict:
    """Compare the training loop, monitoring and all, with the shortest loop that PyTorch allows, on the same model and
    batches.

    Both take turns. The loop's times are those between its own log's entries; the first steps of each turn are not
    counted.

    Args:
        config: a mode without checkpointing.
        model_of: whose model is trained on.
        train_set: windows.
        val_set: for the validation at the end, which is not timed.
        rounds: turns.
        steps: timed in a turn.
        scratch: folder for the loop's files.

    Returns:
        ``ratio`` of seconds (1.01 = 1 % slower than the bare loop), the median of ``by_round``, and median ``seconds``
        of both.
    """
    device, images = model_of.device, config.training.batch_size * config.data.sequence.length
    ours: list[list[float]] = []
    bare: list[list[float]] = []
    for number in track(range(rounds), "training loop against a bare one"):
        training = dataclasses.replace(
            config.training, max_steps=steps + UNTIMED, epochs=10**6, limit_val_batches=1, validate_every_epochs=10**6
        )
        run = scratch / "runs" / str(number)
        planner = Planner(config.model, training, config.data.sequence.length, config.data.training_wh, device.type)

        def open_run(run: Path = run) -> Path:
            run.mkdir(parents=True)
            return run

        if number % 2:
            bare.append(_bare_loop(model_of, train_set, config, steps + UNTIMED)[UNTIMED:])
        with quiet():
            settings = TrainerConfig(training, config.evaluation, device, config.seed, num_workers(config.data, device))
            Trainer(model_of.model, train_set, val_set, settings, planner).fit(open_run)
        log = EventAccumulator(str(scratch / "logs" / run.name))
        log.Reload()
        ours.append([images / event.value for event in log.Scalars("train/images_per_s")[UNTIMED:]])
        if not number % 2:
            bare.append(_bare_loop(model_of, train_set, config, steps + UNTIMED)[UNTIMED:])
    by_round = [statistics.median(a) / statistics.median(b) for a, b in zip(ours, bare)]
    return {
        "ratio": statistics.median(by_round),  # of neighbors in time: a machine that slows down slows both
        "by_round": by_round,
        "seconds": {
            "loop": statistics.median(t for r in ours for t in r),
            "bare": statistics.median(t for r in bare for t in r),
        },
    }


def _bare_loop(model_of: Runner, train_set: WindowDataset, config: Config, steps: int) -> list[float]:
    """Train as shortly as PyTorch allows: no accumulation, no monitoring, no check of anything."""
    model, device, training = model_of.model, model_of.device, config.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
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
        loss = heatmap_loss(model(batch["frames"]), batch, training.loss) / batch["weight"].sum().clamp_min(1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip or 1e9)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return times

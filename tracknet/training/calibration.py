"""Timing of forward and backward on the user's device, by level of checkpointing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from tracknet.memory.checkpointing import Level, checkpointed
from tracknet.memory.micro_batch import free_cached_memory, is_out_of_memory
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.training.losses import LossConfig, heatmap_loss

REPEATS = 2  # timed repetitions, of which the fastest counts
LONGEST_S = 2.0  # expected seconds of a micro-batch beyond which a smaller one is timed


def make_timer(
    model: HeatmapModel, loss: LossConfig, input_wh: tuple[int, int], device: torch.device
) -> Callable[[Level, int], float]:
    """Return a function that times forward and backward of a model.

    Args:
        model: model with its mode applied, on its device, without checkpointing.
        loss: settings of the loss.
        input_wh: width and height of the frames in pixels.
        device: device of the model.

    Returns:
        Function that takes a level and a micro-batch size and returns the seconds per window, or infinity if memory
        runs out. It leaves no gradients.
    """

    def time_level(level: Level, micro_batch: int) -> float:
        try:
            with checkpointed(model, level), torch.random.fork_rng(devices=[]):
                return _time(model, loss, input_wh, device, micro_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            model.zero_grad(set_to_none=True)
        free_cached_memory()
        return math.inf

    return time_level


def _time(
    model: HeatmapModel, loss: LossConfig, input_wh: tuple[int, int], device: torch.device, micro_batch: int
) -> float:
    """Return the seconds per window of a micro-batch, or of a smaller one if that takes long."""
    was_training = model.training
    model.train()
    try:
        # The first window warms caches up and shows how long a micro-batch takes.
        _run(model, loss, input_wh, device, 1)
        seconds = _run(model, loss, input_wh, device, 1)
        size = max(1, min(micro_batch, int(LONGEST_S / seconds)))
        return min(_run(model, loss, input_wh, device, size) for _ in range(REPEATS)) / size
    finally:
        model.train(was_training)


def _run(model: HeatmapModel, loss: LossConfig, input_wh: tuple[int, int], device: torch.device, windows: int) -> float:
    """Run forward and backward on noise with a ball in the middle of each frame; return the seconds that it took."""
    width, height = input_wh
    frames = (windows, model.num_frames)
    batch = {
        "frames": torch.randint(0, 256, (*frames, 3, height, width), dtype=torch.uint8, device=device),
        "xy": torch.tensor([width / 2, height / 2], device=device).expand(*frames, 2),
        "visible": torch.ones(frames, dtype=torch.bool, device=device),
        "weight": torch.ones(frames, device=device),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with model.rng.scope(0, 0, windows):
        heatmap_loss(model(batch["frames"]), batch, loss).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

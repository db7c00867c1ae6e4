"""Timing of forward and backward on the user's device, by level of checkpointing."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tracknet.memory.checkpointing import Level, checkpointed
from tracknet.memory.meter import synchronize
from tracknet.memory.micro_batch import free_cached_memory, is_out_of_memory
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.training.config import TrainingConfig
from tracknet.training.cuda_graphs import EAGER_RUNS, MicroBatchGraphs, reason_against
from tracknet.training.losses import heatmap_loss, loss_normalizer

REPEATS = 2  # timed repetitions, of which the fastest counts
Run = Callable[[int], float]  # runs a number of windows and returns the seconds that it took
LONGEST_S = 2.0  # expected seconds of a micro-batch beyond which a smaller one is timed


def make_timer(
    model: HeatmapModel, config: TrainingConfig, input_wh: tuple[int, int], device: torch.device
) -> Callable[[Level, int], float]:
    """Return a function that times forward and backward of a model.

    Args:
        model: model with its mode applied, on its device, without checkpointing.
        config: training section of the configuration.
        input_wh: width and height of the frames in pixels.
        device: device of the model.

    Returns:
        Function that takes a level and a micro-batch size and returns the seconds per window, or infinity if memory
        runs out. It leaves no gradients.
    """

    def time_level(level: Level, micro_batch: int) -> float:
        memory = dataclasses.replace(config.memory_optimization, gradient_checkpointing=level)
        at_level = dataclasses.replace(config, memory_optimization=memory)
        was_training = model.training
        model.train()
        try:
            with checkpointed(model, level), torch.random.fork_rng(devices=[]):
                return _time(*_make_run(model, at_level, input_wh, device), micro_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
            free_cached_memory()
        return math.inf

    return time_level


def _time(run: Run, graphed: bool, micro_batch: int) -> float:
    """Return the seconds per window of a micro-batch, or of a smaller one if that takes long.

    Args:
        run: function to time.
        graphed: whether it captures a CUDA graph once it has run several times.
        micro_batch: windows per micro-batch.
    """
    # The first window warms caches up and shows how long a micro-batch takes.
    run(1)
    size = max(1, min(micro_batch, int(LONGEST_S / run(1))))
    for _ in range(EAGER_RUNS + 1 if graphed else 0):
        run(size)
    return min(run(size) for _ in range(REPEATS)) / size


def _make_run(
    model: HeatmapModel, config: TrainingConfig, input_wh: tuple[int, int], device: torch.device
) -> tuple[Run, bool]:
    """Return a function that runs forward and backward on noise, and whether it uses CUDA graphs."""
    graphs = MicroBatchGraphs(model) if reason_against(model, config, device) is None else None

    def forward_backward(batch: dict[str, Tensor], normalizer: Tensor) -> Tensor:
        loss = heatmap_loss(model(batch["frames"]), batch, config.loss) / normalizer
        loss.backward()
        return loss.detach()

    def run(windows: int) -> float:
        batch = _random_batch(windows, model.num_frames, input_wh, device)
        normalizer = loss_normalizer(batch, config.loss)
        synchronize(device)
        start = time.perf_counter()
        with model.rng.scope(0, 0, windows, device):
            if graphs is None:
                forward_backward(batch, normalizer)
            else:
                graphs.run(batch, normalizer, forward_backward)
        synchronize(device)
        return time.perf_counter() - start

    return run, graphs is not None


def _random_batch(windows: int, num_frames: int, input_wh: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return noise with a ball in the middle of each frame."""
    width, height = input_wh
    frames = (windows, num_frames)
    return {
        "frames": torch.randint(0, 256, (*frames, 3, height, width), dtype=torch.uint8, device=device),
        "xy": torch.tensor([width / 2, height / 2], device=device).expand(*frames, 2),
        "visible": torch.ones(frames, dtype=torch.bool, device=device),
        "weight": torch.ones(frames, device=device),
    }

"""Choice of the checkpointing level and the micro-batch size of a training step, under a memory budget.

Recomputing activations and splitting a batch both trade time for memory, and which of them costs less depends on model
and device: small micro-batches leave a GPU idle, but cost a CPU little. So each level is planned with the largest
micro-batch that fits, and if several remain, a few micro-batches of each are timed on the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tracknet.errors import UserError
from tracknet.memory.budget import Budget, parse_budget
from tracknet.memory.checkpointing import Level
from tracknet.memory.meter import available_bytes
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.planning.estimate import ALLOCATOR_SHARE
from tracknet.planning.planner import Planner
from tracknet.training.calibration import make_timer
from tracknet.training.config import TrainingConfig
from tracknet.training.distributed import all_reduce_min, broadcast_object, world_size

logger = logging.getLogger(__name__)

Timer = Callable[[Level, int], float]  # seconds per window at a level of checkpointing and a micro-batch size


@dataclass(frozen=True)
class StepPlan:
    """Way to run a training step.

    Attributes:
        level: level of gradient checkpointing.
        micro_batch: windows per micro-batch.
        peak_bytes: planned peak of the step.
        seconds: measured time of forward and backward of a batch, in seconds; ``None`` if there was nothing to choose.
    """

    level: Level
    micro_batch: int
    peak_bytes: int
    seconds: float | None = None

    def apply(self, training: TrainingConfig) -> TrainingConfig:
        """Return the training section with the level and the micro-batch size of the plan."""
        memory = replace(training.memory_optimization, gradient_checkpointing=self.level)
        # A process that shares a batch with others may have fewer windows than the smallest micro-batch.
        size = max(self.micro_batch, training.min_micro_batch_size)
        return replace(training, memory_optimization=memory, micro_batch_size=size)


def plan_training(planner: Planner, model: HeatmapModel, device: torch.device) -> TrainingConfig:
    """Choose checkpointing level and micro-batch size for the memory that is free on a device, and log the choice.

    Args:
        planner: planner of the configuration.
        model: model with its mode applied and its weights on the device.
        device: device of the model.

    Returns:
        Training section with the plan, the same in all processes that train together.

    Raises:
        UserError: if no plan fits into an absolute budget.
    """
    training, batch = planner.training, math.ceil(planner.training.batch_size / world_size())
    memory = training.memory_optimization
    fixed = training.micro_batch_size is not None or not training.adaptive_micro_batch
    if memory.checkpointing != "auto" and memory.budget != "free" and not fixed:
        logger.info(
            f"training.memory_optimization.budget={memory.budget} is not used, because"
            f" gradient_checkpointing={memory.checkpointing} is set instead of auto."
        )
    if fixed and (memory.checkpointing != "auto" or (memory.budget == "free" and len(planner.levels) == 1)):
        return StepPlan(planner.levels[0], min(training.micro_batch_size or batch, batch), 0).apply(training)
    estimate = planner.estimate
    # The estimate includes the weights. They are on the device already, so they count as available. The process with
    # the least free memory decides for all, and the times of the first one.
    resident = estimate.weights + estimate.trained_weights
    free = all_reduce_min(int(available_bytes(device) * ALLOCATOR_SHARE), device)
    # Compiled blocks would be compiled again for every micro-batch size that is timed.
    timer = make_timer(model, training, planner.input_wh, device) if not training.compile else None
    plan = broadcast_object(plan_step(planner, batch, free + resident, timer))
    whole = estimate.peak_bytes(batch)
    budget = budget_bytes(planner, batch)
    if whole > min(free + resident, budget or free + resident):
        if budget is None or free + resident < budget:
            bound = f"only {_format(free + resident)} are free"
        else:
            bound = f"the budget is {_format(budget)} (training.memory_optimization.budget={memory.budget})"
        logger.info(
            f"Planned: the whole batch of {batch} at once would take {_format(whole)}, but {bound}; starting with"
            f" micro-batches of {plan.micro_batch} and gradient_checkpointing={plan.level}, which take"
            f" {_format(plan.peak_bytes)}."
        )
    return plan.apply(training)


def plan_step(planner: Planner, batch: int, free_bytes: int | None = None, timer: Timer | None = None) -> StepPlan:
    """Choose the fastest level of checkpointing, with its micro-batch size, whose step fits into the budget.

    Args:
        planner: planner of the configuration, whose level may be ``auto``.
        batch: windows per batch of a process.
        free_bytes: bytes that a step can take, weights included; ``None`` for no bound.
        timer: function that times a level on the device; ``None`` to take the level that recomputes the least.

    Raises:
        UserError: if no plan fits into an absolute budget.
    """
    training = planner.training
    budget = budget_bytes(planner, batch)
    limit = min((size for size in (budget, free_bytes) if size is not None), default=None)
    smallest = min(training.min_micro_batch_size, batch) if training.adaptive_micro_batch else batch
    if training.micro_batch_size is not None:
        smallest = batch = min(training.micro_batch_size, batch)
    plans: list[StepPlan] = []
    for level in planner.levels:
        estimate = planner.at(level).estimate
        fits = batch if limit is None else estimate.largest_micro_batch(limit, batch)
        if fits >= smallest:
            # As many micro-batches as the largest size requires, of equal size.
            size = max(smallest, math.ceil(batch / math.ceil(batch / fits)))
            # A level that recomputes more, but needs as many micro-batches, cannot be faster.
            if not plans or size > plans[-1].micro_batch:
                plans.append(StepPlan(level, size, estimate.peak_bytes(size)))
        if fits == batch:
            break  # further levels recompute more, and have nothing to gain
    if not plans:
        return _smallest_plan(planner, smallest, budget, free_bytes)
    if len(plans) == 1 or timer is None:
        return plans[0]
    timed = [replace(p, seconds=batch * timer(p.level, p.micro_batch)) for p in plans]
    # Of equal times, the plan that recomputes the most: if memory has run out at every level, all times are infinite.
    return min(reversed(timed), key=lambda plan: plan.seconds or 0.0)


def budget_bytes(planner: Planner, batch: int) -> int | None:
    """Return the bytes of the configured budget; ``None`` if it is all memory that is free.

    Only ``auto`` has a budget: a level of checkpointing that was chosen by hand runs as fast as it can.

    Args:
        planner: planner of the configuration.
        batch: windows per batch of a process.
    """
    memory = planner.training.memory_optimization
    budget = parse_budget(memory.budget) if memory.checkpointing == "auto" else Budget()
    if budget.share is not None:
        return int(budget.share * planner.full_fine_tuning().estimate.peak_bytes(batch))
    return budget.num_bytes


def _smallest_plan(planner: Planner, micro_batch: int, budget: int | None, free_bytes: int | None) -> StepPlan:
    """Return the plan that takes the least memory, for a budget into which none fits.

    Raises:
        UserError: if the budget is an absolute size that is free, but too small.
    """
    peaks = {level: planner.at(level).estimate.peak_bytes(micro_batch) for level in planner.levels}
    level = min(peaks, key=lambda level: peaks[level])
    plan = StepPlan(level, micro_batch, peaks[level])
    setting = planner.training.memory_optimization.budget
    if budget is not None and (free_bytes is None or plan.peak_bytes <= free_bytes):
        found = (
            f"training.memory_optimization.budget={setting} ({_format(budget)}) is less than the smallest step of"
            f" this configuration: {_format(plan.peak_bytes)}, with gradient_checkpointing={level} and"
            f" micro-batches of {micro_batch}"
        )
        if parse_budget(setting).num_bytes is not None:
            raise UserError(f"{found}.\n{planner.at(level).suggest_settings(micro_batch)}")
        logger.warning(f"{found}, which is used.")
    return plan


def _format(num_bytes: int) -> str:
    """Return a size in MB, or in GB from ten thousand MB on."""
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"

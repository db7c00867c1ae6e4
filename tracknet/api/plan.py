"""Tables and advice about the memory of a training step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich import box
from rich.table import Table

from tracknet.config import Config
from tracknet.planning.estimate import MemoryEstimate, usable_bytes
from tracknet.planning.planner import Planner
from tracknet.planning.step_plan import StepPlan, plan_step

# Modes that `tracknet plan` prints beside the requested one.
COMPARED = ("default", "frozen", "lora", "int8", "int8_full", "qlora")


@dataclass(frozen=True)
class PlannedMode:
    """Memory of a mode's training step, as planned for its budget.

    Attributes:
        planner: planner of the configuration, at the planned level of checkpointing.
        step: level, micro-batch size and peak.
    """

    planner: Planner
    step: StepPlan

    @property
    def estimate(self) -> MemoryEstimate:
        """Bytes of the step."""
        return self.planner.estimate


def plan_mode(config: Config, device: str = "cuda", free_bytes: int | None = None) -> PlannedMode:
    """Plan a configuration's training step for its budget.

    Args:
        config: complete configuration.
        device: ``cuda`` or ``cpu``.
        free_bytes: bytes that tensors can take; ``None`` for no bound besides the budget.
    """
    planner = planner_of(config, device)
    step = plan_step(planner, config.training.batch_size, free_bytes)
    return PlannedMode(planner.at(step.level), step)


def planner_of(config: Config, device: str = "cuda") -> Planner:
    """Return the memory planner of a configuration's training step on a ``cuda`` or ``cpu`` device."""
    return Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh, device)


def build_plan_table(rows: dict[str, PlannedMode], gpu_bytes: int | None) -> Table:
    """Return the table of memory peaks in MB, by mode and kind of memory.

    Args:
        rows: plans by the name of the mode; the requested mode is the first entry.
        gpu_bytes: memory in bytes for a column with the number of windows that fit at once; ``None`` omits the column.
    """
    first = next(iter(rows.values()))
    batch = first.planner.training.batch_size
    table = Table(
        title=f"Peak memory of a training step of {batch} windows, in MB",
        title_justify="left",
        caption=(
            "* requested; recompute: gradient_checkpointing; at once: windows per micro-batch. If several levels of\n"
            "checkpointing fit into the budget, training times them on the device and takes the fastest."
            + ("\nfit: windows that fit at once" if gpu_bytes else "")
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("mode", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    for column in ("at once", "weights", "trained", "grads", "optim.", "activ.", "temp.", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    if gpu_bytes is not None:
        table.add_column("fit", justify="right")
    for name, mode in rows.items():
        size = mode.step.micro_batch
        kinds = mode.estimate.bytes_by_kind(size).values()
        cells = [f"{b / 1e6:,.0f}" for b in (*kinds, mode.estimate.peak_bytes(size))]
        if gpu_bytes is not None:
            fits = mode.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
            cells.append(str(fits) if fits else "none")
        table.add_row(name, mode.step.level, str(size), *cells)
    return table


def describe_fit(mode: PlannedMode, batch: int, gpu_bytes: int) -> list[str]:
    """Return lines about the largest micro-batch that fits into a GPU, and about settings that make a larger one fit.

    Args:
        mode: plan of the configuration.
        batch: windows per batch.
        gpu_bytes: memory of the GPU in bytes.
    """
    planner = mode.planner
    fits = planner.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
    # Training takes equal micro-batches, which may be smaller than the largest that fits without being more.
    if fits and math.ceil(batch / fits) < math.ceil(batch / mode.step.micro_batch):
        return [f"More than the micro-batch of {mode.step.micro_batch} would fit: {fits} of {batch}."]
    if fits == batch:
        return [f"The whole batch of {batch} fits at once."]
    lines = [
        f"Fits in micro-batches of {fits}; training finds this size automatically."
        if fits
        else "Not even one window fits."
    ]
    # Each alternative changes one setting; only those that fit a larger micro-batch are worth printing.
    settings = []
    for setting, alternative in planner.alternatives():
        larger = alternative.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
        if larger > fits:
            window_mb = alternative.estimate.bytes_per_window(larger) / 1e6
            settings.append(f"  {setting}: {larger} windows at once, {window_mb:,.0f} MB per window")
    if not settings:
        return [*lines, "No setting makes more windows fit: use a smaller backbone."]
    return [*lines, "To fit more windows:", *settings]

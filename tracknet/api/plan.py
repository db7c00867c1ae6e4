"""Tables and advice on how much memory a training step takes."""

from __future__ import annotations

from rich import box
from rich.table import Table

from tracknet.config import Config
from tracknet.planning.estimate import MemoryEstimate, usable_bytes
from tracknet.planning.planner import Planner

COMPARED = ("default", "int8", "int8_full", "qlora")


def planner_of(config: Config, device: str = "cuda") -> Planner:
    """Return the planner of the step that a configuration describes, on ``cuda`` or ``cpu``."""
    return Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh, device)


def build_plan_table(rows: dict[str, tuple[Config, MemoryEstimate]], gpu_bytes: int | None) -> Table:
    """Build the table of peaks by kind.

    Args:
        rows: configuration and estimate by the name of the mode; the first is the one that was asked for.
        gpu_bytes: memory that a column says how many windows fit into, or ``None``.
    """
    first, _ = next(iter(rows.values()))
    batch = first.training.batch_size
    table = Table(
        title=f"Peak of a training step at {batch} windows at once, in MB",
        title_justify="left",
        caption="* asked for" + ("; fit: windows that fit at once" if gpu_bytes else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("mode", no_wrap=True)
    for column in ("weights", "trained", "grads", "optim.", "activ.", "temp.", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    if gpu_bytes is not None:
        table.add_column("fit", justify="right")
    for name, (_, estimate) in rows.items():
        kinds = estimate.bytes_by_kind(batch).values()
        cells = [f"{b / 1e6:,.0f}" for b in (*kinds, estimate.peak_bytes(batch))]
        if gpu_bytes is not None:
            fits = estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
            cells.append(str(fits) if fits else "none")
        table.add_row(name, *cells)
    return table


def describe_fit(planner: Planner, batch: int, gpu_bytes: int) -> list[str]:
    """Return lines on what fits into a GPU's memory at once, and what would make a larger micro-batch fit."""
    fits = planner.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
    if fits == batch:
        return [f"The whole batch of {batch} fits at once."]
    lines = [
        f"Fits in micro-batches of {fits}; training finds that by itself." if fits else "Not even one window fits."
    ]
    settings = []
    for setting, other in planner.alternatives():
        larger = other.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
        if larger > fits:
            window_mb = other.estimate.bytes_per_window(larger) / 1e6
            settings.append(f"  {setting}: {larger} at once, a window takes {window_mb:,.0f} MB")
    if not settings:
        return [*lines, "No setting makes more fit: take a smaller backbone."]
    return [*lines, "To fit more:", *settings]

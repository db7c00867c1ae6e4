"""Say how much memory a training takes, before it is started: no GPU, no weights, seconds.

    tracknet plan --data tracknet --model vit_heatmap --training qlora --gpu-memory 8GB
    tracknet plan --data tracknet --model vit_heatmap --training qlora \\
        model.backbone.name=facebook/dinov2-large training.batch_size=16

Prints the peak by kind for the mode asked for and for the others beside it, and, with --gpu-memory, the largest
micro-batch that fits and what would make more fit. One step of the real model is run on tensors without content, so any
size of model is planned alike.
"""

from __future__ import annotations

import re
from pathlib import Path

from rich import box
from rich.table import Table

from tracknet.config import Config, compose
from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.planning.estimate import MemoryEstimate, usable_bytes
from tracknet.planning.planner import Planner
from tracknet.reporting.console import echo, get_console
from tracknet.reporting.report import plot_estimates
from tracknet.scripts.command_line import Parser, existing_or_new_json, run_command

COMPARED = ("default", "int8", "int8_full", "qlora")
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _plan(argv))


def _plan(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "plan")
    parser.add_choices("data", "model", "training")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="such as 8GB or 24GiB: what must it fit into?")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the bars into this picture")
    parser.add_argument("--json", metavar="FILE", help="write the plan of the mode asked for as one JSON object")
    args, overrides = parser.parse(argv)
    json_file, gpu_bytes = existing_or_new_json(args.json), parse_size(args.gpu_memory)
    if args.out is not None and (args.out.suffix.lower() != ".png" or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: give a .png in a folder that exists.")
    config = compose(args.data, args.model, args.training, overrides, args.config_dir)
    planner = planner_of(config)
    estimate = planner.estimate
    rows = {f"{args.training} *": (config, estimate)}
    for name in COMPARED if config.model.backbone is not None else ():
        # The others with the same data, model and batch, each with its own YAML otherwise.
        shared = [o for o in overrides if not o.startswith("training.")] + [
            f"training.batch_size={config.training.batch_size}"
        ]
        other = compose(args.data, args.model, name, shared, args.config_dir)
        if other != config:
            rows[name] = (other, estimate_of(other))
    _print_table(rows, gpu_bytes)
    batch = config.training.batch_size
    result = {
        "peak_bytes": estimate.peak_bytes(batch),
        "bytes_by_kind": estimate.bytes_by_kind(batch),
        "batch_size": batch,
        "bytes_per_window": estimate.bytes_per_window(batch),
        "largest_micro_batch": None,
    }
    if gpu_bytes is not None:
        result["largest_micro_batch"] = estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
        _advise(planner, batch, gpu_bytes)
    if args.out is not None:
        plot_estimates(
            {name: f.bytes_by_kind(c.training.batch_size) for name, (c, f) in rows.items()}, gpu_bytes, args.out
        )
        echo(f"wrote {args.out}")
    if json_file:
        write_json(json_file, result)
    return 0


def estimate_of(config: Config) -> MemoryEstimate:
    """Estimate the step that a configuration describes."""
    return planner_of(config).estimate


def planner_of(config: Config) -> Planner:
    """Return the planner of a configuration."""
    return Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh)


def parse_size(text: str | None) -> int | None:
    """Turn ``8GB`` or ``24GiB`` into bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--gpu-memory {text}: give a size such as 8GB or 24GiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _print_table(rows: dict[str, tuple[Config, MemoryEstimate]], gpu_bytes: int | None) -> None:
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
    get_console().print(table)


def _advise(planner: Planner, batch: int, gpu_bytes: int) -> None:
    """Say what would make a larger micro-batch fit."""
    fits = planner.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
    if fits == batch:
        echo(f"The whole batch of {batch} fits at once.")
        return
    echo(f"Fits in micro-batches of {fits}; training finds that by itself." if fits else "Not even one window fits.")
    advice = []
    for setting, other in planner.alternatives():
        larger = other.estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
        if larger > fits:
            advice.append(
                f"{setting}: {larger} at once, a window takes {other.estimate.bytes_per_window(larger) / 1e6:,.0f} MB"
            )
    echo("To fit more:\n  " + "\n  ".join(advice) if advice else "No setting makes more fit: take a smaller backbone.")


if __name__ == "__main__":
    raise SystemExit(main())

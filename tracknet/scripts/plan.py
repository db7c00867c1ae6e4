"""Estimate the memory of a training step before it starts, in seconds, without a GPU and without weights.

    tracknet plan --data tracknet --model vit_heatmap --training qlora --gpu-memory 8GB
    tracknet plan --data tracknet --model vit_heatmap --training qlora \\
        model.backbone.name=facebook/dinov2-large training.batch_size=16

Prints the peak by kind of memory for the requested mode and, for comparison, for the other modes. With --gpu-memory,
also prints the largest micro-batch that fits, and the settings that make a larger one fit. The estimate runs one step
of the real model on fake tensors, which have no content, so a model of any size can be planned.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.reporting.console import echo, get_console
from tracknet.scripts.command_line import Parser, existing_or_new_json, parse_size, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _plan(argv))


def _plan(argv: list[str] | None) -> int:
    """Parse the arguments and print the plan; return the exit code."""
    parser = Parser(__doc__, "plan")
    parser.add_choices("data", "model", "training")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of the GPU, such as 8GB or 24GiB")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw a bar chart of the peaks to this file")
    parser.add_argument(
        "--json", metavar="FILE", help="write the plan of the requested mode to this file as a JSON object"
    )
    args, overrides = parser.parse(argv)
    json_file, gpu_bytes = existing_or_new_json(args.json), parse_size(args.gpu_memory)
    if args.out is not None and (args.out.suffix.lower() != ".png" or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: use a file name that ends in .png, in an existing folder.")
    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.plan import COMPARED, build_plan_table, describe_fit, plan_mode
    from tracknet.config import compose
    from tracknet.planning.estimate import usable_bytes
    from tracknet.reporting.report import plot_estimates

    config = compose(args.data, args.model, args.training, overrides, args.config_dir)
    free = usable_bytes(gpu_bytes) if gpu_bytes is not None else None
    requested = plan_mode(config, free_bytes=free)
    estimate, step = requested.estimate, requested.step
    rows = {f"{args.training} *": requested}
    for name in COMPARED if config.model.backbone is not None else ():
        # The other modes share data, model and batch size with the requested one; the rest comes from their own YAML.
        shared = [o for o in overrides if not o.startswith("training.")] + [
            f"training.batch_size={config.training.batch_size}"
        ]
        mode_config = compose(args.data, args.model, name, shared, args.config_dir)
        if mode_config != config:
            rows[name] = plan_mode(mode_config, free_bytes=free)
    get_console().print(build_plan_table(rows, gpu_bytes))
    batch = config.training.batch_size
    result = {
        "peak_bytes": step.peak_bytes,
        "bytes_by_kind": estimate.bytes_by_kind(step.micro_batch),
        "batch_size": batch,
        "gradient_checkpointing": step.level,
        "micro_batch_size": step.micro_batch,
        "bytes_per_window": estimate.bytes_per_window(step.micro_batch),
        "largest_micro_batch": None,
    }
    if gpu_bytes is not None:
        result["largest_micro_batch"] = estimate.largest_micro_batch(usable_bytes(gpu_bytes), batch)
        for line in describe_fit(requested, batch, gpu_bytes):
            echo(line)
    if args.out is not None:
        plot_estimates(
            {name: row.estimate.bytes_by_kind(row.step.micro_batch) for name, row in rows.items()}, gpu_bytes, args.out
        )
        echo(f"wrote {args.out}")
    if json_file:
        write_json(json_file, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

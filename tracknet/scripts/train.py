"""Train a model, or resume a run.

    tracknet train --data synthetic --model vit_tiny_heatmap --training qlora
    tracknet train --data tracknet --model vit_heatmap --training int8 training.batch_size=8 training.optimizer.lr=3e-4
    tracknet train --resume outputs/runs/<id>

Writes <output-dir>/runs/<run_id>/ (config.yaml, last/, best/, metrics.json) and TensorBoard files to
<output-dir>/logs/<run_id>/.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.scripts.command_line import (
    Parser,
    check_writable,
    existing_or_new_json,
    print_config,
    run_command,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    """Parse the arguments, then train or resume a run; return the exit code."""
    parser = Parser(__doc__, "train")
    parser.add_choices("data", "model", "training", required=False)
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", default=None, help="folder for runs and logs (default: outputs)"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of initial weights, order, augmentation and dropout (default: 0)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder exactly from its checkpoint last/"
    )
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="save the frozen backbone weights with the run, instead of a reference to their base",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--json", metavar="FILE", help="write the result to this file as a JSON object")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.train import new_run, train_run
    from tracknet.config import Config, compose, load_config
    from tracknet.config.changes import changeable_settings, find_unchangeable
    from tracknet.runs.load import check_base_override, keep_own_cache
    from tracknet.training.checkpoint import find_checkpoint
    from tracknet.training.state import load_state

    json_file = existing_or_new_json(args.json)
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.self_contained:
        overrides.append("training.self_contained=true")
    if args.resume is not None:
        # A resumed run keeps its saved configuration; only settings marked as changeable on resume may be overridden.
        given = [
            flag
            for flag, value in (
                ("--data", args.data),
                ("--model", args.model),
                ("--training", args.training),
                ("--output-dir", args.output_dir),
                ("--config-dir", args.config_dir),
            )
            if value
        ]
        if given:
            raise UserError(f"--resume uses the saved configuration of the run; remove {', '.join(given)}.")
        if (override := find_unchangeable(Config, "resume", overrides)) is not None:
            raise UserError(
                f"--resume continues a run unchanged, but '{override}' would change it. Settings that may be changed: "
                f"{', '.join(changeable_settings(Config, 'resume'))}."
            )
        overrides += _plan_again(overrides)
        check_base_override(load_state(find_checkpoint(args.resume, "last", "--resume "))["backbone"], overrides)
        config = keep_own_cache(load_config(args.resume / "config.yaml", overrides), overrides)
    else:
        if missing := [f"--{f}" for f in ("data", "model", "training") if not getattr(args, f)]:
            parser.error(
                f"{', '.join(missing)} missing; for example, use: tracknet train --data synthetic --model "
                "vit_tiny_heatmap --training qlora"
            )
        config = compose(args.data, args.model, args.training, overrides, args.config_dir)
    if args.dry_run:
        print_config(config)
        return 0
    output_dir = args.output_dir or Path("outputs")
    check_writable(args.resume or output_dir, "--resume" if args.resume else "--output-dir")
    # Resolved to an absolute path: logs are written relative to the run's grandparent, and RUN may be a bare name or a
    # dot.
    run = args.resume.resolve() if args.resume else new_run(output_dir, f"{args.data}-{args.model}-{args.training}")
    result = train_run(config, run, resume=args.resume is not None)
    if json_file:
        write_json(json_file, result)
    return 0


def _plan_again(overrides: list[str]) -> list[str]:
    """Return the overrides that make a resumed run plan its steps again, if an override changes its memory settings.

    A run records the level of checkpointing and the micro-batch size that were planned, which would otherwise stay.
    """
    planned = ("training.memory_optimization.gradient_checkpointing=", "training.micro_batch_size=")
    changes = any(override.startswith("training.memory_optimization.") for override in overrides)
    if not changes or any(override.startswith(planned) for override in overrides):
        return []
    return [f"{planned[0]}auto", f"{planned[1]}null"]


if __name__ == "__main__":
    raise SystemExit(main())

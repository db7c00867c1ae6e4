"""Score a run on a split, in source-image pixels.

    tracknet evaluate --run outputs/runs/<id>
    tracknet evaluate --run outputs/runs/<id> --data tracknet --split val evaluation.tolerance_px=10

Prints a table and writes a JSON, a plot and a sheet of the worst frames to <run>/report/.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.config.names import config_names
from tracknet.errors import UserError
from tracknet.files import expand_user, write_json
from tracknet.scripts.command_line import LOADABLE_HELP, Parser, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "evaluate", LOADABLE_HELP)
    parser.add_argument(
        "--run",
        metavar="RUN",
        required=True,
        help="folder of the run, its hub id (owner/name), or embedded/vit_tiny_heatmap, which ships with this package",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which state of it (default: best)"
    )
    parser.add_argument(
        "--data", metavar="NAME", help=f"another dataset: {', '.join(config_names('data'))}, or one of your own"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder with data/ of your own")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="which games (default: test)")
    parser.add_argument("--json", metavar="FILE", help="write the scores as one JSON object")
    args, overrides = parser.parse(argv)

    # Imported once the arguments are known to be right: torch takes seconds, help does not.
    from tracknet.api.evaluate import evaluate_split
    from tracknet.config import compose_data
    from tracknet.runs.load import load_run, locate_run
    from tracknet.tracking.predictor import Predictor

    json_file = existing_or_new_json(args.json)
    if args.config_dir and not args.data:
        raise UserError("--config-dir is where --data looks; without --data the run's own data section is used.")
    for override in overrides:
        if args.data and override.startswith(("data.preprocess.", "data.sequence.")):
            raise UserError(
                f"'{override}': with --data, frames are resized and grouped as the run's model was trained to see them."
            )
    other = [o for o in overrides if not o.startswith("data.")] if args.data else overrides
    run = locate_run(args.run)
    # The hub's cache and this package are no places for reports.
    reported = run if run == expand_user(args.run, "run") else Path("outputs") / "hub" / args.run
    config, model, device = load_run(run, args.checkpoint, other)
    data = config.data
    if args.data:
        data = compose_data(args.data, [o for o in overrides if o.startswith("data.")], args.config_dir)
        data = data.seen_as(config.data)
    predictor = Predictor(model, device, config.training.micro_batching(config.evaluation.batch_size))
    scores = evaluate_split(
        config,
        data,
        args.split,
        predictor,
        reported,
        f"{args.data or 'run'}{'_last' if args.checkpoint == 'last' else ''}",
        # Data that the command did not name is the run's, and a run may be a stranger's.
        render=bool(args.data) or any(o.startswith("data.root=") for o in overrides),
    )
    if json_file:
        write_json(json_file, scores)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

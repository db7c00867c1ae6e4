"""Score a run on a split, in pixels of the source images.

    tracknet evaluate --run outputs/runs/<id>
    tracknet evaluate --run outputs/runs/<id> --data tracknet --split val evaluation.tolerance_px=10

Prints a table, and writes a JSON file, a plot and a sheet of the worst frames to <run>/report/.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.config.names import config_names
from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.scripts.command_line import LOADABLE_HELP, Parser, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    """Parse the arguments and score the run; return the exit code."""
    parser = Parser(__doc__, "evaluate", LOADABLE_HELP)
    parser.add_argument(
        "--run",
        metavar="RUN",
        required=True,
        help="folder of the run, its hub id (owner/name), or embedded/vit_tiny_heatmap, which ships with this package",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run (default: best)"
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        help=f"another dataset: {', '.join(config_names('data'))}, or one of your own (default: the run's dataset)",
    )
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="folder with your own data configurations, in data/"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="split to score (default: test)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores to this file as a JSON object")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.evaluate import evaluate_split
    from tracknet.config import compose_data
    from tracknet.runs.load import load_run, locate_run, report_folder
    from tracknet.tracking.predictor import Predictor

    json_file = existing_or_new_json(args.json)
    if args.config_dir and not args.data:
        raise UserError(
            "--config-dir is searched for --data, but --data is not set: add --data NAME. Without it, the run's own"
            " data section is used."
        )
    for override in overrides:
        if args.data and override.startswith(("data.preprocess.", "data.sequence.")):
            raise UserError(
                f"'{override}' cannot be set together with --data: frames are resized and grouped into windows as in"
                " the training of the run. Remove it."
            )
    # With --data, the data.* overrides belong to the other dataset, not to the run.
    run_overrides = [o for o in overrides if not o.startswith("data.")] if args.data else overrides
    run = locate_run(args.run)
    config, model, device = load_run(run, args.checkpoint, run_overrides)
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
        report_folder(args.run, run),
        f"{args.data or 'run'}{'_last' if args.checkpoint == 'last' else ''}",
        # Only into a folder that the command line names: data.root of an untrusted run must not choose where to write.
        render=bool(args.data) or any(o.startswith("data.root=") for o in overrides),
    )
    if json_file:
        write_json(json_file, scores)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Score a run on a split, in source-image pixels.

    tracknet evaluate --run outputs/runs/<id>
    tracknet evaluate --run outputs/runs/<id> --data tracknet --split val evaluation.tolerance_px=10

Prints a table and writes a JSON, a plot and a sheet of the worst frames to <run>/report/.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tracknet.config import Config, compose_data, config_names
from tracknet.data.clips import WindowDataset, describe, num_workers
from tracknet.data.config import DataConfig
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.files import expand_user, write_json
from tracknet.inference.load import LOADABLE, load_run, locate_run
from tracknet.inference.report import build_table, draw_worst, plot_scores
from tracknet.metrics import score
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.predictor import Predictor, score_windows
from tracknet.reporting.console import echo, get_console
from tracknet.scripts.command_line import Parser, check_writable, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "evaluate", LOADABLE)
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
        # What the model was trained to see does not depend on whom it is tried on.
        data = dataclasses.replace(data, preprocess=config.data.preprocess, sequence=config.data.sequence)
    predictor = Predictor(model, device, config.training.micro_batching(config.evaluation.batch_size))
    scores = evaluate(
        config,
        data,
        args.split,
        model,
        predictor,
        reported,
        f"{args.data or 'run'}{'_last' if args.checkpoint == 'last' else ''}",
        # Data that the command did not name is the run's, and a run may be a stranger's.
        render=bool(args.data) or any(o.startswith("data.root=") for o in overrides),
    )
    if json_file:
        write_json(json_file, scores)
    return 0


def evaluate(
    config: Config,
    data: DataConfig,
    split: str,
    model: HeatmapModel,
    predictor: Predictor,
    run: Path,
    name: str,
    render: bool = False,
) -> dict:
    """Score a model on a split and write the report.

    Args:
        config: of the run.
        data: what to score on.
        split: ``train``, ``val`` or ``test``.
        model: the run's model.
        predictor: runs it.
        run: its folder; the report goes into ``report`` in it.
        name: prefix of the report's files, with the split.
        render: whether synthetic data may be rendered into ``data.root``; see ``open_dataset``.

    Returns:
        What ``metrics.score`` returns, with ``run``, ``data_root`` and ``split``.
    """
    report = run / "report"
    if report.is_symlink():
        raise UserError(
            f"--run {run}: its report/ is a link to another place, and a run does not choose where this machine writes:"
            " remove it."
        )
    check_writable(report / "scores.json", "--run")
    clips = read_split(data, split, render=render)
    echo(describe(clips, split, data.occluded))
    settings = config.evaluation
    dataset = WindowDataset(clips, data, training=False, stride=settings.stride)
    results = score_windows(
        predictor,
        dataset,
        settings,
        num_workers(data, predictor.device),
        description="Scoring",
    )
    scores = {
        "run": str(run),
        "data_root": data.root,
        "split": split,
        **score(results, settings.tolerance_px, settings.threshold),
    }
    get_console().print(build_table(scores, f"{run.name}: {split}, tolerance {settings.tolerance_px:g} px"))
    report.mkdir(parents=True, exist_ok=True)
    files = {kind: report / f"{name}_{split}_{kind}" for kind in ("scores.json", "curves.png", "worst.png")}
    write_json(files["scores.json"], scores)
    plot_scores(scores, results, files["curves.png"])
    draw_worst(results, dataset, settings.tolerance_px, settings.threshold, files["worst.png"])
    for path in files.values():
        echo(f"wrote {path}")
    return scores


if __name__ == "__main__":
    raise SystemExit(main())

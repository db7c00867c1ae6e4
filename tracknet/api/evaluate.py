"""Score a model on a split and write the report."""

from __future__ import annotations

import logging
from pathlib import Path

from tracknet.config import Config
from tracknet.data.clips import WindowDataset, describe, num_workers
from tracknet.data.config import DataConfig, Split
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.files import check_writable, write_json
from tracknet.reporting.console import render_table
from tracknet.reporting.report import build_table, draw_worst, plot_scores
from tracknet.tracking.metrics import score
from tracknet.tracking.predictor import Predictor, score_windows

logger = logging.getLogger(__name__)


def evaluate_split(
    config: Config,
    data: DataConfig,
    split: Split,
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
    logger.info(describe(clips, split, data.occluded))
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
    title = f"{run.name}: {split}, tolerance {settings.tolerance_px:g} px"
    logger.info(render_table(build_table(scores, title)))
    report.mkdir(parents=True, exist_ok=True)
    files = {kind: report / f"{name}_{split}_{kind}" for kind in ("scores.json", "curves.png", "worst.png")}
    write_json(files["scores.json"], scores)
    plot_scores(scores, results, files["curves.png"])
    draw_worst(results, dataset, settings.tolerance_px, settings.threshold, files["worst.png"])
    for path in files.values():
        logger.info(f"wrote {path}")
    return scores

"""Evaluation of a model on a split, with its report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tracknet.config import Config
from tracknet.data.clips import WindowDataset, describe, num_workers
from tracknet.data.config import DataConfig, Split
from tracknet.data.labels import Clip
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
    clips: Sequence[Clip] | None = None,
) -> dict:
    """Score a model on a split and write the report.

    Args:
        config: configuration of the run.
        data: data section of the dataset to score on.
        split: ``train``, ``val`` or ``test``.
        predictor: predictor of the model to score.
        run: folder of the run; the report is written to its subfolder ``report``.
        name: prefix of the report's file names; the split is appended to it.
        render: whether synthetic data may be rendered into ``data.root``; see ``open_dataset``.
        clips: clips to score instead of those of the split.

    Returns:
        The scores of ``metrics.score``, with ``run``, ``data_root`` and ``split``.

    Raises:
        UserError: if the report cannot be written, or ``report`` is a symbolic link.
    """
    report = run / "report"
    # A downloaded run could contain a link that redirects the report to any file of this machine.
    if report.is_symlink():
        raise UserError(
            f"--run {run}: report/ is a symbolic link, and a run may not redirect where this machine writes."
            " Remove the link."
        )
    # Checked before scoring, so that an unwritable folder is reported at once.
    check_writable(report / "scores.json", "--run")
    clips = read_split(data, split, render=render) if clips is None else list(clips)
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

"""Accuracy of training modes: same seeds, order and steps, scored on whole frames of the test split.

A learning rate that suits one mode can be wrong for another, so a comparison may search it first: every mode is trained
with the same multiples of its own rate, and the validation split selects one.
"""

from __future__ import annotations

import logging
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tracknet.benchmark.variants import LEVEL, Subject
from tracknet.config import Config, load_config
from tracknet.data.clips import WindowDataset, num_workers
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.files import read_json
from tracknet.runs.load import load_run
from tracknet.tracking.metrics import FrameResult, score
from tracknet.tracking.predictor import Predictor, score_windows

logger = logging.getLogger(__name__)

BLOCK = 20  # frames per bootstrap block; errors of neighboring frames are correlated, so they are resampled together
DRAWS = 2000  # bootstrap resamples


@dataclass(frozen=True)
class AccuracyPlan:
    """Training runs of an accuracy comparison.

    Attributes:
        seeds: number of seeds, and of scored runs per mode.
        steps: number of optimizer steps per run.
        lr_scales: factors of each mode's learning rate that are tried with seed 0. The one with the best F1 on the
            validation split is used for all seeds.
    """

    seeds: int
    steps: int
    lr_scales: tuple[float, ...] = (1.0,)


def accuracy_config(subject: Subject, mode: str, seed: int, plan: AccuracyPlan, lr_scale: float = 1.0) -> Config:
    """Return a mode's configuration for a short training run.

    Gradient checkpointing is off, because it takes time and does not change the result. There is one validation, at
    the end. Training uses crops of half the width and height, unless the user overrides ``data.augment.crop``.

    Args:
        subject: data and model of the benchmark.
        mode: name of the training section.
        seed: seed of the run.
        plan: training runs of the comparison.
        lr_scale: factor of the mode's learning rate.
    """
    config = subject.compose(mode)
    changes = [
        f"training.max_steps={plan.steps}",
        f"seed={seed}",
        "training.validate_every_epochs=1000000",
    ]
    if len(plan.lr_scales) == 1:
        changes.append("training.limit_val_batches=1")  # nothing is selected, so the validation only takes time
    if lr_scale != 1:
        changes.append(f"training.optimizer.lr={config.training.optimizer.lr * lr_scale!r}")
    if config.model.backbone is not None:
        changes.append(f"{LEVEL}=none")
    if not any(o.startswith("data.augment.crop=") for o in subject.overrides):
        changes.append(f"data.augment.crop={quarter(config)}")
    return subject.compose(mode, *changes)


def quarter(config: Config) -> str:
    """Return half the width and height of the training frames as the value of an override, ``"[w,h]"``.

    Both are rounded to multiples of 8 and are at least 32.
    """
    width, height = (max(32, round(side / 16) * 8) for side in config.data.training_wh)
    return f"[{width},{height}]"


def measure_accuracy(
    subject: Subject, modes: list[str], plan: AccuracyPlan, train: Callable[[Config, Path], dict], folder: Path
) -> list[dict]:
    """Train every mode with every seed and score it on the test split.

    Runs that ``folder`` contains already are not trained again, so an interrupted comparison continues.

    Args:
        subject: data and model of the benchmark.
        modes: names of the modes; the first one is the reference.
        plan: training runs of the comparison.
        train: function that trains a configuration into a folder and returns the content of ``metrics.json``.
        folder: folder for the runs.

    Returns:
        One row per mode, see ``summarize``, with the learning rate as ``lr``. If it was searched, ``val_f1_by_lr`` is
        the F1 on the validation split by learning rate.

    Raises:
        UserError: if a run ends before ``plan.steps`` steps.
    """
    results: dict[str, list[list[FrameResult]]] = {mode: [] for mode in modes}
    searches: dict[str, dict[float, float]] = {}  # by mode: F1 on the validation split by factor of the learning rate
    best: dict[str, float] = {}
    # Search the learning rates first, so that all modes are compared at every seed even if time runs out later.
    for mode in modes:
        if len(plan.lr_scales) > 1:
            runs = {x: _trained(subject, mode, 0, plan, x, train, folder) for x in plan.lr_scales}
            searches[mode] = {x: run["val_f1_strict"] for x, run in runs.items()}
            logger.info(f"{mode}: validation F1 by factor of the learning rate: {searches[mode]}")
        best[mode] = max(plan.lr_scales, key=lambda x: searches.get(mode, {}).get(x, 0.0))
    tolerance = threshold = 0.0
    for seed in range(plan.seeds):
        for mode in modes:
            result = _trained(subject, mode, seed, plan, best[mode], train, folder)
            # The best checkpoint is scored, loaded from disk as a user would load it.
            config, model, device = load_run(Path(result["run"]))
            settings = config.evaluation
            tolerance, threshold = settings.tolerance_px, settings.threshold
            test_set = WindowDataset(
                read_split(config.data, "test"), config.data, training=False, stride=settings.stride
            )
            predictor = Predictor(model, device, config.training.micro_batching(settings.batch_size))
            results[mode].append(score_windows(predictor, test_set, settings, num_workers(config.data, device)))
            scores = score(results[mode][-1], tolerance, threshold)
            logger.info(f"{mode}, seed {seed}: F1 {scores['f1_strict']:.3f} (strict, {tolerance:g} px)")
    rows = summarize(results, tolerance, threshold)
    for row in rows:
        mode, rate = row["name"], subject.compose(row["name"]).training.optimizer.lr
        row["lr"] = rate * best[mode]
        if mode in searches:
            row["val_f1_by_lr"] = [[rate * x, f1] for x, f1 in searches[mode].items()]
    return rows


def _trained(
    subject: Subject,
    mode: str,
    seed: int,
    plan: AccuracyPlan,
    lr_scale: float,
    train: Callable[[Config, Path], dict],
    folder: Path,
) -> dict:
    """Return the content of ``metrics.json`` of a run, which is trained unless the folder contains it already."""
    config = accuracy_config(subject, mode, seed, plan, lr_scale)
    run = folder / "runs" / f"{mode}-lr{lr_scale:g}-{seed}"
    if (run / "metrics.json").exists():
        saved = load_config(run / "config.yaml")
        # The run records the plan of its steps, which does not change the result.
        training = replace(
            saved.training,
            micro_batch_size=config.training.micro_batch_size,
            memory_optimization=config.training.memory_optimization,
        )
        if replace(saved, training=training) != config:
            raise UserError(f"{run} was trained with other settings: give another folder (--runs), or delete it.")
        return {**read_json(run / "metrics.json", 1_000_000), "run": str(run)}
    # A run without results was interrupted. It is short, so it starts again.
    shutil.rmtree(run, ignore_errors=True)
    result = train(config, run)
    if result["steps"] != plan.steps:
        raise UserError(
            f"--steps {plan.steps}: {mode} ended after {result['steps']} steps; use fewer steps, or increase"
            " training.epochs."
        )
    return result


def summarize(results: dict[str, list[list[FrameResult]]], tolerance_px: float, threshold: float) -> list[dict]:
    """Average the strict F1 over seeds, with 95 % bootstrap intervals.

    The bootstrap (Efron, 1979) resamples seeds and blocks of neighboring frames. Each resample uses the same seeds and
    blocks for all modes, so that their common variation cancels in the ratio.

    Args:
        results: frame results by mode and seed; all contain the same frames in the same order.
        tolerance_px: maximum distance of a true positive, in pixels.
        threshold: minimum confidence of a detection.

    Returns:
        One row per mode: ``f1`` (mean over seeds), ``f1_by_seed``, ``f1_10px`` (mean at a tolerance of 10 pixels),
        ``interval``, and except for the first mode ``relative`` (ratio to the first mode) and ``relative_interval``,
        both ``None`` if the first mode finds too little for a ratio.
    """
    # Arrays [seed, block, 2]: numerator and denominator of the F1 add up over blocks, so a resample is a sum of terms.
    terms = {
        mode: np.stack([_f1_terms(frames, tolerance_px, threshold) for frames in seed_results])
        for mode, seed_results in results.items()
    }
    first = next(iter(terms.values()))
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {mode: [] for mode in terms}
    for _ in range(DRAWS):
        seeds = rng.integers(first.shape[0], size=first.shape[0])
        blocks = rng.integers(first.shape[1], size=first.shape[1])
        for mode, mode_terms in terms.items():
            numerator, denominator = mode_terms[seeds][:, blocks].sum(axis=(0, 1))
            draws[mode].append(numerator / max(denominator, 1))
    rows = []
    reference = next(iter(draws))
    means = {}
    for mode, mode_terms in terms.items():
        by_seed = [float(numerator / max(denominator, 1)) for numerator, denominator in mode_terms.sum(axis=1)]
        means[mode] = statistics.mean(by_seed)
        f1_10px = statistics.mean(score(frames, 10.0, threshold)["f1_strict"] for frames in results[mode])
        row = {
            "name": mode,
            "f1": means[mode],
            "f1_by_seed": by_seed,
            "f1_10px": f1_10px,
            "interval": _interval(draws[mode]),
        }
        if mode != reference:
            # Resamples in which the reference scores zero have no ratio; with too few left there is no interval.
            ratios = [a / b for a, b in zip(draws[mode], draws[reference]) if b > 0]
            row["relative"] = means[mode] / means[reference] if means[reference] else None
            row["relative_interval"] = _interval(ratios) if len(ratios) > DRAWS / 2 else None
        rows.append(row)
    return rows


def _f1_terms(frames: list[FrameResult], tolerance_px: float, threshold: float) -> np.ndarray:
    """Return numerator and denominator of the strict F1 by block: ``[block, 2]``, 2 TP and 2 TP + 2 FP1 + FP2 + FN."""
    counts = {"TP": (2, 2), "FP1": (0, 2), "FP2": (0, 1), "FN": (0, 1), "TN": (0, 0)}
    frame_terms = np.array([counts[r.outcome(tolerance_px, threshold)] for r in frames], dtype=float)
    starts: list[int] = []
    for i, r in enumerate(frames):
        # A block never extends over the end of a clip.
        if not starts or i - starts[-1] == BLOCK or frames[i - 1].clip != r.clip:
            starts.append(i)
    return np.add.reduceat(frame_terms, starts)


def _interval(values: list[float]) -> list[float]:
    """Return the 2.5th and the 97.5th percentile."""
    return [float(v) for v in np.percentile(values, (2.5, 97.5))]

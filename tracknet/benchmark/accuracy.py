"""How well modes learn: the same seeds, order and steps, scored on whole frames of the test split."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tracknet.benchmark.variants import LEVEL, Subject
from tracknet.config import Config
from tracknet.data.clips import WindowDataset, num_workers
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.runs.load import load_run
from tracknet.tracking.metrics import FrameResult, score
from tracknet.tracking.predictor import Predictor, score_windows

logger = logging.getLogger(__name__)

BLOCK = 20  # neighboring frames fail together: they are drawn together
DRAWS = 2000


def accuracy_config(subject: Subject, mode: str, seed: int, steps: int) -> Config:
    """A mode's configuration for a short run of so many steps: no checkpointing, which changes no result and costs
    time; one validation, at the end; and, unless the user says otherwise, crops of half the width and height."""
    changes = [
        f"training.max_steps={steps}",
        f"seed={seed}",
        "training.validate_every_epochs=1000000",
        "training.limit_val_batches=1",
    ]
    config = subject.compose(mode, *changes)
    if config.model.backbone is not None:
        changes.append(f"{LEVEL}=none")
    if not any(o.startswith("data.augment.crop=") for o in subject.overrides):
        changes.append(f"data.augment.crop={quarter(config)}")
    return subject.compose(mode, *changes)


def quarter(config: Config) -> str:
    """Half the width and height that training sees, as an override says it."""
    width, height = (max(32, round(side / 16) * 8) for side in config.data.training_wh)
    return f"[{width},{height}]"


def measure_accuracy(
    subject: Subject,
    modes: list[str],
    seeds: int,
    steps: int,
    train: Callable[[Config, Path], dict],
    folder: Path,
) -> list[dict]:
    """Train every mode with every seed and score it.

    Args:
        subject: what on.
        modes: the first is what the others are compared with.
        seeds: how many.
        steps: of each run.
        train: trains a configuration into a folder and returns what the run says of itself.
        folder: for the runs.

    Returns:
        By mode, see ``summarize``.

    Raises:
        UserError: a run could not take as many steps.
    """
    results: dict[str, list[list[FrameResult]]] = {mode: [] for mode in modes}
    tolerance = threshold = 0.0
    for seed in range(seeds):
        for mode in modes:
            config = accuracy_config(subject, mode, seed, steps)
            result = train(config, folder / "runs" / f"{mode}-{seed}")
            if result["steps"] != steps:
                raise UserError(
                    f"--steps {steps}: {mode} ended after {result['steps']}; give fewer, or raise training.epochs."
                )
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
    return summarize(results, tolerance, threshold)


def summarize(results: dict[str, list[list[FrameResult]]], tolerance_px: float, threshold: float) -> list[dict]:
    """Average over seeds, with 95 % intervals by the bootstrap (Efron, 1979) over seeds and over blocks of neighboring
    frames.

    Every draw takes the same seeds and blocks for all modes, so that what they share cancels in the ratio.

    Args:
        results: by mode, by seed; the same frames in the same order in all.
        tolerance_px: largest distance of a true positive.
        threshold: least confidence of a detection.

    Returns:
        By mode ``f1`` (mean over seeds), ``f1_by_seed``, ``f1_10px``, ``interval``, ``relative`` to the first mode and
        ``relative_interval``.
    """
    parts = {
        mode: np.stack([_parts(frames, tolerance_px, threshold) for frames in of_mode])
        for mode, of_mode in results.items()
    }
    first = next(iter(parts.values()))
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {mode: [] for mode in parts}
    for _ in range(DRAWS):
        seeds = rng.integers(first.shape[0], size=first.shape[0])
        blocks = rng.integers(first.shape[1], size=first.shape[1])
        for mode, of_mode in parts.items():
            right, all_ = of_mode[seeds][:, blocks].sum(axis=(0, 1))
            draws[mode].append(right / max(all_, 1))
    rows = []
    reference = next(iter(draws))
    means = {}
    for mode, of_mode in parts.items():
        by_seed = [float(right / max(all_, 1)) for right, all_ in of_mode.sum(axis=1)]
        means[mode] = statistics.mean(by_seed)
        wide = statistics.mean(score(frames, 10.0, threshold)["f1_strict"] for frames in results[mode])
        row = {
            "name": mode,
            "f1": means[mode],
            "f1_by_seed": by_seed,
            "f1_10px": wide,
            "interval": _interval(draws[mode]),
        }
        if mode != reference:
            ratios = [a / b for a, b in zip(draws[mode], draws[reference]) if b > 0]
            row["relative"] = means[mode] / means[reference] if means[reference] else None
            row["relative_interval"] = _interval(ratios) if len(ratios) > DRAWS / 2 else None
        rows.append(row)
    return rows


def _parts(frames: list[FrameResult], tolerance_px: float, threshold: float) -> np.ndarray:
    """Return by block what adds up to the strict F1: ``[block, 2]``, 2 TP and 2 TP + 2 FP1 + FP2 + FN."""
    counts = {"TP": (2, 2), "FP1": (0, 2), "FP2": (0, 1), "FN": (0, 1), "TN": (0, 0)}
    of_frame = np.array([counts[r.outcome(tolerance_px, threshold)] for r in frames], dtype=float)
    starts: list[int] = []
    for i, r in enumerate(frames):
        # A block ends with its clip.
        if not starts or i - starts[-1] == BLOCK or frames[i - 1].clip != r.clip:
            starts.append(i)
    return np.add.reduceat(of_frame, starts)


def _interval(values: list[float]) -> list[float]:
    return [float(v) for v in np.percentile(values, (2.5, 97.5))]

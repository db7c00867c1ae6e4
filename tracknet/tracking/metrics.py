"""Scores of ball detections, in source-image pixels. Needs no torch.

Each labeled frame has one outcome (the taxonomy of WASB, BMVC 2023):

=====  ==========================================================
TP     ball there, detected within the tolerance
FP1    ball there, detected too far away
FP2    no ball, but one detected
FN     ball there, none detected
TN     no ball, none detected
=====  ==========================================================

``recall`` is the field's lenient ``TP / (TP + FN)``, which never punishes a wrong place; ``recall_strict`` is
``TP / (TP + FN + FP1)``. ``f1`` and ``f1_strict`` follow. Counts are summed over all frames and divided once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracknet.tracking.records import Detection

OUTCOMES = ("TP", "FP1", "FP2", "FN", "TN")
SWEEP_PX = tuple(range(1, 21))
EVENT_REACH = 2  # frames between an event and its label


@dataclass(frozen=True)
class FrameResult:
    """Detection of one labeled frame beside its label.

    Attributes:
        clip: name of the clip.
        detection: ball that was found.
        visibility: class of the label.
        xy_true: position in source-image pixels, ``None`` when there is no ball.
        event_true: 0 flying, 1 hit, 2 bounce, ``None`` where the label does not tell.
    """

    clip: str
    detection: Detection
    visibility: int
    xy_true: tuple[float, float] | None
    event_true: int | None = None

    @property
    def error_px(self) -> float:
        """Distance from the label in source-image pixels; infinite when there is no ball."""
        if self.xy_true is None:
            return float("inf")
        return float(np.hypot(*np.subtract(self.detection.xy_image, self.xy_true)))

    def outcome(self, tolerance_px: float, threshold: float) -> str:
        """Return TP, FP1, FP2, FN or TN."""
        detected = self.detection.confidence >= threshold
        if self.xy_true is None:
            return "FP2" if detected else "TN"
        if not detected:
            return "FN"
        return "TP" if self.error_px <= tolerance_px else "FP1"


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def rates(counts: dict[str, int]) -> dict[str, float]:
    """Precision, both recalls, both F1 and accuracy of summed outcome counts; an empty denominator gives 0."""
    tp, fp1, fp2, fn, tn = (counts[name] for name in OUTCOMES)
    return {
        "precision": _ratio(tp, tp + fp1 + fp2),
        "recall": _ratio(tp, tp + fn),
        "recall_strict": _ratio(tp, tp + fn + fp1),
        "f1": _ratio(2 * tp, 2 * tp + fp1 + fp2 + fn),
        "f1_strict": _ratio(2 * tp, 2 * tp + 2 * fp1 + fp2 + fn),
        "accuracy": _ratio(tp + tn, tp + fp1 + fp2 + fn + tn),
    }


def count(results: Sequence[FrameResult], tolerance_px: float, threshold: float) -> dict[str, int]:
    """Sum the outcomes of all frames."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for result in results:
        counts[result.outcome(tolerance_px, threshold)] += 1
    return counts


def average_precision(results: Sequence[FrameResult], tolerance_px: float) -> float:
    """Area under the precision-recall curve over confidence, all points, precision made monotone (PASCAL VOC 2010).

    A detection is right when it is within the tolerance; every frame with a ball counts in the recall.
    """
    num_balls = sum(r.xy_true is not None for r in results)
    if not num_balls:
        return 0.0
    order = sorted(results, key=lambda r: -r.detection.confidence)
    hit = np.array([r.error_px <= tolerance_px for r in order], dtype=float)
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hit).sum() / num_balls)


def find_events(confidence: dict[int, float], threshold: float, reach: int = EVENT_REACH) -> list[int]:
    """Return the frames in which an event happens: the most confident of all within ``reach`` frames, above the
    threshold."""
    found: list[int] = []
    for frame in sorted(confidence, key=lambda f: (-confidence[f], f)):
        if confidence[frame] >= threshold and all(abs(frame - other) > reach for other in found):
            found.append(frame)
    return sorted(found)


def score_events(
    results: Sequence[FrameResult], threshold: float = 0.5, reach: int = EVENT_REACH
) -> dict[str, dict[str, float]] | None:
    """Score hits and bounces: one that is found within ``reach`` frames of a labeled one is right, each counting once.

    Returns:
        For ``hit`` and ``bounce``: ``tp fp fn precision recall f1``; ``None`` where nothing was looked for or nothing
            is labeled.
    """
    known = [(r, r.detection.events) for r in results if r.detection.events is not None and r.event_true is not None]
    if not known:
        return None
    scores = {}
    for kind, name in enumerate(("hit", "bounce")):
        tp = fp = fn = 0
        for clip in sorted({r.clip for r, _ in known}):
            of_clip = [(r, events) for r, events in known if r.clip == clip]
            found = find_events({r.detection.frame: events[kind] for r, events in of_clip}, threshold, reach)
            there = sorted(r.detection.frame for r, _ in of_clip if r.event_true == kind + 1)
            matched = 0
            # In order of time, each takes the earliest that is free: no other choice matches more.
            for frame in there:
                near = [f for f in found if abs(f - frame) <= reach]
                if near:
                    found.remove(min(near))
                    matched += 1
            tp, fp, fn = tp + matched, fp + len(found), fn + len(there) - matched
        scores[name] = {
            "tp": tp,
            "fp": fp,
            "fn": fn,
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        }
    return scores


def score(results: Sequence[FrameResult], tolerance_px: float, threshold: float) -> dict[str, Any]:
    """Score detections.

    Args:
        results: one entry per labeled frame.
        tolerance_px: largest distance of a true positive, in source-image pixels.
        threshold: least confidence of a detection.

    Returns:
        Flat keys: ``num_frames tp fp1 fp2 fn tn precision recall recall_strict f1 f1_strict accuracy ap mean_error_px
        median_error_px tolerance_px threshold``; errors are over detected balls (TP and FP1), ``None`` when there are
        none. Nested ones: ``per_visibility`` (outcomes by class), ``sweep`` (rates for 1 to 20 px) and ``events``
            (``score_events``).
    """
    counts = count(results, tolerance_px, threshold)
    errors = [r.error_px for r in results if r.xy_true is not None and r.detection.confidence >= threshold]
    per_visibility = {
        str(v): count([r for r in results if r.visibility == v], tolerance_px, threshold)
        for v in sorted({r.visibility for r in results})
    }
    sweep = [{"tolerance_px": t, **rates(count(results, t, threshold))} for t in SWEEP_PX]
    return {
        "num_frames": len(results),
        **{name.lower(): number for name, number in counts.items()},
        **rates(counts),
        "ap": average_precision(results, tolerance_px),
        "mean_error_px": float(np.mean(errors)) if errors else None,
        "median_error_px": float(np.median(errors)) if errors else None,
        "tolerance_px": tolerance_px,
        "threshold": threshold,
        "per_visibility": per_visibility,
        "sweep": sweep,
        "events": score_events(results),
    }

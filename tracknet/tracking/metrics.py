"""Accuracy metrics of ball detections and events, in source-image pixels. Does not import torch.

Each labeled frame has one outcome (taxonomy of WASB, BMVC 2023):

=====  ==========================================================
TP     ball present, detected within the tolerance
FP1    ball present, detected outside the tolerance
FP2    no ball, but one detected
FN     ball present, not detected
TN     no ball, none detected
=====  ==========================================================

``recall`` is the lenient definition common in the field, ``TP / (TP + FN)``, which does not penalize wrong positions.
``recall_strict`` is ``TP / (TP + FN + FP1)``. ``f1`` and ``f1_strict`` are computed from them. Counts are summed over
all frames before the division (micro average).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracknet.tracking.records import Detection

OUTCOMES = ("TP", "FP1", "FP2", "FN", "TN")
SWEEP_PX = tuple(range(1, 21))  # tolerances of the sweep, in source-image pixels
EVENT_REACH = 2  # largest distance between a predicted event and its label, in frames


@dataclass(frozen=True)
class FrameResult:
    """Detection and label of one labeled frame.

    Attributes:
        clip: name of the clip.
        detection: detected ball.
        visibility: visibility class of the label.
        xy_true: labeled position in source-image pixels, ``None`` if there is no ball.
        event_true: labeled event: 0 flying, 1 hit, 2 bounce; ``None`` if the frame has no event label.
    """

    clip: str
    detection: Detection
    visibility: int
    xy_true: tuple[float, float] | None
    event_true: int | None = None

    @property
    def error_px(self) -> float:
        """Distance from the label in source-image pixels; infinite if there is no ball."""
        if self.xy_true is None:
            return float("inf")
        return float(np.hypot(*np.subtract(self.detection.xy_image, self.xy_true)))

    def outcome(self, tolerance_px: float, threshold: float) -> str:
        """Return the outcome of the frame: TP, FP1, FP2, FN or TN."""
        detected = self.detection.confidence >= threshold
        if self.xy_true is None:
            return "FP2" if detected else "TN"
        if not detected:
            return "FN"
        return "TP" if self.error_px <= tolerance_px else "FP1"


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def rates(counts: dict[str, int]) -> dict[str, float]:
    """Compute precision, both recalls, both F1 scores and accuracy from outcome counts; 0 if a denominator is 0."""
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
    """Count the outcomes of all frames."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for result in results:
        counts[result.outcome(tolerance_px, threshold)] += 1
    return counts


def average_precision(results: Sequence[FrameResult], tolerance_px: float) -> float:
    """Compute the area under the precision-recall curve over the confidence threshold.

    The curve uses all points and a monotone precision (PASCAL VOC 2010). A detection is correct if it is within the
    tolerance; every frame with a ball counts toward the recall. Without any ball the result is 0.
    """
    num_balls = sum(r.xy_true is not None for r in results)
    if not num_balls:
        return 0.0
    order = sorted(results, key=lambda r: -r.detection.confidence)
    is_correct = np.array([r.error_px <= tolerance_px for r in order], dtype=float)
    precision = np.cumsum(is_correct) / np.arange(1, len(is_correct) + 1)
    # Make the precision monotone: at each recall, take the best precision at that recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # Each correct detection raises the recall by 1 / num_balls, so the area is a sum over the correct detections.
    return float((precision * is_correct).sum() / num_balls)


def find_events(confidence: dict[int, float], threshold: float, reach: int = EVENT_REACH) -> list[int]:
    """Find the frames of events by non-maximum suppression over time.

    Args:
        confidence: confidence of the event by frame index.
        threshold: minimum confidence of an event.
        reach: frames to each side of an event in which no second one is found; of equal confidences, the earlier frame
            is kept.

    Returns:
        Frame indices of the events, in ascending order.
    """
    event_frames: list[int] = []
    for frame in sorted(confidence, key=lambda f: (-confidence[f], f)):
        # Only accepted frames suppress others; a suppressed frame does not.
        if confidence[frame] >= threshold and all(abs(frame - other) > reach for other in event_frames):
            event_frames.append(frame)
    return sorted(event_frames)


def score_events(
    results: Sequence[FrameResult], threshold: float = 0.5, reach: int = EVENT_REACH
) -> dict[str, dict[str, float]] | None:
    """Score hits and bounces.

    A predicted event is correct if it is within ``reach`` frames of a labeled one. Each prediction and each label is
    matched at most once.

    Returns:
        ``tp fp fn precision recall f1`` for each of ``hit`` and ``bounce``; ``None`` if no frame has both an event
        label and event confidences from the model.
    """
    pairs = [(r, r.detection.events) for r in results if r.detection.events is not None and r.event_true is not None]
    if not pairs:
        return None
    scores = {}
    for kind, name in enumerate(("hit", "bounce")):
        tp = fp = fn = 0
        # Score each clip separately: frame indices restart at 0 in every clip.
        for clip in sorted({r.clip for r, _ in pairs}):
            clip_pairs = [(r, events) for r, events in pairs if r.clip == clip]
            found_frames = find_events({r.detection.frame: events[kind] for r, events in clip_pairs}, threshold, reach)
            # Labels are 1 for a hit and 2 for a bounce; 0 is a flying ball.
            true_frames = sorted(r.detection.frame for r, _ in clip_pairs if r.event_true == kind + 1)
            num_matched = 0
            # Match labels in temporal order, each to the earliest unmatched prediction within reach. This greedy
            # matching is optimal: no other assignment has more matches.
            for frame in true_frames:
                candidates = [f for f in found_frames if abs(f - frame) <= reach]
                if candidates:
                    found_frames.remove(min(candidates))
                    num_matched += 1
            tp, fp, fn = tp + num_matched, fp + len(found_frames), fn + len(true_frames) - num_matched
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
        tolerance_px: largest error of a true positive, in source-image pixels.
        threshold: minimum confidence of a detection.

    Returns:
        Scalars under ``num_frames tp fp1 fp2 fn tn precision recall recall_strict f1 f1_strict accuracy ap
        mean_error_px median_error_px tolerance_px threshold``. The errors are taken over detected balls (TP and FP1)
        and are ``None`` if there are none. Nested values under ``per_visibility`` (outcome counts by visibility class),
        ``sweep`` (rates for tolerances from 1 to 20 px) and ``events`` (see ``score_events``).
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

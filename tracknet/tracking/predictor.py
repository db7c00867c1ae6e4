"""Inference on windows of frames, shared by validation, scoring and prediction."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tracknet.data.clips import WindowDataset
from tracknet.data.labels import Visibility, target_of
from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatchConfig, MicroBatcher
from tracknet.progress import track
from tracknet.tracking.frame_features import FrameFeatures, reuse_features
from tracknet.tracking.heatmap import Subpixel
from tracknet.tracking.metrics import FrameResult
from tracknet.tracking.records import Detection
from tracknet.tracking.tracker import BallTracker


@dataclass
class EvaluationConfig:
    """Settings for detecting the ball and for scoring detections."""

    tolerance_px: float = 4.0
    """Largest error of a true positive, in source-image pixels."""
    threshold: float = 0.5
    """Minimum confidence of a detection."""
    batch_size: int = field(default=8, metadata={"changes": ("resume",)})
    """Windows per forward pass when scoring and predicting."""
    stride: int | None = None
    """Frames from the start of one window to the start of the next when scoring and predicting. `null`: windows side by
    side, so that each frame is evaluated once. 1: each frame is evaluated at every position of a window and its
    heatmaps are averaged; the backbone still encodes each frame once, the decoder runs for each window."""
    trajectory: bool = True
    """Choose the peak on the ball's path among the highest peaks of each frame, based on the frames before and after
    it. The confidence is then the probability that this peak is the ball. `false`: choose the highest peak; the
    confidence is its height."""
    subpixel: Subpixel = "parabola"
    """Method that locates a peak between the heatmap's cells. `parabola`: vertex of the parabola through the logarithms
    of three cells along each axis, exact for a Gaussian. `centroid`: heat-weighted mean of 7 x 7 cells, for models
    trained on disks (`training.loss.target: disk`)."""

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("tolerance_px", 0 < self.tolerance_px < math.inf, "a number of pixels above 0"),
            ("threshold", 0 <= self.threshold <= 1, "between 0 and 1"),
            ("batch_size", 1 <= self.batch_size <= 65_536, "from 1 to 65536"),
        ):
            if not is_valid:
                raise UserError(f"evaluation.{name}={getattr(self, name)}: must be {rule}.")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"evaluation.stride={self.stride}: must be at least 1, or null for windows side by side.")

    def build_tracker(self, image_wh: tuple[int, int]) -> BallTracker:
        """Build a tracker for one clip.

        Args:
            image_wh: width and height of the clip's source images in pixels.
        """
        return BallTracker(image_wh, self.trajectory, self.subpixel)


# End of every error message about a non-finite loss, gradient or output.
REMEDY = "Train with a lower training.optimizer.lr; if training.precision is fp16, also try bf16 or fp32."


class Predictor:
    """Inference of a model on batches of windows, split into micro-batches that fit in memory.

    Args:
        model: ``HeatmapModel`` or an object with the same interface (``runs.onnx.OnnxModel``), in training or
            evaluation mode; it is in evaluation mode during prediction.
        device: device of the model.
        micro_batch: settings for splitting a batch when memory is short.
    """

    def __init__(self, model: Any, device: torch.device, micro_batch: MicroBatchConfig):
        self.model = model
        self.device = device
        self._batcher = MicroBatcher(micro_batch)

    def run(
        self, frames: Tensor, features: FrameFeatures | None = None, keys: Sequence[Sequence[Hashable]] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Predict heatmaps and, if the model detects them, events.

        Args:
            frames: uint8 windows ``[batch, frame, 3, h, w]``.
            features: features that overlapping windows share, see ``reuse_features``; ``None`` encodes all frames.
            keys: key of every frame, ``[batch][frame]``, if ``features`` are given.

        Returns:
            Heatmap logits, float32 ``[batch, frame, h / s, w / s]`` with the heatmap stride ``s``, on the device; and
            logits of hit and bounce ``[batch, frame, 2]``, ``None`` if the model does not detect events.

        Raises:
            UserError: if the model's output contains NaN or infinity.
        """
        out: list[tuple[Tensor, ...]] = []
        has_events = self.model.has_events
        training = self.model.training
        self.model.eval()

        # The batcher repeats the attempt with smaller micro-batches when memory runs out, so each attempt starts over.
        def attempt() -> float:
            out.clear()
            for part in self._batcher.micro_batches(len(frames)):
                window = frames[part].to(self.device, non_blocking=True)
                shared = {} if features is None else {"features": features.encode(window, keys[part])}
                out.append(self.model(window, events=True, **shared) if has_events else (self.model(window, **shared),))
            return 0.0

        def reset() -> None:
            out.clear()
            if features is not None:
                features.clear()

        try:
            with torch.no_grad():
                self._batcher.run(attempt, reset)
        finally:
            self.model.train(training)  # restore the mode of the caller
        parts = [torch.cat(tensors) for tensors in zip(*out)]
        if not all(torch.isfinite(part).all() for part in parts):
            raise UserError(f"The model's output contains NaN or infinity: its training has diverged. {REMEDY}")
        return parts[0], parts[1] if has_events else None


def score_windows(
    predictor: Predictor,
    dataset: WindowDataset,
    settings: EvaluationConfig,
    num_workers: int = 0,
    limit_batches: int | None = None,
    description: str | None = None,
) -> list[FrameResult]:
    """Detect the ball in every labeled frame of a dataset, once per frame.

    Args:
        predictor: model to score.
        dataset: windows without augmentation, in the order of clips and frames.
        settings: number of windows per batch, and method of choosing the ball.
        num_workers: number of data loading processes.
        limit_batches: maximum number of batches to score, ``None`` for all.
        description: title of the progress bar, ``None`` for no progress bar.

    Returns:
        One result per labeled frame; frames without a label and frames with an ignored label have none.
    """
    results: list[FrameResult] = []
    loader = DataLoader(dataset, batch_size=settings.batch_size, num_workers=num_workers)
    total = min(len(loader), limit_batches or len(loader))
    clip_index = -1
    tracker: BallTracker | None = None

    def collect(detections: list[Detection]) -> None:
        """Append the detections of the current clip's labeled frames to the results."""
        clip = dataset.clips[clip_index]
        for detection in detections:
            label = clip.labels.get(detection.frame)
            weight, is_visible = target_of(label, dataset.config.occluded)
            if label is None or weight == 0:
                continue
            # With data.occluded=absent, an occluded ball counts as absent.
            visibility = label.visibility if is_visible else Visibility.ABSENT
            xy_true = label.xy_image if is_visible else None
            event = int(label.event) if label.event is not None else None
            results.append(FrameResult(clip.name, detection, int(visibility), xy_true, event))

    features = reuse_features(predictor.model, dataset.config.sequence.length, settings.stride)
    batches = _first(loader, total)
    for batch in track(batches, description, total) if description else batches:
        windows, clip_of_row = batch["index"].tolist(), batch["clip"].tolist()
        keys = [[(clip, frame) for frame in window] for clip, window in zip(clip_of_row, windows)]
        logits, events = predictor.run(batch["frames"], features, keys)
        # A batch may contain the end of one clip and the start of the next, so it is split by clip.
        for index, group in groupby(range(len(clip_of_row)), clip_of_row.__getitem__):
            rows = list(group)
            clip_rows = slice(rows[0], rows[-1] + 1)
            # There is one tracker per clip. Finish the previous clip before the next one starts.
            if tracker is None or index != clip_index:
                if tracker is not None:
                    collect(tracker.flush())
                clip_index, tracker = index, settings.build_tracker(dataset.clips[index].size_wh)
            collect(
                tracker.update(windows[clip_rows], logits[clip_rows], events[clip_rows] if events is not None else None)
            )
    if tracker is not None:
        collect(tracker.flush())
    return results


def _first(items: Iterable, number: int) -> Iterator:
    """Yield at most the first ``number`` items."""
    for i, item in enumerate(items):
        if i >= number:
            return
        yield item

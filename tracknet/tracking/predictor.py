"""Windows in, balls out: the one path that validation, scoring and prediction share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tracknet.data.clips import WindowDataset
from tracknet.errors import UserError
from tracknet.labels import Visibility, target_of
from tracknet.memory.micro_batch import MicroBatchConfig, MicroBatcher
from tracknet.progress import track
from tracknet.tracking.heatmap import Subpixel
from tracknet.tracking.metrics import FrameResult
from tracknet.tracking.records import Detection
from tracknet.tracking.tracker import BallTracker


@dataclass
class EvaluationConfig:
    """How detections are found and scored."""

    tolerance_px: float = 4.0
    """Largest distance of a true positive, in source-image pixels."""
    threshold: float = 0.5
    """Least confidence of a detection."""
    batch_size: int = field(default=8, metadata={"changes": ("resume",)})
    """Windows per forward when scoring and predicting."""
    stride: int | None = None
    """Frames from one window to the next when scoring and predicting. `null`: windows side by side, each frame seen
    once. 1: each frame is seen in every place of a window and the heatmaps are averaged, for as many times the work."""
    trajectory: bool = True
    """Choose among each frame's highest peaks the one on a ball's path, by the frames before and after it. Confidence
    is then the probability that the ball is there. `false`: the highest peak, and its height."""
    subpixel: Subpixel = "parabola"
    """How a peak is located between the heatmap's cells: by a parabola through the logarithms of three cells in each
    direction, exact for a Gaussian; or the centroid of 7 x 7 cells, for models trained on disks (`training.loss.target:
    disk`)."""

    def __post_init__(self) -> None:
        for name, is_right, rule in (
            ("tolerance_px", 0 < self.tolerance_px < math.inf, "a number of pixels above 0"),
            ("threshold", 0 <= self.threshold <= 1, "between 0 and 1"),
            ("batch_size", 1 <= self.batch_size <= 65_536, "from 1 to 65536"),
        ):
            if not is_right:
                raise UserError(f"evaluation.{name}={getattr(self, name)}: must be {rule}.")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"evaluation.stride={self.stride}: at least 1, or null for windows side by side.")

    def build_tracker(self, image_wh: tuple[int, int]) -> BallTracker:
        """Begin to follow the ball through a clip of this size."""
        return BallTracker(image_wh, self.trajectory, self.subpixel)


REMEDY = "Train with a lower training.optimizer.lr; where training.precision is fp16, bf16 or fp32 may help too."


class Predictor:
    """Runs a model over batches of windows, in parts that fit.

    Args:
        model: a ``HeatmapModel``, or what looks like one (``runs.onnx.OnnxModel``), in any state; it is switched to
            evaluation while it predicts.
        device: where the model is.
        micro_batch: how to split a batch when memory is short.
    """

    def __init__(self, model: Any, device: torch.device, micro_batch: MicroBatchConfig):
        self.model = model
        self.device = device
        self._batcher = MicroBatcher(micro_batch)

    def run(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score uint8 windows ``[batch, frame, 3, h, w]``.

        Returns:
            float32 ``[batch, frame, h / s, w / s]`` on the device, and logits of hit and bounce ``[batch, frame, 2]``
            of a model that has them.

        Raises:
            UserError: what comes out is not finite.
        """
        out: list[tuple[Tensor, ...]] = []
        has_events = self.model.has_events
        training = self.model.training
        self.model.eval()

        def attempt() -> float:
            out.clear()
            for part in self._batcher.micro_batches(len(frames)):
                window = frames[part].to(self.device, non_blocking=True)
                out.append(self.model(window, events=True) if has_events else (self.model(window),))
            return 0.0

        try:
            with torch.no_grad():
                self._batcher.run(attempt, reset=out.clear)
        finally:
            self.model.train(training)
        parts = [torch.cat(tensors) for tensors in zip(*out)]
        if not all(torch.isfinite(part).all() for part in parts):
            raise UserError(f"The model's heatmaps are not finite numbers: its training has diverged. {REMEDY}")
        return parts[0], parts[1] if has_events else None


def score_windows(
    predictor: Predictor,
    dataset: WindowDataset,
    settings: EvaluationConfig,
    num_workers: int = 0,
    limit_batches: int | None = None,
    description: str | None = None,
) -> list[FrameResult]:
    """Detect the ball in every labeled frame of a dataset, each frame once.

    Args:
        predictor: the model.
        dataset: windows that are not augmented.
        settings: windows per batch, and how the ball is chosen.
        num_workers: loading processes.
        limit_batches: score only this many batches.
        description: title of a progress bar; ``None`` for none.
    """
    results: list[FrameResult] = []
    loader = DataLoader(dataset, batch_size=settings.batch_size, num_workers=num_workers)
    total = min(len(loader), limit_batches or len(loader))
    clip_index = -1
    tracker: BallTracker | None = None

    def keep(detections: list[Detection]) -> None:
        clip = dataset.clips[clip_index]
        for detection in detections:
            label = clip.labels.get(detection.frame)
            weight, is_visible = target_of(label, dataset.config.occluded)
            if label is None or weight == 0:
                continue
            visibility = label.visibility if is_visible else Visibility.ABSENT
            xy_true = label.xy_image if is_visible else None
            event = int(label.event) if label.event is not None else None
            results.append(FrameResult(clip.name, detection, int(visibility), xy_true, event))

    batches = _first(loader, total)
    for batch in track(batches, description, total) if description else batches:
        logits, events = predictor.run(batch["frames"])
        windows, of_clip = batch["index"].tolist(), batch["clip"].tolist()
        # A batch may hold the end of one clip and the begin of the next.
        for number, of_number in groupby(range(len(of_clip)), of_clip.__getitem__):
            rows = list(of_number)
            own = slice(rows[0], rows[-1] + 1)
            if tracker is None or number != clip_index:
                if tracker is not None:
                    keep(tracker.flush())
                clip_index, tracker = number, settings.build_tracker(dataset.clips[number].size_wh)
            keep(tracker.update(windows[own], logits[own], events[own] if events is not None else None))
    if tracker is not None:
        keep(tracker.flush())
    return results


def _first(items: Iterable, number: int) -> Iterator:
    for i, item in enumerate(items):
        if i >= number:
            return
        yield item

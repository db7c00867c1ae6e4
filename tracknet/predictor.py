"""Windows in, balls out: the one path that validation, scoring and prediction share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tracknet.data.clips import WindowDataset, target_of
from tracknet.errors import UserError
from tracknet.heatmap import HeatmapGrid, decode
from tracknet.labels import Visibility
from tracknet.memory.micro_batch import MicroBatchConfig, MicroBatcher
from tracknet.metrics import FrameResult
from tracknet.models.heatmap_model import HeatmapModel


@dataclass
class EvaluationConfig:
    """How detections are found and scored."""

    tolerance_px: float = 4.0
    """Largest distance of a true positive, in source-image pixels."""
    threshold: float = 0.5
    """Least confidence of a detection."""
    batch_size: int = 8
    """Windows per forward when scoring and predicting."""

    def __post_init__(self) -> None:
        if self.tolerance_px <= 0 or not 0 <= self.threshold <= 1 or self.batch_size < 1:
            raise UserError("evaluation: tolerance_px is above 0, threshold between 0 and 1, batch_size at least 1.")


class Located(NamedTuple):
    """Balls in a batch of windows.

    Attributes:
        xy_image: ``[batch, frame, 2]`` source-image pixels.
        confidence: ``[batch, frame]``.
        events: ``[batch, frame, 2]`` confidence of hit and bounce, or ``None``.
    """

    xy_image: np.ndarray
    confidence: np.ndarray
    events: np.ndarray | None


class Predictor:
    """Runs a model over batches of windows, in parts that fit.

    Args:
        model: any training state; it is switched to evaluation while it predicts.
        device: where the model is.
        micro_batch: how to split a batch when memory is short.
        say: takes lines for the user.
    """

    def __init__(
        self, model: HeatmapModel, device: torch.device, micro_batch: MicroBatchConfig, say: Callable[[str], None]
    ):
        self.model = model
        self.device = device
        self._batcher = MicroBatcher(micro_batch, say)

    def run(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score uint8 windows ``[batch, frame, 3, h, w]``.

        Returns:
            float32 ``[batch, frame, h / s, w / s]`` on the device, and logits of hit and bounce ``[batch, frame, 2]`` of a model that has them.
        """
        out: list[tuple[Tensor, ...]] = []
        has_events = self.model.has_events
        training = self.model.training
        self.model.eval()

        def attempt() -> float:
            out.clear()
            for part in self._batcher.parts(len(frames)):
                window = frames[part].to(self.device, non_blocking=True)
                out.append(self.model(window, events=True) if has_events else (self.model(window),))
            return 0.0

        try:
            with torch.no_grad():
                self._batcher.run(attempt, reset=out.clear)
        finally:
            self.model.train(training)
        parts = [torch.cat(tensors) for tensors in zip(*out)]
        return parts[0], parts[1] if has_events else None

    def locate(self, frames: Tensor, image_wh: tuple[int, int]) -> Located:
        """Find the ball in each frame of each window, in pixels of an image of this size."""
        logits, events = self.run(frames)
        peaks = decode(logits, HeatmapGrid(image_wh, tuple(logits.shape[-2:])))
        return Located(peaks.xy_image.cpu().numpy(), peaks.confidence.cpu().numpy(),
                       events.sigmoid().cpu().numpy() if events is not None else None)  # fmt: skip


def score_windows(
    predictor: Predictor,
    dataset: WindowDataset,
    batch_size: int,
    num_workers: int = 0,
    limit_batches: int | None = None,
    watch: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> list[FrameResult]:
    """Detect the ball in every labelled frame of a dataset, each frame once.

    Args:
        predictor: the model.
        dataset: windows that are not augmented.
        batch_size: windows per batch.
        num_workers: loading processes.
        limit_batches: score only this many batches.
        watch: wraps the batches, for a progress bar.
    """
    results: list[FrameResult] = []
    seen: set[tuple[int, int]] = set()
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    total = min(len(loader), limit_batches or len(loader))
    for batch in watch(_first(loader, total), total):
        # Clips may differ in size: positions come back in the grid of the input, and are scaled per clip.
        input_wh = (batch["frames"].shape[-1], batch["frames"].shape[-2])
        xy, confidence, events = predictor.locate(batch["frames"], input_wh)
        for b, clip_index in enumerate(batch["clip"].tolist()):
            clip = dataset.clips[clip_index]
            scale = np.array(clip.size_wh) / np.array(input_wh)
            for t, frame in enumerate(batch["index"][b].tolist()):
                label = clip.labels.get(frame)
                weight, there = target_of(label, dataset.config.occluded)
                if weight == 0 or (clip_index, frame) in seen:
                    continue
                seen.add((clip_index, frame))
                x, y = (xy[b, t] + 0.5) * scale - 0.5
                visibility = label.visibility if there else Visibility.ABSENT
                results.append(FrameResult(clip.name, frame, int(visibility), label.xy_image if there else None,
                                           (float(x), float(y)), float(confidence[b, t]),
                                           int(label.event) if label.event is not None else None,
                                           tuple(events[b, t].tolist()) if events is not None else None))  # fmt: skip
    return results


def _first(items: Iterable, number: int) -> Iterator:
    for i, item in enumerate(items):
        if i >= number:
            return
        yield item

"""Conversion of the heatmaps of overlapping windows to one detection per frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracknet.tracking.heatmap import HeatmapGrid, Subpixel, find_peaks, size_hw
from tracknet.tracking.records import Detection
from tracknet.tracking.trajectory import PEAKS, Choice, Trajectory


class _Accumulator(NamedTuple):
    """Sums over the windows that contain a frame.

    Attributes:
        heat: sum of the heatmaps ``[h, w]``.
        events: sum of the confidences of hit and bounce ``[2]``, ``None`` if the model does not detect events.
        windows: number of windows in the sums.
    """

    heat: Tensor
    events: Tensor | None
    windows: int = 1

    def plus(self, other: _Accumulator) -> _Accumulator:
        """Return the sums over the windows of both accumulators."""
        events = None
        if self.events is not None and other.events is not None:
            events = self.events + other.events
        return _Accumulator(self.heat + other.heat, events, self.windows + other.windows)


class BallTracker:
    """Ball tracker for one clip, updated window by window.

    The heatmaps of a frame that several windows contain are averaged. A detection is returned as soon as no later
    window can contain the frame, and with a trajectory some frames later. Frames are kept in memory only until then.

    Args:
        image_wh: width and height of the source images in pixels.
        trajectory: whether to choose among each frame's peaks by the ball's path, instead of taking the highest.
        subpixel: method of locating a peak, see ``find_peaks``.
    """

    def __init__(self, image_wh: tuple[int, int], trajectory: bool, subpixel: Subpixel):
        self._image_wh, self._subpixel = image_wh, subpixel
        self._num_peaks = PEAKS if trajectory else 1
        self._trajectory = Trajectory(image_wh) if trajectory else None
        self._accumulators: dict[int, _Accumulator] = {}  # by index of frames that later windows may contain
        # Frame index, peak positions and event confidences of frames whose choice the trajectory has not made yet.
        self._pending: list[tuple[int, np.ndarray, tuple[float, float] | None]] = []

    def update(self, windows: Sequence[Sequence[int]], logits: Tensor, events: Tensor | None = None) -> list[Detection]:
        """Add windows, in the order of their first frames.

        Args:
            windows: frame indices of each window.
            logits: heatmap logits ``[window, frame, h, w]``, before the sigmoid.
            events: logits of hit and bounce ``[window, frame, 2]``, before the sigmoid, or ``None``.

        Returns:
            Detections that have become final, in frame order.
        """
        heat = logits.float().sigmoid()
        event_confidence = events.float().sigmoid() if events is not None else None
        complete: list[tuple[int, _Accumulator]] = []
        for w, indices in enumerate(windows):
            # Windows arrive in the order of their first frames, so no later window contains a frame before this one.
            complete += self._pop_frames(before=indices[0])
            for t, frame in enumerate(indices):
                new = _Accumulator(heat[w, t], event_confidence[w, t] if event_confidence is not None else None)
                self._accumulators[frame] = self._accumulators[frame].plus(new) if frame in self._accumulators else new
        return self._detect(complete)

    def flush(self) -> list[Detection]:
        """Return the detections of all remaining frames."""
        detections = self._detect(self._pop_frames(before=None))
        return detections + (self._resolve(self._trajectory.finish()) if self._trajectory is not None else [])

    def _pop_frames(self, before: int | None) -> list[tuple[int, _Accumulator]]:
        """Remove and return the accumulators of the frames before an index, or of all frames, in frame order."""
        return [(f, self._accumulators.pop(f)) for f in sorted(self._accumulators) if before is None or f < before]

    def _detect(self, frames: list[tuple[int, _Accumulator]]) -> list[Detection]:
        """Find the peaks of frames with complete heatmaps, and return the detections that have become final."""
        if not frames:
            return []
        # All frames are processed in one call, so that the peaks are copied from the GPU once.
        heat = torch.stack([sums.heat / sums.windows for _, sums in frames])
        grid = HeatmapGrid(self._image_wh, size_hw(heat))
        peaks = find_peaks(heat, grid, self._num_peaks, self._subpixel)
        xy, confidence = peaks.xy_image.cpu().numpy(), peaks.confidence.cpu().numpy()
        detections: list[Detection] = []
        for (frame, sums), positions, heights in zip(frames, xy, confidence):
            event_confidence = tuple((sums.events / sums.windows).tolist()) if sums.events is not None else None
            if self._trajectory is None:
                detections.append(Detection(frame, tuple(positions[0].tolist()), float(heights[0]), event_confidence))
            else:
                self._pending.append((frame, positions, event_confidence))
                detections += self._resolve(self._trajectory.add(positions, heights))
        return detections

    def _resolve(self, choices: list[Choice]) -> list[Detection]:
        """Convert choices to the detections of the first pending frames, and remove these frames."""
        detections = []
        for (frame, positions, event_confidence), choice in zip(self._pending, choices):
            detections.append(
                Detection(frame, tuple(positions[choice.peak].tolist()), choice.confidence, event_confidence)
            )
        del self._pending[: len(choices)]
        return detections

"""Heatmaps of windows to one ball for each frame of a clip, in order."""

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
    """Sums over the windows that hold a frame: heat ``[h, w]``, confidences of events ``[2]``, and their number."""

    heat: Tensor
    events: Tensor | None
    windows: int = 1

    def plus(self, other: _Accumulator) -> _Accumulator:
        events = None
        if self.events is not None and other.events is not None:
            events = self.events + other.events
        return _Accumulator(self.heat + other.heat, events, self.windows + other.windows)


class BallTracker:
    """Follows the ball through one clip, window by window.

    A frame that several windows hold gets the mean of their heatmaps. It is decided on as soon as no later window can
    hold it, and with a trajectory some frames later; no more is kept than that.

    Args:
        image_wh: size of the source images.
        trajectory: choose among each frame's peaks by the ball's path, instead of the highest.
        subpixel: how a peak is located, see ``find_peaks``.
    """

    def __init__(self, image_wh: tuple[int, int], trajectory: bool, subpixel: Subpixel):
        self._image_wh, self._subpixel = image_wh, subpixel
        self._number = PEAKS if trajectory else 1
        self._trajectory = Trajectory(image_wh) if trajectory else None
        self._seen: dict[int, _Accumulator] = {}
        self._waiting: list[tuple[int, np.ndarray, tuple[float, float] | None]] = []

    def update(self, windows: Sequence[Sequence[int]], logits: Tensor, events: Tensor | None = None) -> list[Detection]:
        """Take windows in the order of their first frames.

        Args:
            windows: frame indices of each.
            logits: ``[window, frame, h, w]``, before the sigmoid.
            events: ``[window, frame, 2]``, before the sigmoid.

        Returns:
            The balls that are decided on now, in the order of frames.
        """
        heat = logits.float().sigmoid()
        event_confidence = events.float().sigmoid() if events is not None else None
        done: list[tuple[int, _Accumulator]] = []
        for w, indices in enumerate(windows):
            done += self._take(before=indices[0])
            for t, frame in enumerate(indices):
                new = _Accumulator(heat[w, t], event_confidence[w, t] if event_confidence is not None else None)
                self._seen[frame] = self._seen[frame].plus(new) if frame in self._seen else new
        return self._decide(done)

    def flush(self) -> list[Detection]:
        """Return the balls of all frames that are left."""
        balls = self._decide(self._take(before=None))
        return balls + (self._choose(self._trajectory.finish()) if self._trajectory is not None else [])

    def _take(self, before: int | None) -> list[tuple[int, _Accumulator]]:
        return [(f, self._seen.pop(f)) for f in sorted(self._seen) if before is None or f < before]

    def _decide(self, frames: list[tuple[int, _Accumulator]]) -> list[Detection]:
        if not frames:
            return []
        heat = torch.stack([seen.heat / seen.windows for _, seen in frames])
        grid = HeatmapGrid(self._image_wh, size_hw(heat))
        peaks = find_peaks(heat, grid, self._number, self._subpixel)
        xy, confidence = peaks.xy_image.cpu().numpy(), peaks.confidence.cpu().numpy()
        balls: list[Detection] = []
        for (frame, seen), positions, heights in zip(frames, xy, confidence):
            event_confidence = tuple((seen.events / seen.windows).tolist()) if seen.events is not None else None
            if self._trajectory is None:
                balls.append(Detection(frame, tuple(positions[0].tolist()), float(heights[0]), event_confidence))
            else:
                self._waiting.append((frame, positions, event_confidence))
                balls += self._choose(self._trajectory.add(positions, heights))
        return balls

    def _choose(self, choices: list[Choice]) -> list[Detection]:
        balls = []
        for (frame, positions, event_confidence), choice in zip(self._waiting, choices):
            balls.append(Detection(frame, tuple(positions[choice.peak].tolist()), choice.confidence, event_confidence))
        del self._waiting[: len(choices)]
        return balls

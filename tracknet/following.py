"""From what windows say to one ball for each frame of a clip, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracknet.heatmap import HeatmapGrid, Subcell, find_peaks
from tracknet.trajectory import PEAKS, Choice, Trajectory


class Ball(NamedTuple):
    """Where the ball is in a frame.

    Attributes:
        frame: index in the clip.
        xy_image: source-image pixels.
        confidence: in ``[0, 1]``: the peak's height, or with a trajectory the probability that the ball is there.
        events: confidence of hit and bounce, of a model that finds them.
    """

    frame: int
    xy_image: tuple[float, float]
    confidence: float
    events: tuple[float, float] | None


class _Seen(NamedTuple):
    """What windows said of a frame so far: sums of heat ``[h, w]`` and of the confidences of events ``[2]``, and how
    many they are."""

    heat: Tensor
    events: Tensor | None
    windows: int = 1

    def plus(self, other: _Seen) -> _Seen:
        events = self.events + other.events if self.events is not None else None
        return _Seen(self.heat + other.heat, events, self.windows + other.windows)


class Following:
    """Follows the ball through one clip, window by window.

    A frame that several windows hold gets the mean of their heatmaps. It is decided on as soon as no later window can
    hold it, and with a trajectory some frames later; no more is kept than that.

    Args:
        image_wh: size of the source images.
        trajectory: choose among each frame's peaks by the ball's path, instead of the highest.
        subcell: how a peak is located, see ``find_peaks``.
    """

    def __init__(self, image_wh: tuple[int, int], trajectory: bool, subcell: Subcell):
        self._image_wh, self._subcell = image_wh, subcell
        self._number = PEAKS if trajectory else 1
        self._trajectory = Trajectory(image_wh) if trajectory else None
        self._seen: dict[int, _Seen] = {}
        self._waiting: list[tuple[int, np.ndarray, tuple[float, float] | None]] = []

    def add(self, windows: Sequence[Sequence[int]], logits: Tensor, events: Tensor | None = None) -> list[Ball]:
        """Take windows in the order of their first frames.

        Args:
            windows: frame indices of each.
            logits: ``[window, frame, h, w]``, before the sigmoid.
            events: ``[window, frame, 2]``, before the sigmoid.

        Returns:
            The balls that are decided on now, in the order of frames.
        """
        heat = logits.float().sigmoid()
        happens = events.float().sigmoid() if events is not None else None
        done: list[tuple[int, _Seen]] = []
        for w, indices in enumerate(windows):
            done += self._take(before=indices[0])
            for t, frame in enumerate(indices):
                new = _Seen(heat[w, t], happens[w, t] if happens is not None else None)
                self._seen[frame] = self._seen[frame].plus(new) if frame in self._seen else new
        return self._decide(done)

    def finish(self) -> list[Ball]:
        """Return the balls of all frames that are left."""
        balls = self._decide(self._take(before=None))
        return balls + (self._choose(self._trajectory.finish()) if self._trajectory is not None else [])

    def _take(self, before: int | None) -> list[tuple[int, _Seen]]:
        return [(f, self._seen.pop(f)) for f in sorted(self._seen) if before is None or f < before]

    def _decide(self, frames: list[tuple[int, _Seen]]) -> list[Ball]:
        if not frames:
            return []
        heat = torch.stack([seen.heat / seen.windows for _, seen in frames])
        grid = HeatmapGrid(self._image_wh, tuple(heat.shape[-2:]))
        peaks = find_peaks(heat, grid, self._number, self._subcell)
        xy, confidence = peaks.xy_image.cpu().numpy(), peaks.confidence.cpu().numpy()
        balls: list[Ball] = []
        for (frame, seen), places, heights in zip(frames, xy, confidence):
            happens = tuple((seen.events / seen.windows).tolist()) if seen.events is not None else None
            if self._trajectory is None:
                balls.append(Ball(frame, tuple(places[0].tolist()), float(heights[0]), happens))
            else:
                self._waiting.append((frame, places, happens))
                balls += self._choose(self._trajectory.add(places, heights))
        return balls

    def _choose(self, choices: list[Choice]) -> list[Ball]:
        balls = []
        for (frame, places, happens), choice in zip(self._waiting, choices):
            balls.append(Ball(frame, tuple(places[choice.peak].tolist()), choice.confidence, happens))
        del self._waiting[: len(choices)]
        return balls

"""Record of a detected ball, shared by tracking, scoring and output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """Detected ball of one frame.

    Attributes:
        frame: index of the frame in the clip or video, from 0.
        xy_image: position in source-image pixels, x right, y down.
        confidence: value in ``[0, 1]``: with a trajectory, the probability that the ball is at this position; without
            one, the height of the heatmap's peak.
        events: confidences of hit and bounce in ``[0, 1]``, ``None`` if the model does not detect events.
        time_s: time in the video in seconds, ``None`` if the frames have no time stamps.
    """

    frame: int
    xy_image: tuple[float, float]
    confidence: float
    events: tuple[float, float] | None = None
    time_s: float | None = None

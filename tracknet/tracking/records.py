"""Record of a detected ball, shared by tracking, scoring and output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """Ball of one frame.

    Attributes:
        frame: index in the clip or video, from 0.
        xy_image: position in source-image pixels, x right, y down.
        confidence: in ``[0, 1]``: probability that the ball is there, by its path; without a path the peak's height.
        events: confidence of hit and bounce, ``None`` of a model that does not find them.
        time_s: time in the video in seconds, ``None`` where frames have none.
    """

    frame: int
    xy_image: tuple[float, float]
    confidence: float
    events: tuple[float, float] | None = None
    time_s: float | None = None

"""Ball labels of frames, in source-image pixels, and the clips that they belong to. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path


class Visibility(IntEnum):
    """Visibility classes of the TrackNet annotation."""

    ABSENT = 0
    EASY = 1
    HARD = 2
    OCCLUDED = 3


class Event(IntEnum):
    """Events of a frame, the ``status`` of the TrackNet annotation."""

    FLYING = 0
    HIT = 1
    BOUNCE = 2


@dataclass(frozen=True)
class BallLabel:
    """Label of the ball in one frame.

    Attributes:
        visibility: visibility class; an ``ABSENT`` ball has no position.
        xy_image: position in source-image pixels (pixel centers at integers), ``None`` if the ball is absent.
        event: flying, hit or bounce; ``None`` if the annotation contains no event.
        has_ignored_position: whether the annotation contains a position for an absent ball, which is ignored.
    """

    visibility: Visibility
    xy_image: tuple[float, float] | None
    event: Event | None = None
    has_ignored_position: bool = False


def target_of(label: BallLabel | None, occluded: str) -> tuple[float, bool]:
    """Determine how a frame counts in training and scoring.

    Args:
        label: label of the frame, ``None`` if it is unlabeled.
        occluded: treatment of an occluded ball: ``visible``, ``absent`` or ``ignore``.

    Returns:
        Weight of the frame, 0 (ignored) or 1, and whether it contains a ball to detect.
    """
    if label is None or (label.visibility is Visibility.OCCLUDED and occluded == "ignore"):
        return 0.0, False
    if label.visibility is Visibility.OCCLUDED:
        return 1.0, occluded == "visible"
    return 1.0, label.visibility is not Visibility.ABSENT


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one camera and their labels.

    Attributes:
        name: name of the form ``game/clip``, unique within a dataset.
        game: name of the game, the unit that is assigned to a split.
        frames: one image file per frame, or empty if the frames are in ``video``.
        video: video file, or ``None``.
        num_frames: number of frames.
        size_wh: width and height of the source images in pixels.
        labels: labels by frame index; a frame without an entry is unlabeled, which differs from a frame without a ball.
        labels_path: file that contains the labels, or ``None``.
    """

    name: str
    game: str
    frames: tuple[Path, ...]
    video: Path | None
    num_frames: int
    size_wh: tuple[int, int]
    labels: dict[int, BallLabel] = field(repr=False)
    labels_path: Path | None = None

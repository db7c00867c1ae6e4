"""Where the ball is: the label of one frame, in source-image pixels. Needs no torch."""

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
    """Status of the TrackNet annotation: what the ball does in a frame."""

    FLYING = 0
    HIT = 1
    BOUNCE = 2


@dataclass(frozen=True)
class BallLabel:
    """Ball position in one frame.

    Attributes:
        visibility: class of the annotation; ``ABSENT`` has no position.
        xy_image: position in source-image pixels (pixel centers at integers), ``None`` when absent.
        event: flying, hit or bounce, ``None`` where the annotation does not say.
        has_ignored_position: whether an absent ball has a position in the annotation, which is not read.
    """

    visibility: Visibility
    xy_image: tuple[float, float] | None
    event: Event | None = None
    has_ignored_position: bool = False


def target_of(label: BallLabel | None, occluded: str) -> tuple[float, bool]:
    """Return the frame's weight (0 = says nothing) and whether there is a ball to find."""
    if label is None or (label.visibility is Visibility.OCCLUDED and occluded == "ignore"):
        return 0.0, False
    if label.visibility is Visibility.OCCLUDED:
        return 1.0, occluded == "visible"
    return 1.0, label.visibility is not Visibility.ABSENT


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one camera, with the labels that there are.

    Attributes:
        name: ``game/clip``, unique within a dataset.
        game: the unit by which splits are made.
        frames: one image file per frame, or empty when the frames are in ``video``.
        video: the video file, or ``None``.
        num_frames: number of frames.
        size_wh: size of a source image in pixels.
        labels: by frame index; a frame without an entry is unlabeled, which is not the same as without a ball.
        labels_path: file that the labels come from.
    """

    name: str
    game: str
    frames: tuple[Path, ...]
    video: Path | None
    num_frames: int
    size_wh: tuple[int, int]
    labels: dict[int, BallLabel] = field(repr=False)
    labels_path: Path | None = None

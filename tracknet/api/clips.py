"""Clips from a notebook's own labels, without a dataset layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.layouts.reading import make_clip as make_checked_clip
from tracknet.data.layouts.reading import numbered_images, open_images, open_video
from tracknet.errors import UserError
from tracknet.files import expand_user


def make_clip(
    frames: str | Path,
    labels: Mapping[int, tuple[float, float] | BallLabel | None],
    name: str | None = None,
    game: str | None = None,
) -> Clip:
    """Combine frames with labels into a clip to train on or to score.

    Args:
        frames: video file, or folder of images that are named by their number (``0000.jpg``, ``0001.jpg``, ...).
        labels: label by frame number: position of the ball ``(x, y)`` in pixels of the frame, with pixel centers at
            integers; ``None`` for a frame without a ball; or a ``BallLabel``. Other frames are unlabeled, and neither
            trained on nor scored.
        name: name of the clip, unique among the clips used together; by default the name of the file or folder.
        game: unit of splits, such as a match; by default the name of the clip.

    Raises:
        UserError: if the frames cannot be read, or a label belongs to no frame or lies outside of the image.
    """
    path = expand_user(frames, "frames")
    if path.is_dir():
        images = numbered_images(path)
        if not images:
            raise UserError(f"{path}: contains no images that are named by their number, such as 0000.jpg.")
        opened = open_images(images, path)
    else:
        opened = open_video(path)
    name = name or path.stem
    ball_labels = {
        frame: label
        if isinstance(label, BallLabel)
        else BallLabel(Visibility.ABSENT if label is None else Visibility.EASY, label)
        for frame, label in labels.items()
    }
    return make_checked_clip(name, game or name, opened, ball_labels, path)

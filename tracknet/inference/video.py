"""Following the ball through a video of any length, a few windows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from tracknet.data.images import read_image, resize
from tracknet.data.layouts.reading import IMAGE_SUFFIXES, visible_files
from tracknet.data.video import probe, read_video
from tracknet.errors import UserError
from tracknet.predictor import Predictor


@dataclass(frozen=True)
class Source:
    """Frames to follow the ball in.

    Attributes:
        path: a video file or a folder of images.
        images: the images in order, or empty for a video.
        num_frames: how many there are.
        size_wh: their size in pixels.
        fps: frames per second.
    """

    path: Path
    images: tuple[Path, ...]
    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield time in seconds and RGB frames ``[h, w, 3]`` in order."""
        if not self.images:
            yield from read_video(self.path)
        for i, path in enumerate(self.images):
            yield float(i / self.fps), read_image(path, self.size_wh)


def open_source(path: Path, fps: float) -> Source:
    """Open a video or a folder of images.

    Args:
        path: what to open; images are taken in the order of their numbers, else of their names.
        fps: of a folder; a video brings its own.
    """
    if path.is_dir():
        images = [p for p in visible_files(path) if p.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{path}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        images.sort(key=lambda p: (0, int(p.stem), "") if p.stem.isdigit() else (1, 0, p.name))
        h, w = read_image(images[0]).shape[:2]
        return Source(path, tuple(images), len(images), (w, h), Fraction(fps).limit_denominator(1001))
    if not path.is_file():
        raise UserError(f"{path}: there is no such video or folder of images.")
    info = probe(path)
    return Source(path, (), info.num_frames, info.size_wh, info.fps)


@dataclass(frozen=True)
class Detection:
    """One frame with its ball.

    Attributes:
        frame: index.
        time_s: time in the video.
        image: the frame, RGB ``[h, w, 3]``.
        xy_image: the peak in pixels of the frame.
        confidence: the peak's height in ``[0, 1]``.
        events: confidence of hit and bounce, of a model that finds them.
    """

    frame: int
    time_s: float
    image: np.ndarray
    xy_image: tuple[float, float]
    confidence: float
    events: tuple[float, float] | None = None


def follow(
    source: Source, predictor: Predictor, num_frames: int, input_wh: tuple[int, int], batch_size: int
) -> Iterator[Detection]:
    """Detect the ball in every frame, in order; memory is bounded by one batch of windows.

    Windows lie side by side; the last one is moved back to end with the video, as when a clip is scored.

    Args:
        source: the frames.
        predictor: the model.
        num_frames: frames per window.
        input_wh: the model's input size.
        batch_size: windows per batch.
    """
    index = 0
    pending: list[tuple[float, np.ndarray]] = []
    before: list[np.ndarray] = []  # resized frames before the pending ones, for the last window

    def flush() -> Iterator[Detection]:
        nonlocal index, before
        small = [resize(image, input_wh) for _, image in pending]
        whole = len(small) // num_frames * num_frames
        windows = [small[i : i + num_frames] for i in range(0, whole, num_frames)]
        rest = len(small) - whole
        if rest:
            tail = (before + small)[-num_frames:]
            windows.append(tail + [tail[-1]] * (num_frames - len(tail)))
        if not windows:
            return
        frames = torch.from_numpy(np.stack(windows).transpose(0, 1, 4, 2, 3).copy())
        xy, confidence, events = predictor.locate(frames, source.size_wh)
        flat_xy, flat_confidence = xy.reshape(-1, 2), confidence.reshape(-1)
        flat_events = events.reshape(-1, 2) if events is not None else None
        if rest:
            # In the window that was moved back the new frames come last; in a repeated short one they come first.
            start = whole + (0 if len(before) + len(small) < num_frames else num_frames - rest)
            keep = [*range(whole), *range(start, start + rest)]
            flat_xy, flat_confidence = flat_xy[keep], flat_confidence[keep]
            flat_events = flat_events[keep] if flat_events is not None else None
        for i, ((time_s, image), ball, height) in enumerate(zip(pending, flat_xy, flat_confidence)):
            happens = tuple(flat_events[i].tolist()) if flat_events is not None else None
            yield Detection(index, time_s, image, (float(ball[0]), float(ball[1])), float(height), happens)
            index += 1
        before = (before + small)[-(num_frames - 1) :] if num_frames > 1 else []

    for item in source:
        pending.append(item)
        if len(pending) == num_frames * batch_size:
            yield from flush()
            pending = []
    yield from flush()

"""Following the ball through a video of any length, a few windows at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from tracknet.data.clips import window_indices
from tracknet.data.images import natural_key, read_image, resize
from tracknet.data.layouts.reading import IMAGE_SUFFIXES, visible_files
from tracknet.data.video import probe, read_video
from tracknet.errors import UserError
from tracknet.tracking.predictor import EvaluationConfig, Predictor
from tracknet.tracking.records import Detection


@dataclass(frozen=True)
class Source:
    """Frames to follow the ball in.

    Attributes:
        path: a video file or a folder of images.
        images: the images in order, or empty for a video.
        num_frames: how many there are.
        size_wh: their size in pixels.
        fps: frames per second.
        on_damage: takes what is wrong with a damaged video, of which every frame that can be decoded is given; ``None``
            refuses it.
    """

    path: Path
    images: tuple[Path, ...]
    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction
    on_damage: Callable[[str], None] | None = None

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield time in seconds and RGB frames ``[h, w, 3]`` in order."""
        if not self.images:
            yield from read_video(self.path, self.on_damage)
        for i, path in enumerate(self.images):
            yield float(i / self.fps), read_image(path, self.size_wh)


def open_source(path: Path, fps: float, on_damage: Callable[[str], None] | None = None) -> Source:
    """Open a video or a folder of images.

    Args:
        path: what to open; images are taken in the order of their numbers, else of their names.
        fps: of a folder; a video brings its own.
        on_damage: what to do about a damaged video, see ``Source``.
    """
    if path.is_dir():
        images = [p for p in visible_files(path) if p.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{path}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        images.sort(key=lambda p: natural_key(p.name))
        h, w = read_image(images[0]).shape[:2]
        return Source(path, tuple(images), len(images), (w, h), Fraction(fps).limit_denominator(1001))
    if not path.is_file():
        raise UserError(f"{path}: there is no such video or folder of images.")
    info = probe(path, keep_damaged=on_damage is not None)
    return Source(path, (), info.num_frames, info.size_wh, info.fps, on_damage)


class FrameSource(Protocol):
    """Frames to follow the ball in; ``Source`` is one."""

    @property
    def size_wh(self) -> tuple[int, int]:
        """Size of the frames in pixels."""

    def __iter__(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Yield time in seconds, if frames have one, and RGB frames ``[h, w, 3]`` in order."""


def follow(
    source: FrameSource, predictor: Predictor, num_frames: int, input_wh: tuple[int, int], settings: EvaluationConfig
) -> Iterator[tuple[Detection, np.ndarray]]:
    """Yield every frame's ball and picture (RGB ``[h, w, 3]``), in order.

    Memory is bounded by one batch of windows, and with a trajectory what it looks ahead.

    Windows lie as when a clip is scored; the last one is moved back to end with the video.

    Args:
        source: the frames.
        predictor: the model.
        num_frames: frames per window.
        input_wh: the model's input size.
        settings: how windows lie and how the ball is chosen.
    """
    stride = settings.stride or num_frames
    tracker = settings.build_tracker(source.size_wh)
    waiting: deque[tuple[float | None, np.ndarray]] = deque()  # frames of which the ball is not known yet
    small: deque[np.ndarray] = deque(maxlen=num_frames)  # the latest frames at the model's size
    windows: list[tuple[list[int], np.ndarray]] = []
    read = 0

    def run() -> list[Detection]:
        if not windows:
            return []
        frames = torch.from_numpy(np.stack([w for _, w in windows]).transpose(0, 1, 4, 2, 3).copy())
        balls = tracker.update([indices for indices, _ in windows], *predictor.run(frames))
        windows.clear()
        return balls

    def detections(balls: list[Detection]) -> Iterator[tuple[Detection, np.ndarray]]:
        for ball in balls:
            time_s, image = waiting.popleft()
            yield replace(ball, time_s=time_s), image

    for time_s, image in source:
        waiting.append((time_s, image))
        small.append(resize(image, input_wh))
        read += 1
        if read >= num_frames and (read - num_frames) % stride == 0:
            windows.append((list(range(read - num_frames, read)), np.stack(small)))
            if len(windows) == settings.batch_size:
                yield from detections(run())
    if 0 < read < num_frames or (read > num_frames and (read - num_frames) % stride):
        last = window_indices(read, num_frames, stride)[-1]
        windows.append((last, np.stack([small[i - read] for i in last])))
    yield from detections(run())
    yield from detections(tracker.flush())

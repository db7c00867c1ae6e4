"""Ball tracking in videos of any length, with bounded memory."""

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
from tracknet.tracking.frame_features import reuse_features
from tracknet.tracking.predictor import EvaluationConfig, Predictor
from tracknet.tracking.records import Detection


@dataclass(frozen=True)
class Source:
    """Video file or folder of images to track the ball in.

    Attributes:
        path: path of the video file or folder.
        images: image files in order; empty for a video.
        num_frames: number of frames.
        size_wh: width and height of the frames in pixels.
        fps: frames per second.
        on_damage: callback that receives a description of the damage in a video, of which all frames that can be
            decoded are then read; ``None`` makes damage an error.
    """

    path: Path
    images: tuple[Path, ...]
    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction
    on_damage: Callable[[str], None] | None = None

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield the time in seconds and the RGB image ``[h, w, 3]`` of each frame, in order."""
        if not self.images:
            yield from read_video(self.path, self.on_damage)
        for i, path in enumerate(self.images):
            yield float(i / self.fps), read_image(path, self.size_wh)


def open_source(path: Path, fps: float, on_damage: Callable[[str], None] | None = None) -> Source:
    """Open a video or a folder of images.

    Args:
        path: video file, or folder of images, which are read in natural order (``2.png`` before ``10.png``).
        fps: frames per second of a folder; ignored for a video, which has its own frame rate.
        on_damage: callback for a damaged video, see ``Source``.

    Raises:
        UserError: if the path does not exist, the folder contains no images, or the video or the first image cannot be
            decoded.
    """
    if path.is_dir():
        images = [p for p in visible_files(path) if p.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{path}: the folder contains no images ({', '.join(IMAGE_SUFFIXES)}).")
        images.sort(key=lambda p: natural_key(p.name))
        h, w = read_image(images[0]).shape[:2]
        return Source(path, tuple(images), len(images), (w, h), Fraction(fps).limit_denominator(1001))
    if not path.is_file():
        raise UserError(f"{path}: no such video or folder of images; check the path.")
    info = probe(path, keep_damaged=on_damage is not None)
    return Source(path, (), info.num_frames, info.size_wh, info.fps, on_damage)


class FrameSource(Protocol):
    """Protocol for frames to track the ball in, implemented by ``Source``."""

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the frames in pixels."""

    def __iter__(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Yield the time in seconds, or ``None``, and the RGB image ``[h, w, 3]`` of each frame, in order."""


def follow(
    source: FrameSource, predictor: Predictor, num_frames: int, input_wh: tuple[int, int], settings: EvaluationConfig
) -> Iterator[tuple[Detection, np.ndarray]]:
    """Track the ball through a video or another sequence of frames.

    Windows are placed as they are when a clip is scored; the last one is moved back so that it ends with the video.
    Memory is bounded by one batch of windows, plus the frames that a trajectory looks ahead.

    Args:
        source: frames to track the ball in.
        predictor: model to run.
        num_frames: number of frames per window.
        input_wh: width and height of the model's input in pixels.
        settings: stride and batch size of the windows, and method of choosing the ball.

    Yields:
        The detection and the RGB image ``[h, w, 3]`` of each frame, in order.
    """
    stride = settings.stride or num_frames
    tracker = settings.build_tracker(source.size_wh)
    features = reuse_features(predictor.model, num_frames, settings.stride)
    pending: deque[tuple[float | None, np.ndarray]] = deque()  # time and image of frames without a detection so far
    recent: deque[np.ndarray] = deque(maxlen=num_frames)  # latest frames at the model's input size
    windows: list[tuple[list[int], np.ndarray]] = []  # frame indices and frames of the next batch
    num_read = 0

    def run_batch() -> list[Detection]:
        """Run the model on the collected windows and return the detections that are final."""
        if not windows:
            return []
        # [batch, frame, h, w, 3] to [batch, frame, 3, h, w]; the copy makes the memory contiguous.
        frames = torch.from_numpy(np.stack([w for _, w in windows]).transpose(0, 1, 4, 2, 3).copy())
        indices = [frame_indices for frame_indices, _ in windows]
        detections = tracker.update(indices, *predictor.run(frames, features, indices))
        windows.clear()
        return detections

    def with_images(detections: list[Detection]) -> Iterator[tuple[Detection, np.ndarray]]:
        """Pair detections with their frames; both are in frame order."""
        for detection in detections:
            time_s, image = pending.popleft()
            yield replace(detection, time_s=time_s), image

    for time_s, image in source:
        pending.append((time_s, image))
        recent.append(resize(image, input_wh))
        num_read += 1
        # A window is complete when its last frame has been read; windows start at multiples of the stride.
        if num_read >= num_frames and (num_read - num_frames) % stride == 0:
            windows.append((list(range(num_read - num_frames, num_read)), np.stack(recent)))
            if len(windows) == settings.batch_size:
                yield from with_images(run_batch())
    # The remaining frames form one more window: a video shorter than a window repeats its last frame, and a longer one
    # whose end no window has reached gets a window that ends with it.
    if 0 < num_read < num_frames or (num_read > num_frames and (num_read - num_frames) % stride):
        last_window = window_indices(num_read, num_frames, stride)[-1]
        # The deque ends with frame num_read - 1, so a negative index addresses a frame by its distance from the end.
        windows.append((last_window, np.stack([recent[i - num_read] for i in last_window])))
    yield from with_images(run_batch())
    yield from with_images(tracker.flush())

"""Resized frames of a clip, ready for random access: decoded once, kept in a memory-mapped file.

A video can only be read in order, and a training epoch reads windows at random; so a video's frames are decoded once
into ``<cache>/<key>.npy`` (uint8 ``[frame, h, w, 3]``). The key covers the file's path, size and time of change, and the
size that the frames were resized to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np

from tracknet.data.video import probe, read_video
from tracknet.errors import UserError
from tracknet.labels import Clip


def resize(image: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Resize RGB ``[h, w, 3]``; areas are averaged when shrinking, so that a small ball does not fall between samples."""
    if (image.shape[1], image.shape[0]) == tuple(size_wh):
        return image
    shrinks = size_wh[0] < image.shape[1]
    return cv2.resize(image, tuple(size_wh), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_image(path: Path, clip_wh: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file to RGB uint8 ``[h, w, 3]``.

    Raises:
        UserError: the file cannot be decoded, or is not of the clip's size.
    """
    data = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    # OpenCV fills what is missing of a truncated JPEG with grey and says nothing: look for the end marker.
    whole_jpeg = path.suffix.lower() not in (".jpg", ".jpeg") or b"\xff\xd9" in data[-1024:].tobytes()
    if image is None or not whole_jpeg:
        raise UserError(f"{path}: cannot be decoded; the image is damaged, truncated or missing.")
    if clip_wh is not None and (image.shape[1], image.shape[0]) != tuple(clip_wh):
        raise UserError(f"{path}: is {image.shape[1]}x{image.shape[0]}, but the clip's first frame is "
                        f"{clip_wh[0]}x{clip_wh[1]}.")  # fmt: skip
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class ClipFrames:
    """Random access to a clip's frames at one size: uint8 RGB ``[h, w, 3]`` by index."""

    def __init__(self, clip: Clip, size_wh: tuple[int, int], cache_dir: Path):
        self.clip = clip
        self.size_wh = size_wh
        self._path = _cached_video(clip.video, size_wh, cache_dir) if clip.video else None
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "_map": None,
        }  # a loading process opens the file itself, instead of being sent its content

    def __getitem__(self, index: int) -> np.ndarray:
        if self._path is None:
            return resize(read_image(self.clip.frames[index], self.clip.size_wh), self.size_wh)
        if self._map is None:  # opened in the worker that reads it, not in the process that made the dataset
            self._map = np.load(self._path, mmap_mode="r")
        return np.asarray(self._map[index])


def _cached_video(video: Path, size_wh: tuple[int, int], cache_dir: Path) -> Path:
    stat = video.stat()
    identity = f"{video.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{size_wh[0]}x{size_wh[1]}"
    path = cache_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
    if path.is_file():
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: two processes that build it at once both end with a whole file. Frame by frame: a video may
    # be larger than memory.
    handle, part = tempfile.mkstemp(dir=cache_dir, suffix=".part")
    os.close(handle)
    try:
        shape = (probe(video).num_frames, size_wh[1], size_wh[0], 3)
        frames = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        for i, (_, image) in enumerate(read_video(video)):
            if i == len(frames):
                raise UserError(f"{video}: decodes to more than the {i} frames that it has packets for; write it anew, for "
                                "example with ffmpeg.")  # fmt: skip
            frames[i] = resize(image, size_wh)
        frames.flush()
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
    return path

"""The frames of a clip at the model's size, by index: from the cache, from images, or from a video read in order.

Frames are planar here, ``[3, h, w]``, as the model takes them: turned round once when they are decoded, not whenever
they are read.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from tracknet.data.images import read_image, resize
from tracknet.data.video import decode_from, frame_times
from tracknet.errors import UserError
from tracknet.labels import Clip

Decoder = Iterator[tuple[int, Callable[[], np.ndarray]]]
KEPT_BYTES = 128 << 20  # of decoded frames in a process, without the cache


class Frames(Protocol):
    """Uint8 RGB ``[3, h, w]`` by index."""

    def __getitem__(self, index: int) -> np.ndarray: ...


def planar(image: np.ndarray) -> np.ndarray:
    """Turn ``[h, w, 3]`` into ``[3, h, w]``."""
    return np.stack(cv2.split(image))


class CachedFrames:
    """Frames in a file of the cache, one after the other without a header; no file stays open, of which a system allows
    only so many.

    Attributes:
        path: the file, named by what its frames depend on.
    """

    def __init__(self, path: Path, size_wh: tuple[int, int]):
        self.path = path
        self._shape = (3, size_wh[1], size_wh[0])
        self._frame_bytes = 3 * size_wh[0] * size_wh[1]

    def __getitem__(self, index: int) -> np.ndarray:
        values = np.fromfile(self.path, np.uint8, self._frame_bytes, offset=index * self._frame_bytes)
        return values.reshape(self._shape)


class ImageFrames:
    """Frames decoded from image files when they are asked for."""

    def __init__(self, clip: Clip, size_wh: tuple[int, int]):
        self._clip = clip
        self._size_wh = size_wh

    def __getitem__(self, index: int) -> np.ndarray:
        return planar(read_image(self._clip.frames[index], self._clip.size_wh, self._size_wh))


class VideoFrames:
    """Frames of a video: going on from the last one is cheap, going elsewhere starts at a key frame before."""

    AHEAD = 32  # decode on rather than jump, over this many frames

    def __init__(self, clip: Clip, size_wh: tuple[int, int]):
        self._clip = clip
        self._size_wh = size_wh
        self._video: Any = clip.video
        self._times: list[int] = []
        self._decoder: Decoder | None = None
        self._process = os.getpid()
        self._inherited: list[Decoder | None] = []
        self._next = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoder": None, "_inherited": [], "_next": 0}

    def __getitem__(self, index: int) -> np.ndarray:
        if not self._times:
            self._times = frame_times(self._video)
        if self._process != os.getpid():
            # A forked process has the decoder but not its threads: it can neither be used nor closed.
            self._inherited.append(self._decoder)
            self._decoder, self._process = None, os.getpid()
        if self._decoder is None or not self._next <= index < self._next + self.AHEAD:
            image = self._enter(index)
        else:
            image = self._go_on(index)
        self._next = index + 1
        return planar(resize(image(), self._size_wh))

    def _go_on(self, index: int) -> Callable[[], np.ndarray]:
        """Decode up to a frame; frames come in the order of their times."""
        assert self._decoder is not None, "_enter comes first"
        for time, image in self._decoder:
            if time == self._times[index]:
                return image
            if time > self._times[index]:
                break
        raise UserError(
            f"{self._clip.video}: frame {index} cannot be decoded where its time stamp says that it is; the video is"
            " damaged. Write it anew, for example with ffmpeg."
        )

    def _enter(self, index: int) -> Callable[[], np.ndarray]:
        """Decode a frame anew. A seek may end at a key frame whose first picture comes later: then from further back,
        at last from the start."""
        for back in (0, 30, 300, index):
            start = max(0, index - back)
            self._decoder = decode_from(self._video, self._times[start])
            first = next(self._decoder, None)
            if first is not None and first[0] <= self._times[index]:
                self._decoder = itertools.chain([first], self._decoder)
                return self._go_on(index)
        return self._go_on(index)


def open_source(clip: Clip, size_wh: tuple[int, int]) -> Frames:
    """Open a clip's frames where they lie, without the cache."""
    return VideoFrames(clip, size_wh) if clip.video is not None else ImageFrames(clip, size_wh)


class Kept(OrderedDict):
    """Decoded frames, the least recent first; a loading process begins with none."""

    def __reduce__(self) -> tuple:
        return (Kept, ())


class RecentFrames:
    """Frames of a source, of which the last ones are kept for the windows that share them, within a bound of bytes.

    Args:
        source: where they come from.
        num_frames: how many there are.
        kept: shared by the clips of a dataset.
        frame_bytes: of one frame.
        together: how many neighbors to take with one that is not kept; a video that has to be entered anew gives them
            for little.
    """

    def __init__(
        self,
        source: Frames,
        num_frames: int,
        kept: OrderedDict[tuple[int, int], np.ndarray],
        frame_bytes: int,
        together: int,
    ):
        self._source = source
        self._num_frames = num_frames
        self._kept = kept
        self._capacity = max(together, KEPT_BYTES // frame_bytes)
        self._together = together

    def __getitem__(self, index: int) -> np.ndarray:
        key = (id(self), index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        first = index // self._together * self._together
        for i in range(first, min(first + self._together, self._num_frames)):
            self._kept[id(self), i] = self._source[i]
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return self._kept[key]

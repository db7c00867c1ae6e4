"""Random access to the frames of a clip at the model's size: from the cache, from images, or from a video.

Frames are planar, ``[3, h, w]``, as the model expects them. They are transposed once when they are decoded, not every
time they are read.
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
from tracknet.data.labels import Clip
from tracknet.data.video import decode_from, frame_times
from tracknet.errors import UserError

Decoder = Iterator[tuple[int, Callable[[], np.ndarray]]]
KEPT_BYTES = 128 << 20  # decoded frames that a process keeps without the cache, in bytes


class Frames(Protocol):
    """Sequence of RGB frames, uint8 ``[3, h, w]``, accessed by index."""

    def __getitem__(self, index: int) -> np.ndarray: ...


def planar(image: np.ndarray) -> np.ndarray:
    """Return an image ``[h, w, 3]`` as ``[3, h, w]``."""
    return np.stack(cv2.split(image))


class CachedFrames:
    """Frames in a cache file, stored one after the other without a header.

    The file is opened for every read, because a system limits the number of open files.

    Args:
        path: path of the cache file.
        size_wh: width and height of the frames in pixels.

    Attributes:
        path: path of the cache file; its name is the cache key.
    """

    def __init__(self, path: Path, size_wh: tuple[int, int]):
        self.path = path
        self._shape = (3, size_wh[1], size_wh[0])
        self._frame_bytes = 3 * size_wh[0] * size_wh[1]

    def __getitem__(self, index: int) -> np.ndarray:
        values = np.fromfile(self.path, np.uint8, self._frame_bytes, offset=index * self._frame_bytes)
        return values.reshape(self._shape)


class ImageFrames:
    """Frames of an image sequence, decoded on every read.

    Args:
        clip: clip with image files.
        size_wh: width and height of the frames in pixels.
    """

    def __init__(self, clip: Clip, size_wh: tuple[int, int]):
        self._clip = clip
        self._size_wh = size_wh

    def __getitem__(self, index: int) -> np.ndarray:
        return planar(read_image(self._clip.frames[index], self._clip.size_wh, self._size_wh))


class VideoFrames:
    """Frames of a video, decoded on every read.

    Reading a frame shortly after the last one is cheap, because decoding continues there. Any other frame requires a
    seek to a key frame before it.

    Args:
        clip: clip with a video file.
        size_wh: width and height of the frames in pixels.
    """

    AHEAD = 32  # largest number of frames to decode instead of seeking

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
        # A decoder cannot be pickled; the process that receives the copy opens the video again.
        return {**self.__dict__, "_decoder": None, "_inherited": [], "_next": 0}

    def __getitem__(self, index: int) -> np.ndarray:
        if not self._times:
            self._times = frame_times(self._video)
        if self._process != os.getpid():
            # A forked process inherits the decoder without its threads: using or closing it would block forever. Keep
            # a reference so that it is never freed, and open a decoder for this process.
            self._inherited.append(self._decoder)
            self._decoder, self._process = None, os.getpid()
        if self._decoder is None or not self._next <= index < self._next + self.AHEAD:
            image = self._seek(index)
        else:
            image = self._decode_to(index)
        self._next = index + 1
        return planar(resize(image(), self._size_wh))

    def _decode_to(self, index: int) -> Callable[[], np.ndarray]:
        """Continue decoding up to a frame; frames come in the order of their time stamps.

        Raises:
            UserError: if no frame has the expected time stamp.
        """
        assert self._decoder is not None, "_seek must be called first"
        for time, image in self._decoder:
            if time == self._times[index]:
                return image
            if time > self._times[index]:
                break
        raise UserError(
            f"{self._clip.video}: frame {index} cannot be decoded at its time stamp; the video is damaged. Re-encode"
            " it, for example with ffmpeg."
        )

    def _seek(self, index: int) -> Callable[[], np.ndarray]:
        """Open a new decoder before a frame and decode up to it.

        A seek may end at a key frame whose first frame comes after the requested one. The seek is then repeated from
        further back, finally from the start.
        """
        for back in (0, 30, 300, index):
            start = max(0, index - back)
            self._decoder = decode_from(self._video, self._times[start])
            first = next(self._decoder, None)
            if first is not None and first[0] <= self._times[index]:
                self._decoder = itertools.chain([first], self._decoder)
                return self._decode_to(index)
        return self._decode_to(index)


def open_frames(clip: Clip, size_wh: tuple[int, int]) -> Frames:
    """Open the frames of a clip in its video or image files, without the cache."""
    return VideoFrames(clip, size_wh) if clip.video is not None else ImageFrames(clip, size_wh)


class Kept(OrderedDict):
    """Store of decoded frames, the least recently used first.

    It pickles as an empty store, so that a data loading process does not receive copies of the frames.
    """

    def __reduce__(self) -> tuple:
        return (Kept, ())


class RecentFrames:
    """Frames of a source with a bounded store of recently decoded frames, which overlapping windows share.

    Args:
        source: frames to read from.
        num_frames: number of frames in the source.
        kept: store of decoded frames, shared by all clips of a dataset.
        frame_bytes: size of one frame in bytes.
        together: number of neighboring frames to decode with a frame that is not in the store. It exceeds 1 for
            videos, where neighbors cost little once the decoder has sought to one of them.
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
        # Decode the aligned group of neighbors that contains the frame, in order.
        first = index // self._together * self._together
        for i in range(first, min(first + self._together, self._num_frames)):
            self._kept[id(self), i] = self._source[i]
            # The capacity is at least one group, so that this never removes the requested frame.
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return self._kept[key]

"""Reading and writing of videos with PyAV, frame by frame, so that memory does not grow with the length of a video.

Frames are upright, as a player shows them. Phones store frames sideways, with a display matrix that rotates them. This
module applies it, so that all labels, coordinates and overlays refer to the frames as shown.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from tracknet.data.images import MAX_PIXELS
from tracknet.errors import UserError
from tracknet.files import new_file

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
# What FFmpeg's EAGAIN means, which says nothing about the video.
NO_THREAD = (
    "the system cannot start another thread (a limit of the machine or container on processes and threads). Run fewer"
    " processes at once, or set a smaller data.num_workers."
)

# Decoders and frames refer to each other, so they stay in memory until the garbage collector runs. A forked process
# inherits them without their threads and would wait forever for these threads when collecting them. gc.freeze excludes
# all objects from before the fork from collection.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video.

    Attributes:
        num_frames: number of frames that a player shows, counted from the packets rather than taken from the header.
        size_wh: width and height of the upright frames in pixels.
        fps: frames per second.
        damage: description of the damage if only a part of the video exists, else ``None``.
    """

    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction
    damage: str | None = None


def _open(path: Path) -> av.container.InputContainer:
    """Open a video.

    Raises:
        UserError: if the file is not a video, contains no readable video stream, or has frames of more than
            ``MAX_PIXELS`` pixels.
    """
    try:
        # Titles in encodings other than UTF-8 are common and do not affect the frames.
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(
            f"{path}: cannot be opened as a video ({error}). The file is damaged, truncated or not a video."
        ) from error
    # FFmpeg opens single images too, as videos of one frame.
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        container.close()
        raise UserError(f"{path}: is a single image. Use a video, or a folder with the images of one.")
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise UserError(f"{path}: contains no readable video stream. The file is damaged, truncated or not a video.")
    context = container.streams.video[0].codec_context
    if context.width * context.height > MAX_PIXELS:
        container.close()
        raise UserError(
            f"{path}: has frames of {context.width}x{context.height}, more than {MAX_PIXELS / 1e6:.0f} million pixels."
        )
    return container


def probe(path: Path, keep_damaged: bool = False) -> VideoInfo:
    """Read the properties of a video without decoding all of its frames.

    Args:
        path: path of the video.
        keep_damaged: whether to describe the damage of a damaged or truncated video in ``VideoInfo.damage`` instead of
            raising an error.

    Raises:
        UserError: if the file is not a video, contains no frames, or is damaged or truncated.
    """
    damage = None
    with _open(path) as container:
        stream = container.streams.video[0]
        # Count the packets, and note where the last one ends. Without time stamps the end is unknown: infinite.
        packets, end = [], 0.0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet.is_discard)
                    stamp: Any = packet.dts if packet.pts is None else packet.pts
                    end = max(
                        end, math.inf if stamp is None else float((stamp + (packet.duration or 0)) * stream.time_base)
                    )
        except av.error.FFmpegError as error:
            damage = f"damaged or truncated ({error})."
        # Only MP4 headers reliably state the number of frames.
        if "mp4" in container.format.name and len(packets) < stream.frames:
            damage = f"contains {len(packets)} of {stream.frames} frames; the video is truncated."
        # An edit list may cut off frames at the ends: the file contains them, but no player shows them.
        num_frames = packets.count(False)
        fps = _frame_rate(stream)
        size_wh = (stream.codec_context.width, stream.codec_context.height)
        stated = _stated_end(container, stream, fps)
    # Other containers state where their frames end. Packets may fall short of it by up to 5 frames.
    if stated > end + 5 / fps and damage is None:
        damage = (
            f"its frames end at {end:.1f} of {stated:.1f} seconds; the video is truncated. Use the complete file,"
            " or copy the existing part into a new file: ffmpeg -i OLD -c copy NEW."
        )
    if damage is not None and not keep_damaged:
        raise UserError(f"{path}: {damage}")
    if not num_frames:
        raise UserError(f"{path}: contains no frames.")
    return VideoInfo(num_frames, _upright_size(path, size_wh), fps, damage)


def _frame_rate(stream: av.video.stream.VideoStream) -> Fraction:
    """Return the frame rate of a stream in frames per second, 30 if it is unknown."""
    return stream.average_rate or stream.guessed_rate or Fraction(30)


def _upright_size(path: Path, stored_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the upright frames, for which the first frame and its display matrix are decoded."""
    with _open(path) as container, contextlib.suppress(av.error.FFmpegError):
        for frame in container.decode(container.streams.video[0]):
            return stored_wh[::-1] if _read_matrix(frame)[0] else stored_wh
    return stored_wh


def _read_matrix(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Read the orientation of a frame from its display matrix.

    The display matrix maps stored ``(x, y)`` to ``(a x + c y, b x + d y)``. Angles are rounded to multiples of 90
    degrees.

    Returns:
        Three flags that make the frame upright: whether to transpose it, and then whether to mirror it left to right,
        and top to bottom.
    """
    data: Any
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return False, a < 0, d < 0
            return True, c < 0, b < 0
    return False, False, False


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Convert a frame to upright uint8 RGB ``[h, w, 3]``."""
    try:
        image = frame.to_ndarray(format="rgb24")
    except av.error.BlockingIOError as error:
        raise UserError(f"A frame cannot be converted: {NO_THREAD}") from error
    transposed, left_right, top_bottom = _read_matrix(frame)
    if not (transposed or left_right or top_bottom):
        return image
    image = image.transpose(1, 0, 2) if transposed else image
    image = image[:, ::-1] if left_right else image
    return np.ascontiguousarray(image[::-1] if top_bottom else image)


def _stated_end(container: av.container.InputContainer, stream: av.video.stream.VideoStream, fps: Fraction) -> float:
    """Return the end of the frames in seconds as the header of a file other than MP4 states it; 0 if it does not."""
    if container.format.name == "avi":  # the number of frames includes those that were dropped while recording
        return float(stream.frames / fps)
    if "matroska" in container.format.name and (
        stated := re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
    ):
        hours, minutes, seconds = stated.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return 0.0


def read_video(path: Path, on_damage: Callable[[str], None] | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Decode a video in order.

    Args:
        path: path of the video.
        on_damage: function that is called at the end with a description of the damage of a damaged video, after all
            frames that can be decoded. ``None`` raises an error instead.

    Yields:
        Time in seconds, and the upright frame, RGB uint8 ``[h, w, 3]``.

    Raises:
        UserError: if a frame cannot be decoded, or if the number of frames differs from that of the packets. With
            ``on_damage``, only if no frame can be decoded.
    """
    info = probe(path, keep_damaged=on_damage is not None)
    index = num_bad = 0
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.error.BlockingIOError as error:
                raise UserError(f"{path}: {NO_THREAD}") from error
            except av.error.FFmpegError as error:
                if on_damage is None:
                    raise UserError(
                        f"{path}: frame {index} cannot be decoded ({error}); the video is damaged."
                    ) from error
                # Skip the packet. More errors than packets mean that reading does not advance in the file.
                num_bad += 1
                if num_bad > info.num_frames:
                    break
                continue
            if packet is None:
                break
            frame: Any
            for frame in frames:
                time_s = float(frame.pts * stream.time_base) if frame.pts is not None else float(index / info.fps)
                yield time_s, _to_rgb(frame)
                index += 1
    problem = info.damage
    if index < info.num_frames or (index > info.num_frames and problem is None):
        decoded = f"{index} of {info.num_frames} frames can be decoded; the video is damaged or truncated."
        problem = f"{decoded} {problem or ''}".strip()
    if problem is not None:
        if on_damage is None or index == 0:
            raise UserError(f"{path}: {problem}")
        on_damage(f"{path}: {problem}")


def frame_times(path: Path) -> list[int]:
    """Return the time stamps of the frames that a player shows, in ascending order, without decoding them.

    Returns:
        Time stamps in units of the stream's time base.

    Raises:
        UserError: if frames have no time stamps or share them. Then frames can only be counted from the start.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stamps = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    times = [time for time in stamps if time is not None]
    if len(times) < len(stamps) or len(set(times)) < len(times):
        raise UserError(
            f"{path}: the frames have no unique time stamps, so single frames cannot be found. Use the cache"
            " (data.cache=disk)."
        )
    return sorted(times)


def decode_from(path: Path, time: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Decode a video from the key frame at or before a time stamp.

    Args:
        path: path of the video.
        time: time stamp in units of the stream's time base.

    Yields:
        Time stamp, and a function that returns the upright frame, RGB uint8 ``[h, w, 3]``. Frames that the caller skips
        are not converted.

    Raises:
        UserError: if the video cannot be decoded there.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frame: Any
        try:
            container.seek(time, stream=stream, backward=True)
            for frame in container.decode(stream):
                yield frame.pts, partial(_to_rgb, frame)
        except av.error.BlockingIOError as error:
            raise UserError(f"{path}: {NO_THREAD}") from error
        except av.error.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be decoded around time stamp {time} ({error}); the video is damaged."
            ) from error


class VideoWriter:
    """Context manager that writes frames to an H.264 video.

    Frames are written to a temporary file, which is renamed at the end. After an exception it is removed.

    Args:
        path: path of the video; its folder is created.
        size_wh: width and height of the frames in pixels.
        fps: frames per second.
        crf: constant rate factor of x264: smaller values give a higher quality.
    """

    def __init__(self, path: Path, size_wh: tuple[int, int], fps: Fraction, crf: int = 20):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._container = av.open(str(stack.enter_context(new_file(path))), mode="w")
            self._stack = stack.pop_all()
        self._stream = self._container.add_stream("libx264", rate=fps)
        # yuv420p requires even sides. Odd ones are padded by repeating their last pixel, which is not noticeable.
        self._pad = (size_wh[1] % 2, size_wh[0] % 2)
        self._stream.width, self._stream.height = size_wh[0] + self._pad[1], size_wh[1] + self._pad[0]
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": "veryfast"}

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, image: np.ndarray) -> None:
        """Append one frame, RGB uint8 ``[h, w, 3]``."""
        if any(self._pad):
            image = np.pad(image, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        # The exception is raised again inside the stack, so that new_file removes the incomplete file.
        with self._stack:
            try:
                if error is None:
                    self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()
            if error is not None:
                raise error

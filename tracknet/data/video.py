"""Reading and writing video through PyAV, one frame at a time: memory does not grow with the length.

Frames are upright here, as a player shows them: phones store them lying, with a matrix that says how to turn them. This
is the one place that knows of it, so that labels, coordinates and overlays are all of the picture as shown.
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

# Decoders and frames hold each other and so live on as garbage until it is collected. A forked process inherits them
# without their threads, and waits for ever for those when it collects them: it leaves alone whatever was there before
# it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself; ``num_frames`` is counted from its packets, not taken from the header.

    Attributes:
        num_frames: how many a player shows.
        size_wh: of the upright frames, in pixels.
        fps: frames per second.
        damage: what is wrong with a video of which only a part is there, else ``None``.
    """

    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction
    damage: str | None = None


def _open(path: Path) -> av.container.InputContainer:
    try:
        # Titles in another encoding than UTF-8 are common, and no reason to refuse the frames.
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(
            f"{path}: cannot be opened as a video ({error}); it is damaged, truncated or no video."
        ) from error
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        container.close()
        raise UserError(f"{path}: is a single picture; give a video, or the folder that holds the pictures of one.")
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise UserError(f"{path}: holds no video stream that can be read; it is damaged, truncated or no video.")
    context = container.streams.video[0].codec_context
    if context.width * context.height > MAX_PIXELS:
        container.close()
        raise UserError(
            f"{path}: has frames of {context.width}x{context.height}, more than {MAX_PIXELS / 1e6:.0f} million pixels."
        )
    return container


def probe(path: Path, keep_damaged: bool = False) -> VideoInfo:
    """Count the frames of a video without decoding them.

    Args:
        path: the file.
        keep_damaged: say in ``damage`` what is missing of a damaged or truncated video, instead of refusing it.

    Raises:
        UserError: it is no video, or not all of it.
    """
    damage = None
    with _open(path) as container:
        stream = container.streams.video[0]
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
        # Only MP4 states reliably how many there should be.
        if "mp4" in container.format.name and len(packets) < stream.frames:
            damage = f"holds {len(packets)} of {stream.frames} frames; the video is truncated."
        # An edit list may cut frames off at the ends: they are there, but no player shows them.
        num_frames = packets.count(False)
        fps = _frame_rate(stream)
        size_wh = (stream.codec_context.width, stream.codec_context.height)
        stated = _stated_end(container, stream, fps)
    if stated > end + 5 / fps and damage is None:
        damage = (
            f"its frames end at {end:.1f} of {stated:.1f} seconds; the video is truncated. Take the whole file, or"
            " write what there is into a new one: ffmpeg -i OLD -c copy NEW."
        )
    if damage is not None and not keep_damaged:
        raise UserError(f"{path}: {damage}")
    if not num_frames:
        raise UserError(f"{path}: holds no frames.")
    return VideoInfo(num_frames, _upright_size(path, size_wh), fps, damage)


def _frame_rate(stream: av.video.stream.VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(30)


def _upright_size(path: Path, stored_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a video's frames as shown; the matrix comes with the first one."""
    with _open(path) as container, contextlib.suppress(av.error.FFmpegError):
        for frame in container.decode(container.streams.video[0]):
            return stored_wh[::-1] if _read_matrix(frame)[0] else stored_wh
    return stored_wh


def _read_matrix(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether a frame is to be transposed, and then mirrored left to right and top to bottom, to stand upright.

    The display matrix maps stored ``(x, y)`` to ``(a x + c y, b x + d y)``; of other angles than right ones the nearest
    is taken.
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
    image = frame.to_ndarray(format="rgb24")
    transposed, left_right, top_bottom = _read_matrix(frame)
    if not (transposed or left_right or top_bottom):
        return image
    image = image.transpose(1, 0, 2) if transposed else image
    image = image[:, ::-1] if left_right else image
    return np.ascontiguousarray(image[::-1] if top_bottom else image)


def _stated_end(container: av.container.InputContainer, stream: av.video.stream.VideoStream, fps: Fraction) -> float:
    """Return the second at which the header of a file that is not MP4 says that its frames end; 0 where it does not."""
    if container.format.name == "avi":  # frames, those that were dropped when recording included
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
        path: the file.
        on_damage: takes what is wrong with a damaged video, of which every frame that can be decoded is given; ``None``
            refuses it.

    Yields:
        Time in seconds, and the upright frame as uint8 RGB ``[h, w, 3]``.

    Raises:
        UserError: a frame cannot be decoded, or the video has fewer frames than packets; names the frame. With
            ``on_damage``, only where nothing can be decoded.
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
            except av.error.FFmpegError as error:
                if on_damage is None:
                    raise UserError(
                        f"{path}: frame {index} cannot be decoded ({error}); the video is damaged."
                    ) from error
                num_bad += 1
                if num_bad > info.num_frames:  # the file itself cannot be read on
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
    """Return the time stamps of the frames that are shown, in order, without decoding them.

    Raises:
        UserError: the file states none; then frames can only be counted from the start.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stamps = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    times = [time for time in stamps if time is not None]
    if len(times) < len(stamps) or len(set(times)) < len(times):
        raise UserError(
            f"{path}: its frames have no time stamps of their own, so they cannot be found one by one; read it through"
            " the cache (data.cache=disk)."
        )
    return sorted(times)


def decode_from(path: Path, time: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Decode on from the key frame at or before a time stamp.

    Yields:
        Time stamp, and a function that gives the upright frame as uint8 RGB ``[h, w, 3]``: those that are passed by
        need no conversion.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frame: Any
        try:
            container.seek(time, stream=stream, backward=True)
            for frame in container.decode(stream):
                yield frame.pts, partial(_to_rgb, frame)
        except av.error.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be decoded around time stamp {time} ({error}); the video is damaged."
            ) from error


class VideoWriter:
    """Writes uint8 RGB frames as H.264, to a temporary name that becomes the real one when all went well."""

    def __init__(self, path: Path, size_wh: tuple[int, int], fps: Fraction, crf: int = 20):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._container = av.open(str(stack.enter_context(new_file(path))), mode="w")
            self._stack = stack.pop_all()
        self._stream = self._container.add_stream("libx264", rate=fps)
        # yuv420p needs even sides; a margin of one repeated pixel is invisible.
        self._pad = (size_wh[1] % 2, size_wh[0] % 2)
        self._stream.width, self._stream.height = size_wh[0] + self._pad[1], size_wh[1] + self._pad[0]
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": "veryfast"}

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, image: np.ndarray) -> None:
        """Append one RGB frame ``[h, w, 3]``."""
        if any(self._pad):
            image = np.pad(image, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        # What is raised inside of the stack removes the unfinished file.
        with self._stack:
            try:
                if error is None:
                    self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()
            if error is not None:
                raise error

"""Reading and writing video through PyAV, one frame at a time: memory does not grow with the length."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from tracknet.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself; ``num_frames`` is counted from its packets, not taken from the header."""

    num_frames: int
    size_wh: tuple[int, int]
    fps: Fraction


def _open(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
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
    return container


def probe(path: Path) -> VideoInfo:
    """Count the frames of a video without decoding them.

    Raises:
        UserError: it is no video, or not all of it.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        packets, end = [], 0.0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet.is_discard)
                    stamp = packet.dts if packet.pts is None else packet.pts
                    end = max(
                        end, math.inf if stamp is None else float((stamp + (packet.duration or 0)) * stream.time_base)
                    )
        except av.error.FFmpegError as error:
            raise UserError(f"{path}: damaged or truncated ({error}).") from error
        # Only MP4 states reliably how many there should be.
        if "mp4" in container.format.name and len(packets) < stream.frames:
            raise UserError(f"{path}: holds {len(packets)} of {stream.frames} frames; the video is truncated.")
        # An edit list may cut frames off at the ends: they are there, but no player shows them.
        num_frames = packets.count(False)
        fps = stream.average_rate or stream.guessed_rate or Fraction(30)
        size_wh = (stream.codec_context.width, stream.codec_context.height)
        stated = _stated_end(container, stream, fps)
    if stated > end + 5 / fps:
        raise UserError(f"{path}: its frames end at {end:.1f} of {stated:.1f} seconds; the video is truncated. Take the whole file, or write what "
                        "there is into a new one: ffmpeg -i OLD -c copy NEW.")  # fmt: skip
    if not num_frames:
        raise UserError(f"{path}: holds no frames.")
    return VideoInfo(num_frames, size_wh, fps)


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


def read_video(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Decode a video in order.

    Yields:
        Time in seconds, and the frame as uint8 RGB ``[h, w, 3]``.

    Raises:
        UserError: a frame cannot be decoded, or the video has fewer frames than packets; names the frame.
    """
    index = 0
    expected = probe(path).num_frames
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = stream.average_rate or stream.guessed_rate or Fraction(30)
        try:
            for frame in container.decode(stream):
                time_s = float(frame.pts * stream.time_base) if frame.pts is not None else float(index / fps)
                yield time_s, frame.to_ndarray(format="rgb24")
                index += 1
        except av.error.FFmpegError as error:
            raise UserError(f"{path}: frame {index} cannot be decoded ({error}); the video is damaged.") from error
    if index != expected:
        raise UserError(f"{path}: {index} of {expected} frames can be decoded; the video is damaged or truncated.")


def frame_times(path: Path) -> list[int]:
    """Return the time stamps of the frames that are shown, in order, without decoding them.

    Raises:
        UserError: the file states none; then frames can only be counted from the start.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        times = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    if None in times or len(set(times)) < len(times):
        raise UserError(f"{path}: its frames have no time stamps of their own, so they cannot be found one by one; read it through the "
                        "cache (data.cache=disk).")  # fmt: skip
    return sorted(times)


def decode_from(path: Path, time: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Decode on from the key frame at or before a time stamp.

    Yields:
        Time stamp, and a function that gives the frame as uint8 RGB ``[h, w, 3]``: those that are passed by need no conversion.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            container.seek(time, stream=stream, backward=True)
            for frame in container.decode(stream):
                yield frame.pts, partial(frame.to_ndarray, format="rgb24")
        except av.error.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be decoded around time stamp {time} ({error}); the video is damaged."
            ) from error


class VideoWriter:
    """Writes uint8 RGB frames as H.264, to a temporary name that becomes the real one when all went well."""

    def __init__(self, path: Path, size_wh: tuple[int, int], fps: Fraction, crf: int = 20):
        self.path = path
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._part), mode="w")
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None:
                os.replace(self._part, self.path)
        finally:
            self._part.unlink(missing_ok=True)

"""Resized frames on disk, ready for random access: decoded once, kept in one file per clip.

A training epoch reads windows at random, and a video can only be read in order; so the frames are decoded once into
``<cache_dir>/<key>.frames`` (uint8 ``[frame, 3, h, w]``). The key covers names, sizes, times of change and samples of
the bytes of the clip's files, and the size that frames are brought to: another file or setting has another key, a
folder that was moved has the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tracknet.data.frames import planar
from tracknet.data.images import read_image, resize
from tracknet.data.video import read_video
from tracknet.errors import UserError
from tracknet.files import new_file, one_at_a_time, write_text
from tracknet.labels import Clip
from tracknet.progress import ProgressBar

VERSION = 4  # of how frames are brought to size
TAG = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
SAMPLE = 1 << 16  # bytes of either end of a file


def ensure_cached(clips: list[Clip], size_wh: tuple[int, int], cache_dir: Path) -> list[Path]:
    """Decode the clips that are not cached yet, under a progress bar, and return the file of each.

    Processes that want the same clip wait for the one that decodes it.

    Raises:
        UserError: a frame cannot be decoded, or the disk is too full; no half-written file is left.
    """
    paths = [cache_dir / f"{_key(clip, size_wh)}.frames" for clip in clips]
    missing = {path: clip for path, clip in zip(paths, clips) if not _is_whole(path, clip, size_wh)}
    if not missing:
        return paths
    make_cache(cache_dir)
    needed = sum(_num_bytes(clip, size_wh) for clip in missing.values())
    description = f"Decoding frames once ({needed / 1e9:.1f} GB in {cache_dir})"
    with ProgressBar(description, sum(clip.num_frames for clip in missing.values())) as bar:
        for path, clip in missing.items():
            with one_at_a_time(path):
                if _is_whole(path, clip, size_wh):
                    bar.advance(clip.num_frames)
                else:
                    _check_room(_num_bytes(clip, size_wh), cache_dir)
                    _write(path, clip, size_wh, bar.advance)
    return paths


def make_cache(folder: Path) -> None:
    """Make a folder of the cache, with the tag by which backup programs, and we, know one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_cache(folder):
        write_text(
            folder / "CACHEDIR.TAG", f"{TAG}\n# Frames as TrackNet decoded them; they can be removed at any time.\n"
        )


def is_cache(folder: Path) -> bool:
    """Whether a folder was made by ``make_cache``."""
    try:
        with (folder / "CACHEDIR.TAG").open("rb") as file:
            return file.read(len(TAG)) == TAG.encode()
    except OSError:
        return False


def _key(clip: Clip, size_wh: tuple[int, int]) -> str:
    files = [clip.video] if clip.video is not None else list(clip.frames)
    digest = hashlib.sha256(f"{VERSION} {size_wh[0]}x{size_wh[1]}".encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
        # Names are bytes on a disk, in whatever encoding.
        digest.update(b"|" + os.fsencode(file.name) + f" {stat.st_size} {stat.st_mtime_ns}".encode())
    for file in (files[0], files[-1]):
        with file.open("rb") as content:
            digest.update(content.read(SAMPLE))
            content.seek(max(0, file.stat().st_size - SAMPLE))
            digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:24]


def _num_bytes(clip: Clip, size_wh: tuple[int, int]) -> int:
    return clip.num_frames * size_wh[0] * size_wh[1] * 3


def _check_room(needed: int, cache_dir: Path) -> None:
    free = shutil.disk_usage(cache_dir).free
    if needed > free:
        raise UserError(
            f"data.cache_dir={cache_dir}: a clip's frames take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free."
            " Choose another data.cache_dir, or data.cache=none to decode frames whenever they are needed."
        )


def _write(path: Path, clip: Clip, size_wh: tuple[int, int], advance: Callable[[], None]) -> None:
    """Write a clip's frames beside their place and rename; frame by frame, because a video may be larger than
    memory."""
    with new_file(path) as work:
        with work.open("wb") as file:
            # Reserved now: a disk that fills up is an error here, and not a signal in the middle of a copy.
            os.posix_fallocate(file.fileno(), 0, _num_bytes(clip, size_wh))
        _fill(work, clip, size_wh, advance)


def _fill(work: Path, clip: Clip, size_wh: tuple[int, int], advance: Callable[[], None]) -> None:
    frames = np.memmap(work, np.uint8, "r+", shape=(clip.num_frames, 3, size_wh[1], size_wh[0]))
    if clip.video is not None:
        for i, (_, image) in enumerate(read_video(clip.video)):
            if i == len(frames):
                raise UserError(
                    f"{clip.video}: decodes to more than the {i} frames that it has packets for; write it anew, for "
                    "example with ffmpeg."
                )
            frames[i] = planar(resize(image, size_wh))
            advance()
    else:

        def store(i: int) -> None:
            frames[i] = planar(read_image(clip.frames[i], clip.size_wh, size_wh))
            advance()

        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            list(pool.map(store, range(clip.num_frames)))
        finally:
            pool.shutdown(cancel_futures=True)
    frames.flush()


def _is_whole(path: Path, clip: Clip, size_wh: tuple[int, int]) -> bool:
    """Whether a clip's file is there in its full length; one that a full disk or a copy cut short is written anew."""
    return path.is_file() and path.stat().st_size == _num_bytes(clip, size_wh)

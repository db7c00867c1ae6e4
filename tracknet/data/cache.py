"""On-disk cache of decoded and resized frames.

A training epoch reads windows in random order, but a video can only be decoded in order. Every clip is therefore
decoded once into ``<cache_dir>/<key>.frames`` (uint8 ``[frame, 3, h, w]``, no header), which allows random access. The
key is a hash of the names, sizes, modification times and sampled bytes of the clip's files, and of the frame size: a
changed file or setting gives another key, a moved folder keeps its key.
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
from tracknet.data.labels import Clip
from tracknet.data.video import read_video
from tracknet.errors import UserError
from tracknet.files import new_file, one_at_a_time, write_text
from tracknet.progress import ProgressBar

VERSION = 4  # version of the resizing, part of the cache key
TAG = "Signature: 8a477f597d28d172789f06886806bc55"  # marks a cache folder, see https://bford.info/cachedir/
SAMPLE = 1 << 16  # bytes hashed at each end of a file


def ensure_cached(clips: list[Clip], size_wh: tuple[int, int], cache_dir: Path) -> list[Path]:
    """Decode the clips that are not cached yet, with a progress bar, and return the frame file of each clip.

    If several processes need the same clip, one decodes it and the others wait.

    Args:
        clips: clips to cache.
        size_wh: width and height of the cached frames in pixels.
        cache_dir: folder of the cache, created if missing.

    Returns:
        Paths of the frame files, in the order of ``clips``.

    Raises:
        UserError: if a frame cannot be decoded or the disk has too little space. No incomplete file is left behind.
    """
    paths = [cache_dir / f"{_key(clip, size_wh)}.frames" for clip in clips]
    missing = {path: clip for path, clip in zip(paths, clips) if not _is_complete(path, clip, size_wh)}
    if not missing:
        return paths
    make_cache(cache_dir)
    needed = sum(_num_bytes(clip, size_wh) for clip in missing.values())
    description = f"Decoding frames once ({needed / 1e9:.1f} GB in {cache_dir})"
    with ProgressBar(description, sum(clip.num_frames for clip in missing.values())) as bar:
        for path, clip in missing.items():
            with one_at_a_time(path):
                # Check again under the lock: another process may have written the file in the meantime.
                if _is_complete(path, clip, size_wh):
                    bar.advance(clip.num_frames)
                else:
                    _check_free_space(_num_bytes(clip, size_wh), cache_dir)
                    _write(path, clip, size_wh, bar.advance)
    return paths


def make_cache(folder: Path) -> None:
    """Create a cache folder with the tag that identifies it to backup programs and to ``is_cache``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_cache(folder):
        write_text(
            folder / "CACHEDIR.TAG", f"{TAG}\n# Frames decoded by TrackNet. This folder can be deleted at any time.\n"
        )


def is_cache(folder: Path) -> bool:
    """Return whether a folder contains the tag that ``make_cache`` writes."""
    try:
        with (folder / "CACHEDIR.TAG").open("rb") as file:
            return file.read(len(TAG)) == TAG.encode()
    except OSError:
        return False


def _key(clip: Clip, size_wh: tuple[int, int]) -> str:
    """Return the cache key of a clip at a frame size, 24 hexadecimal digits."""
    files = [clip.video] if clip.video is not None else list(clip.frames)
    digest = hashlib.sha256(f"{VERSION} {size_wh[0]}x{size_wh[1]}".encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
        # File names are bytes in an arbitrary encoding; fsencode returns them even where they are not valid UTF-8.
        digest.update(b"|" + os.fsencode(file.name) + f" {stat.st_size} {stat.st_mtime_ns}".encode())
    # Sample the content at both ends of the first and the last file, which are the same file for a video.
    for file in (files[0], files[-1]):
        with file.open("rb") as content:
            digest.update(content.read(SAMPLE))
            content.seek(max(0, file.stat().st_size - SAMPLE))
            digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:24]


def _num_bytes(clip: Clip, size_wh: tuple[int, int]) -> int:
    """Return the size of a clip's frame file in bytes."""
    return clip.num_frames * size_wh[0] * size_wh[1] * 3


def _check_free_space(needed: int, cache_dir: Path) -> None:
    """Raise ``UserError`` if the cache's disk has fewer than ``needed`` free bytes."""
    free = shutil.disk_usage(cache_dir).free
    if needed > free:
        raise UserError(
            f"data.cache_dir={cache_dir}: the frames of one clip require {needed / 1e9:.1f} GB, but only"
            f" {free / 1e9:.1f} GB are free. Set another data.cache_dir, or set data.cache=none to decode frames"
            " whenever they are needed."
        )


def _write(path: Path, clip: Clip, size_wh: tuple[int, int], advance: Callable[[], None]) -> None:
    """Write a clip's frames to a temporary file and rename it to ``path``.

    Frames are written one by one, because a video may be larger than memory.
    """
    with new_file(path) as work:
        with work.open("wb") as file:
            # Reserve the space first: a full disk then raises OSError here. Writing to a memory-mapped sparse file on
            # a full disk kills the process with a signal (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, _num_bytes(clip, size_wh))
        _fill(work, clip, size_wh, advance)


def _fill(work: Path, clip: Clip, size_wh: tuple[int, int], advance: Callable[[], None]) -> None:
    """Decode a clip into an allocated file; images are decoded by a pool of threads, a video in order."""
    frames = np.memmap(work, np.uint8, "r+", shape=(clip.num_frames, 3, size_wh[1], size_wh[0]))
    if clip.video is not None:
        for i, (_, image) in enumerate(read_video(clip.video)):
            if i == len(frames):
                raise UserError(
                    f"{clip.video}: decodes to more frames than the {i} that its packets account for. Re-encode the "
                    "video, for example with ffmpeg."
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
            # Do not decode the remaining images after an error.
            pool.shutdown(cancel_futures=True)
    frames.flush()


def _is_complete(path: Path, clip: Clip, size_wh: tuple[int, int]) -> bool:
    """Return whether a clip's frame file exists with its full length.

    A file that a full disk or an interrupted copy cut short is written again.
    """
    return path.is_file() and path.stat().st_size == _num_bytes(clip, size_wh)

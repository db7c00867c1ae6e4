"""One picture: from a file to RGB at the model's size."""

from __future__ import annotations

import contextlib
import re
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from tracknet.errors import UserError

# What cameras, extractors and downloads write under an image's name, and what is read whole or not at all.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 89_000_000  # of a picture or frame; 8K has 33 million
# What Pillow raises for headers that are none.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, EOFError, RuntimeError)
# In a JPEG 0xff begins a marker, unless it is a value of the picture (then 0 follows), filling, or a restart within
# the picture.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# A JPEG can be decoded at these fractions for less: the inverse transform of its blocks is smaller.
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


def resize(image: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Resize RGB ``[h, w, 3]``.

    Shrinking averages, so that a small ball does not fall between samples: by halves as long as that leaves enough,
    which is what decoding a JPEG at a fraction does too, and the rest by interpolation while every pixel still counts
    in it (below 1.5), else by area.
    """
    size_wh = (size_wh[0], size_wh[1])  # a list, where it comes from a file
    h, w = image.shape[:2]
    # Odd sides are not halved: what is left out of them would shift the rest.
    while w >= 2 * size_wh[0] and h >= 2 * size_wh[1] and w % 2 == h % 2 == 0:
        w, h = w // 2, h // 2
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    if (w, h) == size_wh:
        return image
    by_area = max(w / size_wh[0], h / size_wh[1]) >= 1.5
    return cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA if by_area else cv2.INTER_LINEAR)


def read_image(
    path: Path, clip_wh: tuple[int, int] | None = None, size_wh: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode an image file to RGB uint8 ``[h, w, 3]``.

    Args:
        path: the file.
        clip_wh: size that it must have.
        size_wh: size to bring it to, ``None`` for its own. A JPEG is then decoded at a half, a quarter or an eighth
            where that suffices.

    Raises:
        UserError: the file cannot be decoded, or is not of the clip's size.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
        stored = _read_size(path) if data.size else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    # By content: a PNG is one under any name.
    is_jpeg = data[:2].tobytes() == b"\xff\xd8"
    fraction = 1
    if is_jpeg and size_wh is not None and clip_wh is not None:
        # Only where it divides: a rounded-up size would shift the picture by a part of a pixel.
        fits = [n for n in REDUCED if all(c % n == 0 and c // n >= s for c, s in zip(clip_wh, size_wh))]
        fraction = max(fits, default=1)
    image = None
    # OpenCV fills what is missing of a truncated JPEG with gray and says nothing: look for its end.
    if stored is not None and (not is_jpeg or _has_end(data.tobytes())):
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(data, REDUCED.get(fraction, cv2.IMREAD_COLOR))
    if image is None:
        formats = ", ".join(FORMATS)
        raise UserError(f"{path}: cannot be decoded; the image is damaged, truncated, missing, or none of {formats}.")
    found = (image.shape[1] * fraction, image.shape[0] * fraction)
    if clip_wh is not None and found != tuple(clip_wh):
        raise UserError(f"{path}: is {found[0]}x{found[1]}, but the clip's first frame is {clip_wh[0]}x{clip_wh[1]}.")
    image = image if size_wh is None else resize(image, size_wh)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_size(path: Path) -> tuple[int, int] | None:
    """Read width and height from an image's header, ``None`` where it is none.

    Raises:
        UserError: it has more pixels than any camera makes: a small file can ask for more memory than there is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                size = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has more than {MAX_PIXELS / 1e6:.0f} million pixels.") from error
    except (UnidentifiedImageError, *UNREADABLE):
        return None
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{path}: is {size[0]}x{size[1]}, more than {MAX_PIXELS / 1e6:.0f} million pixels.")
    return size


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG has its end marker; what programs append after it is no part of the picture."""
    at = 2
    while marker := MARKER.search(jpeg, at):
        kind, at = marker[1][0], marker.end()
        if kind in (0xD8, 0xD9):  # another picture begins before this one has ended, or the end
            return kind == 0xD9
        if kind != 0x01:  # what all others say is as long as stands there; a thumbnail in it has an end of its own
            at += int.from_bytes(jpeg[at : at + 2], "big")
    return False


def natural_key(name: str) -> list:
    """Return what sorts names as people do: ``frame_2`` before ``frame_10``. Digits are those of ASCII; ``²`` is
    none."""
    key: list = []
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        key.append((len(part.lstrip("0")), part.lstrip("0"), part) if i % 2 else part)
    return key

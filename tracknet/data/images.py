"""Decoding and resizing of single images."""

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

# Formats that are read: those that cameras, frame extractors and downloads use, and that are decoded completely or not
# at all.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 89_000_000  # largest number of pixels of an image or video frame; 8K has 33 million
# Exceptions that Pillow raises for invalid headers.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, EOFError, RuntimeError)
# Marker of a JPEG segment. A byte 0xff starts a marker unless it is image data (followed by 0), a fill byte (followed
# by 0xff), or a restart marker within the image data (0xd0 to 0xd7).
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# Fractions (1/8, 1/4, 1/2) at which a JPEG can be decoded at lower cost, because the inverse transform of its blocks is
# smaller.
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


def resize(image: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Resize an image.

    Shrinking averages pixels, so that a small ball does not fall between samples. The image is first halved as long as
    it stays at least as large as the result, which matches decoding a JPEG at a fraction. The remaining factor is
    applied by bilinear interpolation below 1.5, where every pixel still contributes, and by area averaging above.

    Args:
        image: image ``[h, w, 3]``.
        size_wh: width and height of the result in pixels.

    Returns:
        Image ``[size_wh[1], size_wh[0], 3]`` of the same dtype; the input itself if its size is right already.
    """
    size_wh = (size_wh[0], size_wh[1])  # a configuration file gives a list, which is not equal to a tuple
    h, w = image.shape[:2]
    # Sides of odd length are not halved: dropping their last pixel would shift the image.
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
        path: path of the image file.
        clip_wh: width and height that the image must have, in pixels; ``None`` accepts any size.
        size_wh: width and height of the result in pixels; ``None`` keeps the size of the image. If both sizes are
            given, a JPEG is decoded at a half, a quarter or an eighth where that suffices.

    Raises:
        UserError: if the file cannot be decoded or does not have the clip's size.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
        stored = _read_size(path) if data.size else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    # The format is determined by the content, not by the suffix.
    is_jpeg = data[:2].tobytes() == b"\xff\xd8"
    fraction = 1
    if is_jpeg and size_wh is not None and clip_wh is not None:
        # Only fractions that divide both sides: rounding the size up would shift the image by a part of a pixel.
        fits = [n for n in REDUCED if all(c % n == 0 and c // n >= s for c, s in zip(clip_wh, size_wh))]
        fraction = max(fits, default=1)
    image = None
    # OpenCV fills the missing part of a truncated JPEG with gray without an error, so look for the end marker.
    if stored is not None and (not is_jpeg or _has_end(data.tobytes())):
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(data, REDUCED.get(fraction, cv2.IMREAD_COLOR))
    if image is None:
        formats = ", ".join(FORMATS)
        raise UserError(f"{path}: cannot be decoded. The file is missing, damaged, truncated, or none of {formats}.")
    full_wh = (image.shape[1] * fraction, image.shape[0] * fraction)
    if clip_wh is not None and full_wh != tuple(clip_wh):
        raise UserError(
            f"{path}: is {full_wh[0]}x{full_wh[1]}, but the clip's first frame is {clip_wh[0]}x{clip_wh[1]}."
        )
    image = image if size_wh is None else resize(image, size_wh)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_size(path: Path) -> tuple[int, int] | None:
    """Read width and height from an image's header; return ``None`` if the header is invalid.

    Raises:
        UserError: if the image has more than ``MAX_PIXELS`` pixels, more than any camera makes. A small file can
            otherwise require more memory than the machine has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                size = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: contains more than {MAX_PIXELS / 1e6:.0f} million pixels.") from error
    except (UnidentifiedImageError, *UNREADABLE):
        return None
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{path}: is {size[0]}x{size[1]}, more than {MAX_PIXELS / 1e6:.0f} million pixels.")
    return size


def _has_end(jpeg: bytes) -> bool:
    """Return whether a JPEG contains its end marker. Data that programs append after it is ignored."""
    position = 2
    while marker := MARKER.search(jpeg, position):
        kind, position = marker[1][0], marker.end()
        if kind in (0xD8, 0xD9):  # start of another image before the end of this one, or the end
            return kind == 0xD9
        # Skip the content of a segment by its stored length: a thumbnail in it has its own end marker. Only 0x01 has no
        # content.
        if kind != 0x01:
            position += int.from_bytes(jpeg[position : position + 2], "big")
    return False


def natural_key(name: str) -> list:
    """Return a sort key that orders numbers in names by value: ``frame_2`` before ``frame_10``.

    Only ASCII digits count as digits; ``²`` does not.
    """
    key: list = []
    # Split into text (even indices) and digits (odd indices). Without leading zeros, the longer number is larger, and
    # numbers of equal length compare as text.
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        key.append((len(part.lstrip("0")), part.lstrip("0"), part) if i % 2 else part)
    return key

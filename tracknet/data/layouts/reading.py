"""Common parts of the layouts: reading of tables and frames, and checks of every clip.

All errors name the file and the row, and what to do.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracknet.data.images import read_image
from tracknet.data.labels import BallLabel, Clip, Event, Visibility
from tracknet.data.video import VIDEO_SUFFIXES, probe
from tracknet.errors import UserError, nearest

# Decimal number of bounded length; float() also accepts "nan", "1_0" and digits of other scripts.
NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# Positions that tables contain where there is no ball.
NO_POSITION = ((0.0, 0.0), (-1.0, -1.0))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ClipFrames:
    """ClipFrames of a clip on disk.

    Attributes:
        images: one image file per frame; empty for a video.
        video: path of the video; ``None`` for images.
        num_frames: number of frames.
        size_wh: width and height of the first frame in pixels.
        first: frame number of the first frame in the label file: the number of the first image, or 0 for a video.
    """

    images: tuple[Path, ...]
    video: Path | None
    num_frames: int
    size_wh: tuple[int, int]
    first: int = 0


def read_text(path: Path) -> str:
    """Read a label file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: if the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a CSV table with a header.

    Columns are found by name, in any order; further columns are allowed.

    Args:
        path: path of the table.
        columns: names of the required columns.

    Yields:
        Location of a row for messages (file and line), and its values by column, stripped.

    Raises:
        UserError: if a required column is missing or not unique, a row is longer than the header or ends before one of
            the required columns, or a cell contains several lines.
    """
    with io.StringIO(read_text(path), newline="") as file:
        # In strict mode an unclosed quote is an error; otherwise the rest of the table would become one cell.
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        lines = _read_lines(reader, path)
        reader.fieldnames = [c.strip() for c in next(lines) or []]
        # Check the header.
        for column in columns:
            if column not in reader.fieldnames:
                separator = next(
                    (mark for mark in (";", "\t") if len(reader.fieldnames) == 1 and mark in reader.fieldnames[0]), None
                )
                hint = (
                    f"; the columns are separated by {separator!r}: save the table with commas"
                    if separator
                    else nearest(column, reader.fieldnames)
                )
                raise UserError(
                    f"{path}: column '{column}' not found (available: {', '.join(reader.fieldnames)}){hint}"
                )
            if reader.fieldnames.count(column) > 1:
                raise UserError(f"{path}: two columns are named '{column}'.")
        # Check and yield the rows.
        for row in lines:
            where = f"{path}, line {reader.reader.line_num}"  # the inner reader counts blank lines, too
            if None in row:
                raise UserError(f"{where}: has more values than the header has columns.")
            # An unclosed quote that another quote closes further down merges all rows between them into one cell.
            if any("\n" in value or "\r" in value for value in row.values() if value):
                raise UserError(
                    f"{where}: a cell contains several lines. Check for an unclosed quote in the lines before."
                )
            # A blank cell is a value (no ball); a missing cell is not.
            if short := [column for column in columns if row[column] is None]:
                raise UserError(
                    f"{where}: ends before column '{short[0]}'. Check whether the file is cut off; a blank cell"
                    " requires its comma, too."
                )
            yield where, {name: (value or "").strip() for name, value in row.items()}


def _read_lines(reader: csv.DictReader, path: Path) -> Iterator:
    """Yield the column names of a table and then its rows.

    Raises:
        UserError: if the file is not valid CSV. The message names the line on which the invalid row begins.
    """
    num_read = 0
    try:
        for line in itertools.chain([reader.fieldnames], reader):
            num_read = reader.reader.line_num
            yield line
    except csv.Error as error:
        raise UserError(
            f"{path}, line {num_read + 1}: is not valid CSV ({error}). Check for an unclosed quote, or a cell that"
            " contains a whole file."
        ) from error


def read_number(text: str, column: str, where: str) -> int:
    """Read a frame number; ``12``, ``12.0`` and ``0012.jpg`` are equal.

    Args:
        text: cell of the table.
        column: name of the column, for messages.
        where: location of the row, for messages.

    Raises:
        UserError: if the text is not a frame number.
    """
    digits = re.fullmatch(r"([0-9]{1,18})(\.0*|\.[A-Za-z]\w*)?", text)
    if not digits:
        raise UserError(f"{where}: '{column}' is '{text[:60]}', expected a number such as 0012.jpg.")
    return int(digits[1])


def read_point(x: str, y: str, where: str, reason: str) -> tuple[float, float]:
    """Read a position in pixels.

    Args:
        x: text of the x coordinate.
        y: text of the y coordinate.
        where: location of the row, for messages.
        reason: clause that explains why a position is expected, for messages.

    Raises:
        UserError: if the texts are not two finite numbers.
    """
    if (point := parse_point(x, y)) is None:
        raise UserError(
            f"{where}: {reason}, but the position is ('{x[:60]}', '{y[:60]}'); expected two numbers in pixels."
        )
    return point


def parse_point(x: str, y: str) -> tuple[float, float] | None:
    """Return a position, or ``None`` if the texts are not two finite numbers."""
    if not (NUMBER.fullmatch(x) and NUMBER.fullmatch(y)):
        return None
    point = (float(x), float(y))
    return point if all(map(math.isfinite, point)) else None


def read_absent(x: str, y: str, event: Event | None = None) -> BallLabel:
    """Return the label of a frame without a ball, and mark whether the table nevertheless contains a position."""
    point = parse_point(x, y)
    return BallLabel(Visibility.ABSENT, None, event, point is not None and point not in NO_POSITION)


def read_visibility(text: str, column: str, where: str, classes: str = "0123") -> Visibility:
    """Read a visibility class; ``1`` and ``1.0`` are equal.

    Args:
        text: cell of the table.
        column: name of the column, for messages.
        where: location of the row, for messages.
        classes: digits of the valid classes.

    Raises:
        UserError: if the text is not a valid class.
    """
    kind = text.removesuffix(".0")
    if len(kind) != 1 or kind not in classes:
        names = {"0": "0 (absent)", "1": "1 (visible)", "2": "2 (hard to see)", "3": "3 (occluded)"}
        raise UserError(f"{where}: '{column}' is '{text}', expected {', '.join(names[c] for c in classes)}.")
    return Visibility(int(kind))


def read_event(text: str, where: str) -> Event | None:
    """Read TrackNet's status: 0 flying, 1 hit, 2 bounce; return ``None`` if it is blank."""
    if not text:
        return None
    if text.removesuffix(".0") not in ("0", "1", "2"):
        raise UserError(f"{where}: 'status' is '{text}', expected 0 (flying), 1 (hit), 2 (bounce) or nothing.")
    return Event(int(text.removesuffix(".0")))


def read_ball_csv(path: Path) -> dict[int, BallLabel]:
    """Read a table with the columns ``Frame, Visibility, X, Y``, the format of TrackNetV2, BlurBall and RacketVision.

    ClipFrames count from 0. Visibility 0 means that there is no ball, regardless of X and Y.

    Returns:
        Labels by frame number.
    """
    labels: dict[int, BallLabel] = {}
    for where, row in read_table(path, ("Frame", "Visibility", "X", "Y")):
        kind = read_visibility(row["Visibility"], "Visibility", where, "01")
        if kind is Visibility.ABSENT:
            label = read_absent(row["X"], row["Y"])
        else:
            label = BallLabel(kind, read_point(row["X"], row["Y"], where, "Visibility is 1"))
        add_label(labels, read_number(row["Frame"], "Frame", where), label, where)
    return labels


def add_label(labels: dict[int, BallLabel], frame: int, label: BallLabel, where: str) -> None:
    """Add the label of a frame to a dict.

    Raises:
        UserError: if the frame already has a label.
    """
    if frame in labels:
        raise UserError(f"{where}: frame {frame} is labeled twice.")
    labels[frame] = label


def unique_by(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Return label files by the name of their clip.

    Args:
        paths: paths of the label files.
        name_of: function that returns the name of a label file's clip.

    Raises:
        UserError: if two files belong to the same clip.
    """
    by_name: dict[str, Path] = {}
    for path in paths:
        other = by_name.setdefault(name_of(path), path)
        if other != path:
            raise UserError(f"{path}: '{other}' also labels '{name_of(path)}'; keep one of the two.")
    return by_name


def numbered_images(folder: Path) -> dict[int, Path]:
    """Return the images of a folder by the number that is their name; other files are ignored.

    Raises:
        UserError: if two images have the same number.
    """
    paths = [
        p for p in visible_files(folder) if p.suffix.lower() in IMAGE_SUFFIXES and re.fullmatch(r"[0-9]{1,18}", p.stem)
    ]
    images = {int(p.stem): p for p in paths}
    if len(images) < len(paths):
        duplicate = next(p for p in paths if images[int(p.stem)] != p)
        raise UserError(
            f"{folder}: '{duplicate.name}' and '{images[int(duplicate.stem)].name}' have the same frame number; keep"
            " one of the two."
        )
    return images


def open_images(images: dict[int, Path], folder: Path) -> ClipFrames:
    """Open numbered images as the frames of a clip.

    Args:
        images: image files by number, at least one.
        folder: folder of the images, for messages.

    Raises:
        UserError: if an image is missing between the first and the last.
    """
    numbers = sorted(images)
    first, last = numbers[0], numbers[-1]
    # Count the missing numbers and list only the first ones: the number of a stray image may be a date, which leaves
    # billions of numbers missing.
    if num_missing := last - first + 1 - len(numbers):
        gaps = ((a + 1, b) for a, b in itertools.pairwise(numbers) if b > a + 1)
        examples = list(itertools.islice(itertools.chain.from_iterable(itertools.starmap(range, gaps)), 5))
        more = f", … ({num_missing} in all)" if num_missing > len(examples) else ""
        raise UserError(
            f"{folder}: images {', '.join(map(str, examples))}{more} are missing between {images[first].name} and"
            f" {images[last].name}, but windows require consecutive frames. If one of these two images is not a frame"
            " of the clip, move it to another folder."
        )
    frames = tuple(images[i] for i in numbers)
    return ClipFrames(frames, None, len(frames), image_size(frames[0]), first)


def open_video(path: Path) -> ClipFrames:
    """Open a video as the frames of a clip."""
    info = probe(path)
    return ClipFrames((), path, info.num_frames, info.size_wh)


def find_video(folder: Path, stem: str) -> Path | None:
    """Return the video with a given name and any video suffix in a folder, or ``None``.

    Raises:
        UserError: if there are several.
    """
    found = [p for p in visible_files(folder) if p.stem == stem and p.suffix.lower() in VIDEO_SUFFIXES]
    if len(found) > 1:
        raise UserError(
            f"{folder}: contains several videos of one clip ({', '.join(p.name for p in found)}); keep one."
        )
    return found[0] if found else None


def open_clip_frames(images: Path | None, videos: Path | None, stem: str, labels: Path) -> ClipFrames:
    """Open the frames of a label file: a folder of numbered images or else a video.

    Args:
        images: folder of the images; ``None`` if the layout has none.
        videos: folder of the videos; ``None`` if the layout has none.
        stem: name of the video without its suffix.
        labels: path of the label file, for messages.

    Raises:
        UserError: if neither exists.
    """
    if images is not None and images.is_dir() and (numbered := numbered_images(images)):
        return open_images(numbered, images)
    video = find_video(videos, stem) if videos is not None and videos.is_dir() else None
    if video is None:
        expected = [f"images in '{images}'"] if images is not None else []
        expected += [f"a video '{videos / stem}.mp4'"] if videos is not None else []
        misnamed = (
            [p for p in visible_files(images) if p.suffix.lower() in IMAGE_SUFFIXES] if images is not None else []
        )
        hint = f" '{misnamed[0].name}' is ignored: images must be named by number, 0000.jpg." if misnamed else ""
        raise UserError(f"{labels}: found labels but no frames; expected {' or '.join(expected)}.{hint}")
    return open_video(video)


def rallies_with_frames(images: Path, videos: Path | None) -> set[str]:
    """Return the names of all rallies of a match that have a folder of images or a video.

    Args:
        images: folder with one folder of images per rally.
        videos: folder with one video per rally, or ``None``.
    """
    files = visible_files(videos) if videos is not None else []
    return {p.name for p in subfolders(images)} | {p.stem for p in files if p.suffix.lower() in VIDEO_SUFFIXES}


def make_clip(name: str, game: str, frames: ClipFrames, labels: dict[int, BallLabel], path: Path) -> Clip:
    """Combine frames and labels into a clip.

    Args:
        name: name of the clip, unique within the dataset.
        game: game of the clip, the unit of splits.
        frames: frames of the clip.
        labels: labels by frame number. The first frame has the number ``frames.first``.
        path: path of the label file.

    Raises:
        UserError: if a label belongs to no frame, or its position is outside the frame.
    """
    # Frame numbers become indices from 0.
    before_first = [i for i in labels if i < frames.first]
    if before_first:
        raise UserError(
            f"{path}: labels frame {format_numbers(before_first)}, but the first image is '{frames.images[0].name}'."
        )
    labels = {i - frames.first: label for i, label in labels.items()}
    past_end = [i for i in labels if i >= frames.num_frames]
    if past_end:
        raise UserError(
            f"{path}: labels frame {format_numbers(past_end)}, but the clip contains only {frames.num_frames} frames."
            " Check whether an image or the end of the video is missing."
        )
    # Pixel centers are at integers, so the frame reaches from -0.5 to the size minus 0.5.
    w, h = frames.size_wh
    for i, label in labels.items():
        if label.xy_image is not None:
            x, y = label.xy_image
            if not (-0.5 <= x <= w - 0.5 and -0.5 <= y <= h - 0.5):
                if (x, y) in NO_POSITION:
                    hint = "If this position means that there is no ball, set the visibility of the row to 0."
                elif -0.5 <= y <= w - 0.5 and -0.5 <= x <= h - 0.5:
                    hint = "x and y seem to be swapped, unless the labels are for another resolution."
                else:
                    hint = "Check whether the labels are for another resolution."
                raise UserError(f"{path}, frame {i}: the ball at ({x:g}, {y:g}) is outside the {w}x{h} image. {hint}")
    return Clip(name, game, frames.images, frames.video, frames.num_frames, frames.size_wh, labels, path)


def image_size(path: Path) -> tuple[int, int]:
    """Return the width and height of an image file in pixels."""
    h, w = read_image(path).shape[:2]
    return w, h


def subfolders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder, sorted by name; none if the folder does not exist."""
    return [p for p in visible_files(folder) if p.is_dir()]


def visible_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the entries of a folder that match a pattern, sorted by name; none if the folder does not exist.

    Hidden files, which other operating systems leave behind (``._x.csv``), are skipped.
    """
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith(".")) if folder.is_dir() else []


def format_numbers(numbers: list[int]) -> str:
    """Return the five smallest of a list of numbers as text, with the length of the list if it is longer."""
    head = ", ".join(str(n) for n in sorted(numbers)[:5])
    return head if len(numbers) <= 5 else f"{head}, … ({len(numbers)} in all)"

"""What the layouts share: tables, frames on disk, and the checks that every clip passes.

Every error names file and row, and what to do.
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
from tracknet.data.video import VIDEO_SUFFIXES, probe
from tracknet.errors import UserError, nearest
from tracknet.labels import BallLabel, Clip, Event, Visibility

NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# What tables write where there is no ball.
NO_POSITION = ((0.0, 0.0), (-1.0, -1.0))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Frames:
    """The frames of a clip on disk.

    Attributes:
        images: one file per frame, or empty.
        video: the video, or ``None``.
        num_frames: how many.
        size_wh: of the first, in pixels.
        first: number of the first image; labels count from 0 there or carry the image's number.
    """

    images: tuple[Path, ...]
    video: Path | None
    num_frames: int
    size_wh: tuple[int, int]
    first: int = 0


def read_text(path: Path) -> str:
    """Read a label file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a table with a header; columns are found by name, in any order, and others may stand beside them.

    Yields:
        Where a row stands (file and line), and its values by column, stripped.

    Raises:
        UserError: a column is missing, a row is longer than the header or ends before one of the columns, or a cell
            has several lines.
    """
    with io.StringIO(read_text(path), newline="") as file:
        # Strict: a quote that is never closed would take the rest of the table into one cell.
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        lines = _lines_of(reader, path)
        reader.fieldnames = [c.strip() for c in next(lines) or []]
        for column in columns:
            if column not in reader.fieldnames:
                other = next(
                    (mark for mark in (";", "\t") if len(reader.fieldnames) == 1 and mark in reader.fieldnames[0]), None
                )
                hint = (
                    f"; its columns stand between {other!r}: save it with commas"
                    if other
                    else nearest(column, reader.fieldnames)
                )
                raise UserError(f"{path}: no column '{column}' (there are: {', '.join(reader.fieldnames)}){hint}")
            if reader.fieldnames.count(column) > 1:
                raise UserError(f"{path}: two columns are called '{column}'.")
        for row in lines:
            where = f"{path}, line {reader.reader.line_num}"  # the inner one counts blank lines too
            if None in row:
                raise UserError(f"{where}: has more values than the header has columns.")
            # An open quote that another one closes further down takes all rows between into one cell.
            if any("\n" in value or "\r" in value for value in row.values() if value):
                raise UserError(f"{where}: a cell has several lines; is a quote open in one of those before?")
            # Blank is a value that says something, a cell that is not there is none.
            if short := [column for column in columns if row[column] is None]:
                raise UserError(
                    f"{where}: ends before column '{short[0]}'; is the file cut off? A blank cell needs its comma too."
                )
            yield where, {name: (value or "").strip() for name, value in row.items()}


def _lines_of(reader: csv.DictReader, path: Path) -> Iterator:
    """Yield a table's names of columns and then its rows; what is no table is an error with the line on which it
    begins."""
    read = 0
    try:
        for line in itertools.chain([reader.fieldnames], reader):
            read = reader.reader.line_num
            yield line
    except csv.Error as error:
        raise UserError(
            f"{path}, line {read + 1}: is no CSV ({error}); a quote may be open, or a cell hold a whole file."
        ) from error


def read_number(text: str, column: str, where: str) -> int:
    """Read the number of a frame; ``12``, ``12.0`` and ``0012.jpg`` are the same."""
    digits = re.fullmatch(r"([0-9]{1,18})(\.0*|\.[A-Za-z]\w*)?", text)
    if not digits:
        raise UserError(f"{where}: '{column}' is '{text[:60]}', expected a number such as 0012.jpg.")
    return int(digits[1])


def read_point(x: str, y: str, where: str, why: str) -> tuple[float, float]:
    """Read a position in pixels."""
    if (point := parse_point(x, y)) is None:
        raise UserError(f"{where}: {why} but the position is ('{x[:60]}', '{y[:60]}'), expected two numbers in pixels.")
    return point


def parse_point(x: str, y: str) -> tuple[float, float] | None:
    """Return a position, or ``None`` where it is not two finite numbers."""
    if not (NUMBER.fullmatch(x) and NUMBER.fullmatch(y)):
        return None
    point = (float(x), float(y))
    return point if all(map(math.isfinite, point)) else None


def read_absent(x: str, y: str, event: Event | None = None) -> BallLabel:
    """Return the label of a frame without a ball, which notes a position that stands there all the same."""
    point = parse_point(x, y)
    return BallLabel(Visibility.ABSENT, None, event, point is not None and point not in NO_POSITION)


def read_visibility(text: str, column: str, where: str, classes: str = "0123") -> Visibility:
    """Read a visibility class; ``1`` and ``1.0`` are the same."""
    kind = text.removesuffix(".0")
    if len(kind) != 1 or kind not in classes:
        names = {"0": "0 (absent)", "1": "1 (visible)", "2": "2 (hard to see)", "3": "3 (occluded)"}
        raise UserError(f"{where}: '{column}' is '{text}', expected {', '.join(names[c] for c in classes)}.")
    return Visibility(int(kind))


def read_event(text: str, where: str) -> Event | None:
    """Read TrackNet's status: 0 flying, 1 hit, 2 bounce; blank says nothing."""
    if not text:
        return None
    if text.removesuffix(".0") not in ("0", "1", "2"):
        raise UserError(f"{where}: 'status' is '{text}', expected 0 (flying), 1 (hit), 2 (bounce) or nothing.")
    return Event(int(text.removesuffix(".0")))


def read_ball_csv(path: Path) -> dict[int, BallLabel]:
    """Read ``Frame, Visibility, X, Y`` in any order: TrackNetV2, BlurBall, RacketVision. Frames count from 0; absent is
    visibility 0, whatever stands in X and Y."""
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
    """Add a frame's label; a frame has one."""
    if frame in labels:
        raise UserError(f"{where}: frame {frame} is labeled twice.")
    labels[frame] = label


def unique_by(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Return label files by the name of their clip.

    Raises:
        UserError: two are of one clip.
    """
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(name_of(path), path)
        if other != path:
            raise UserError(f"{path}: '{other}' labels '{name_of(path)}' too; keep one of the two.")
    return found


def numbered_images(folder: Path) -> dict[int, Path]:
    """Return the images of a folder by the number that is their name."""
    found = [
        p for p in visible_files(folder) if p.suffix.lower() in IMAGE_SUFFIXES and re.fullmatch(r"[0-9]{1,18}", p.stem)
    ]
    images = {int(p.stem): p for p in found}
    if len(images) < len(found):
        twice = next(p for p in found if images[int(p.stem)] != p)
        raise UserError(
            f"{folder}: '{twice.name}' and '{images[int(twice.stem)].name}' are one frame number; keep one."
        )
    return images


def open_images(images: dict[int, Path], folder: Path) -> Frames:
    """Take numbered images as the frames of a clip; none may be missing between the first and the last."""
    numbers = sorted(images)
    first, last = numbers[0], numbers[-1]
    # Counted, not listed: one stray number may be a date.
    if num_missing := last - first + 1 - len(numbers):
        gaps = ((a + 1, b) for a, b in itertools.pairwise(numbers) if b > a + 1)
        named = list(itertools.islice(itertools.chain.from_iterable(itertools.starmap(range, gaps)), 5))
        more = f", … ({num_missing} in all)" if num_missing > len(named) else ""
        raise UserError(
            f"{folder}: images {', '.join(map(str, named))}{more} are missing between {images[first].name} and"
            f" {images[last].name}; windows of consecutive frames need them. If one of these two is no frame of the"
            " clip, move it away."
        )
    frames = tuple(images[i] for i in numbers)
    return Frames(frames, None, len(frames), image_size(frames[0]), first)


def open_video(path: Path) -> Frames:
    """Take a video as the frames of a clip."""
    info = probe(path)
    return Frames((), path, info.num_frames, info.size_wh)


def find_video(folder: Path, stem: str) -> Path | None:
    """Return the video of this name in a folder, whatever its suffix."""
    found = [p for p in visible_files(folder) if p.stem == stem and p.suffix.lower() in VIDEO_SUFFIXES]
    if len(found) > 1:
        raise UserError(f"{folder}: holds {', '.join(p.name for p in found)}; keep one.")
    return found[0] if found else None


def open_frames(images: Path | None, videos: Path | None, stem: str, labels: Path) -> Frames:
    """Open the frames that a label file belongs to: a folder of numbered images, or else a video.

    Raises:
        UserError: there is neither.
    """
    if images is not None and images.is_dir() and (numbered := numbered_images(images)):
        return open_images(numbered, images)
    video = find_video(videos, stem) if videos is not None and videos.is_dir() else None
    if video is None:
        places = [f"images in '{images}'"] if images is not None else []
        places += [f"a video '{videos / stem}.mp4'"] if videos is not None else []
        others = [p for p in visible_files(images) if p.suffix.lower() in IMAGE_SUFFIXES] if images is not None else []
        hint = f" '{others[0].name}' is no frame: an image's name is its number, 0000.jpg." if others else ""
        raise UserError(f"{labels}: there are labels but no frames; expected {' or '.join(places)}.{hint}")
    return open_video(video)


def rallies_with_frames(images: Path, videos: Path | None) -> set[str]:
    """Return the names of the folders of images, and of the videos, that a match has."""
    found = visible_files(videos) if videos is not None else []
    return {p.name for p in subfolders(images)} | {p.stem for p in found if p.suffix.lower() in VIDEO_SUFFIXES}


def make_clip(name: str, game: str, frames: Frames, labels: dict[int, BallLabel], path: Path) -> Clip:
    """Put frames and labels together.

    Args:
        name: unique within the dataset.
        game: the unit of splits.
        frames: as opened.
        labels: by the number of the frame; where images start at another number than 0, by theirs.
        path: file that the labels come from.

    Raises:
        UserError: a label belongs to no frame, or lies outside the picture.
    """
    early = [i for i in labels if i < frames.first]
    if early:
        raise UserError(f"{path}: labels frame {some(early)}, but the first image is '{frames.images[0].name}'.")
    labels = {i - frames.first: label for i, label in labels.items()}
    beyond = [i for i in labels if i >= frames.num_frames]
    if beyond:
        raise UserError(
            f"{path}: labels frame {some(beyond)}, but the clip has only {frames.num_frames} "
            "frames; is the image or the end of the video missing?"
        )
    w, h = frames.size_wh
    for i, label in labels.items():
        if label.xy_image is not None:
            x, y = label.xy_image
            if not (-0.5 <= x <= w - 0.5 and -0.5 <= y <= h - 0.5):
                if (x, y) in NO_POSITION:
                    problem = "if that means that there is none, its row must say so (visibility 0)."
                elif -0.5 <= y <= w - 0.5 and -0.5 <= x <= h - 0.5:
                    problem = "are the labels of another resolution? x and y seem to be swapped."
                else:
                    problem = "are the labels of another resolution?"
                raise UserError(
                    f"{path}, frame {i}: the ball at ({x:g}, {y:g}) is outside the {w}x{h} image; {problem}"
                )
    return Clip(name, game, frames.images, frames.video, frames.num_frames, frames.size_wh, labels, path)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file."""
    h, w = read_image(path).shape[:2]
    return w, h


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, in the order of their names; none where there is no such folder."""
    return [p for p in visible_files(folder) if p.is_dir()]


def visible_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what matches in a folder, in the order of names, but for hidden files, which other systems leave
    (``._x.csv``)."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith(".")) if folder.is_dir() else []


def some(numbers: list[int]) -> str:
    """Name the first few of a list of numbers."""
    head = ", ".join(str(n) for n in sorted(numbers)[:5])
    return head if len(numbers) <= 5 else f"{head}, … ({len(numbers)} in all)"

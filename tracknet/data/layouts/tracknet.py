"""TrackNet's layout: ``gameN/ClipM/`` with ``Label.csv`` and numbered images or one video file.

``Label.csv`` has the columns ``file name, visibility, x-coordinate, y-coordinate, status``; x and y are blank when
visibility is 0. Row ``0012.jpg`` belongs to frame 12: of the video, or the image of that name.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import cv2

from tracknet.data.video import VIDEO_SUFFIXES, probe
from tracknet.errors import UserError, nearest
from tracknet.labels import BallLabel, Clip, Visibility

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
COLUMNS = ("file name", "visibility", "x-coordinate", "y-coordinate")


def list_games(root: Path) -> dict[str, Path]:
    """Return the game folders below the root: those that hold a clip folder with a ``Label.csv``, or are one."""
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder '{root}'. Set data.root=<folder with game1, game2, …>.")
    games = {
        p.name: p
        for p in sorted(root.iterdir())
        if p.is_dir() and ((p / "Label.csv").is_file() or any(p.glob("*/Label.csv")))
    }
    if not games:
        raise UserError(f"data.root: no folder in '{root}' holds <clip>/Label.csv; expected game1/Clip1/Label.csv, …")
    return games


def read_game(root: Path, game: str | int) -> list[Clip]:
    """Read all clips of one game.

    Args:
        root: folder of the games.
        game: a number (``3`` means ``game3``) or a folder's name.

    Raises:
        UserError: the game, a label or an image is missing or malformed; names file and row.
    """
    games = list_games(root)
    name = f"game{game}" if f"game{game}" in games else str(game)
    if name not in games:
        raise UserError(f"data.split: game '{game}' is not in '{root}' (there are: {', '.join(games)})"
                        f"{nearest(name, games)}")  # fmt: skip
    folder = games[name]
    for clip in sorted(folder.iterdir()):
        if (
            clip.is_dir()
            and not (clip / "Label.csv").is_file()
            and any(p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) for p in clip.iterdir())
        ):
            raise UserError(f"{clip}: has frames but no Label.csv; label it (a file with the header alone means that nothing is "
                            "labelled yet), or move it out of the game.")  # fmt: skip
    folders = [folder] if (folder / "Label.csv").is_file() else sorted(p.parent for p in folder.glob("*/Label.csv"))
    return [read_clip(f, name, name if f == folder else f"{name}/{f.name}") for f in folders]


def read_clip(folder: Path, game: str, name: str) -> Clip:
    """Read one clip folder, its images or video and its labels."""
    numbered = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and p.stem.isdigit()]
    images = {int(p.stem): p for p in numbered}
    if len(images) < len(numbered):
        twice = next(p for p in numbered if images[int(p.stem)] != p)
        raise UserError(
            f"{folder}: '{twice.name}' and '{images[int(twice.stem)].name}' are one frame number; keep one."
        )
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    if images and videos:
        raise UserError(f"{folder}: holds both numbered images and '{videos[0].name}'; keep one of them.")
    if len(videos) > 1:
        raise UserError(f"{folder}: holds {len(videos)} videos ({', '.join(v.name for v in videos)}); keep one.")
    labels = read_labels(folder / "Label.csv")
    if videos:
        info = probe(videos[0])
        frames, num_frames, size_wh = (), info.num_frames, info.size_wh
    elif images:
        first, last = min(images), max(images)
        missing = [i for i in range(first, last + 1) if i not in images]
        if missing:
            raise UserError(f"{folder}: images {_some(missing)} are missing between {first} and {last}; "
                            "windows of consecutive frames need them.")  # fmt: skip
        frames = tuple(images[i] for i in range(first, last + 1))
        early = [i for i in labels if i < first]
        if early:
            raise UserError(f"{folder / 'Label.csv'}: labels frame {_some(early)}, but the first image is "
                            f"'{images[first].name}'.")  # fmt: skip
        labels = {i - first: label for i, label in labels.items()}
        num_frames, size_wh = len(frames), _image_size(frames[0])
    else:
        raise UserError(f"{folder}: has a Label.csv but neither numbered images nor a video.")
    beyond = [i for i in labels if i >= num_frames]
    if beyond:
        raise UserError(f"{folder / 'Label.csv'}: labels frame {_some(beyond)}, but the clip has only {num_frames} "
                        "frames; is the image or the end of the video missing?")  # fmt: skip
    for i, label in labels.items():
        _check_inside(label, size_wh, f"{folder / 'Label.csv'}, frame {i}")
    return Clip(name, game, frames, videos[0] if videos else None, num_frames, size_wh, labels)


def read_labels(path: Path) -> dict[int, BallLabel]:
    """Read ``Label.csv`` into labels by frame number."""
    labels: dict[int, BallLabel] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}).") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        reader.fieldnames = [c.strip() for c in reader.fieldnames or []]
        for column in COLUMNS:
            if column not in reader.fieldnames:
                raise UserError(f"{path}: no column '{column}' (there are: {', '.join(reader.fieldnames)})"
                                f"{nearest(column, reader.fieldnames)}")  # fmt: skip
        for row in reader:
            frame, label = _read_row(row, f"{path}, line {reader.line_num}")
            if frame in labels:
                raise UserError(f"{path}, line {reader.line_num}: frame {frame} is labelled twice.")
            labels[frame] = label
    return labels


def _read_row(row: dict[str, str | None], where: str) -> tuple[int, BallLabel]:
    name, visibility, x, y = ((row[c] or "").strip() for c in COLUMNS)
    digits = re.fullmatch(r"(\d+)(\.\w+)?", name)
    if not digits:
        raise UserError(f"{where}: 'file name' is '{name}', expected a number such as 0012.jpg.")
    if visibility not in ("0", "1", "2", "3"):
        raise UserError(f"{where}: 'visibility' is '{visibility}', expected 0 (absent), 1, 2 or 3 (occluded).")
    kind = Visibility(int(visibility))
    if kind is Visibility.ABSENT:
        return int(digits[1]), BallLabel(kind, None)
    try:
        xy = (float(x), float(y))
    except ValueError:
        raise UserError(f"{where}: visibility is {visibility} but the position is ('{x}', '{y}'), "
                        "expected two numbers in pixels.") from None  # fmt: skip
    return int(digits[1]), BallLabel(kind, xy)


def _check_inside(label: BallLabel, size_wh: tuple[int, int], where: str) -> None:
    if label.xy_image is None:
        return
    x, y = label.xy_image
    if not (-0.5 <= x <= size_wh[0] - 0.5 and -0.5 <= y <= size_wh[1] - 0.5):
        raise UserError(f"{where}: the ball at ({x:g}, {y:g}) is outside the {size_wh[0]}x{size_wh[1]} image; "
                        "are the labels of another resolution?")  # fmt: skip


def _image_size(path: Path) -> tuple[int, int]:
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f"{path}: cannot be decoded as an image; it is damaged or not an image.")
    return image.shape[1], image.shape[0]


def _some(numbers: list[int]) -> str:
    head = ", ".join(str(n) for n in sorted(numbers)[:5])
    return head if len(numbers) <= 5 else f"{head}, … ({len(numbers)} in all)"

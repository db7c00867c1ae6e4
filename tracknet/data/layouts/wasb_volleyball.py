"""Layout of WASB's volleyball: ``videos/<match>/<clip>/<frame>.jpg`` with one text file of labels per clip.

The file ``volleyball_ball_annotation/<match>/<clip>.txt`` contains one line ``x y`` per image, in the order of the
images' numbers; ``0 0`` is a frame without a ball. Images after the last line are unlabeled.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.layouts.reading import (
    make_clip,
    numbered_images,
    open_images,
    read_point,
    read_text,
    subfolders,
    visible_files,
)
from tracknet.errors import UserError

EXPECTED = "videos/<match>/<clip>/<frame>.jpg and volleyball_ball_annotation/<match>/<clip>.txt"
PREFIX = ""
OPTIONS = ()  # sections of the data section that read_game takes as arguments
ANNOTATIONS = "volleyball_ball_annotation"  # folder of the labels
# Names of the matches in each split.
TRAIN = [
    "1",
    "3",
    "6",
    "7",
    "10",
    "13",
    "15",
    "16",
    "18",
    "22",
    "23",
    "31",
    "32",
    "36",
    "38",
    "39",
    "40",
    "41",
    "42",
    "48",
    "50",
    "52",
    "53",
    "54",
]
VAL = ["0", "2", "8", "12", "17", "19", "24", "26", "27", "28", "30", "33", "46", "49", "51"]
TEST = ["4", "5", "9", "11", "14", "20", "21", "25", "29", "34", "35", "37", "43", "44", "45", "47"]


def list_games(root: Path) -> list[str]:
    """Return the names of the matches that have an annotation."""
    return [p.name for p in subfolders(root / "videos") if visible_files(root / ANNOTATIONS / p.name, "*.txt")]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the original split of the videos. WASB trains on its training and validation matches together."""
    return {"wasb": {"train": TRAIN, "val": VAL, "test": TEST}}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all clips of a match.

    Raises:
        UserError: if labels or frames of a clip are missing or malformed.
    """
    texts = {p.stem: p for p in visible_files(root / ANNOTATIONS / game, "*.txt")}
    folders = {p.name: p for p in subfolders(root / "videos" / game)}
    clips = []
    for name in sorted(folders.keys() | texts.keys()):
        if name not in texts:
            raise UserError(f"{folders[name]}: has frames but no {ANNOTATIONS}/{game}/{name}.txt.")
        images = numbered_images(folders[name]) if name in folders else {}
        if not images:
            raise UserError(f"{texts[name]}: found labels but no frames; expected images in 'videos/{game}/{name}'.")
        frames = open_images(images, folders[name])
        labels = {frames.first + i: label for i, label in enumerate(_read_lines(texts[name]))}
        clips.append(make_clip(f"{game}/{name}", game, frames, labels, texts[name]))
    return clips


def _read_lines(path: Path) -> list[BallLabel]:
    """Read a label file; return one label per line."""
    lines = read_text(path).rstrip().splitlines()
    labels = []
    for number, line in enumerate(lines, start=1):
        values, where = line.split(), f"{path}, line {number}"
        if len(values) != 2:
            raise UserError(f"{where}: is '{line}', expected 'x y'.")
        x, y = read_point(values[0], values[1], where, "each line is the label of a frame")
        labels.append(BallLabel(Visibility.ABSENT, None) if x == y == 0 else BallLabel(Visibility.EASY, (x, y)))
    return labels

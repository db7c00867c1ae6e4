"""Any videos or folders of images, each with a table ``frame, x, y[, visibility]`` of the same name beside it.

``<clip>.csv`` beside ``<clip>.mp4`` or ``<clip>/0000.jpg …``, in ``data.root`` itself (then each clip is a game) or in
a folder per game. A row without x and y is a frame without a ball; a frame without a row is unlabeled.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tracknet.data.layouts.reading import (
    NO_POSITION,
    add_label,
    make_clip,
    open_frames,
    read_absent,
    read_number,
    read_point,
    read_table,
    read_visibility,
    subfolders,
    visible_files,
)
from tracknet.errors import UserError
from tracknet.labels import BallLabel, Clip, Visibility

EXPECTED = "<clip>.csv beside <clip>.mp4, in the folder itself or in one folder per game"
PREFIX = ""
OPTIONS = ("csv",)  # sections of the data section that read_game takes


@dataclass
class CsvConfig:
    """What the columns of ``layout: csv`` are called, and how they count."""

    frame: str = "frame"
    """Column with the frame's number."""
    x: str = "x"
    """Column with the ball's distance from the left."""
    y: str = "y"
    """Column with the ball's distance from the top."""
    visibility: str | None = None
    """Column with 0 (absent), 1, 2 (hard to see) or 3 (occluded); ``null`` = there is a ball wherever there are x and
    y."""
    first_frame: int | None = None
    """Number of the first frame in the tables; ``null`` = 0 for a video, and for images the number that is the name of
    the first."""
    normalized: bool = False
    """Whether x and y are fractions of width and height (from the picture's corner) instead of pixels."""
    absent_xy: tuple[float, float] | None = None
    """Position that means that there is no ball, such as ``[-1,-1]`` or ``[0,0]``; ``null`` = none does."""

    def __post_init__(self) -> None:
        columns = {"frame": self.frame, "x": self.x, "y": self.y, "visibility": self.visibility}
        for (a, name), (b, other) in itertools.combinations(columns.items(), 2):
            if name == other:
                raise UserError(f"data.csv.{a} and data.csv.{b} are both '{name}'; each is a column of its own.")
        if self.first_frame is not None and self.first_frame < 0:
            raise UserError(f"data.csv.first_frame={self.first_frame}: frames are numbered from 0 or above.")
        if self.absent_xy is not None and not all(map(math.isfinite, self.absent_xy)):
            raise UserError(f"data.csv.absent_xy={list(self.absent_xy)}: takes two finite numbers, such as [-1,-1].")


def list_games(root: Path) -> list[str]:
    """Return the folders with tables, and the tables that lie in the root itself."""
    return [p.stem for p in visible_files(root, "*.csv")] + [
        p.name for p in subfolders(root) if visible_files(p, "*.csv")
    ]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return none: these are the user's own."""
    return {}


def read_game(root: Path, game: str, config: CsvConfig) -> list[Clip]:
    """Read all clips of one game."""
    # Whatever has this name is meant as a table: one that cannot be read is an error, and not a game without clips.
    if os.path.lexists(root / f"{game}.csv"):
        if visible_files(root / game, "*.csv"):
            raise UserError(f"{root}: '{game}' is both a table and a folder with tables; rename one.")
        return [_read_clip(root / f"{game}.csv", game, game, config)]
    return [_read_clip(p, game, f"{game}/{p.stem}", config) for p in visible_files(root / game, "*.csv")]


def _read_clip(path: Path, game: str, name: str, config: CsvConfig) -> Clip:
    frames = open_frames(path.with_suffix(""), path.parent, path.stem, path)
    columns = [config.frame, config.x, config.y, *([config.visibility] if config.visibility else [])]
    labels: dict[int, BallLabel] = {}
    for where, row in read_table(path, columns):
        frame = read_number(row[config.frame], config.frame, where)
        if config.first_frame is not None:
            if frame < config.first_frame:
                raise UserError(f"{where}: frame {frame} comes before data.csv.first_frame={config.first_frame}.")
            frame += frames.first - config.first_frame
        add_label(labels, frame, _read_label(row, config, frames.size_wh, where), where)
    _check_placeholders(labels, path)
    return make_clip(name, game, frames, labels, path)


def _read_label(row: dict[str, str], config: CsvConfig, size_wh: tuple[int, int], where: str) -> BallLabel:
    x, y = row[config.x], row[config.y]
    if config.visibility is None:
        kind = Visibility.EASY if x or y else Visibility.ABSENT
    else:
        kind = read_visibility(row[config.visibility], config.visibility, where)
    if kind is Visibility.ABSENT:
        return read_absent(x, y)
    point = read_point(x, y, where, "there is a ball")
    if config.absent_xy is not None and point == tuple(config.absent_xy):
        return BallLabel(Visibility.ABSENT, None)
    if config.normalized and point not in NO_POSITION:
        if not all(0 <= v <= 1 for v in point):
            raise UserError(
                f"{where}: ({x}, {y}) are no fractions of the picture; set data.csv.normalized=false if they are"
                " pixels."
            )
        point = (point[0] * size_wh[0] - 0.5, point[1] * size_wh[1] - 0.5)
    return BallLabel(kind, point)


def _check_placeholders(labels: dict[int, BallLabel], path: Path) -> None:
    """Refuse balls where tables put those that are not there, more often than a ball can be."""
    for place in NO_POSITION:
        number = sum(label.xy_image == place for label in labels.values())
        if number > (1 if place == (0, 0) else 0):
            text = f"[{place[0]:g},{place[1]:g}]"
            raise UserError(
                f"{path}: {number} of {len(labels)} rows have a ball at {text}; if that means that there is none, say"
                f" so: data.csv.absent_xy={text}."
            )

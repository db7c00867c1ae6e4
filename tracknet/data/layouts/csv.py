"""Layout of arbitrary videos or image folders with CSV tables.

Each table ``<clip>.csv`` with the columns ``frame, x, y[, visibility]`` is next to ``<clip>.mp4`` or
``<clip>/0000.jpg …``, either in ``data.root`` (then each clip is a game) or in one folder per game. A row without x and
y is a frame without a ball; a frame without a row is unlabeled.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.layouts.reading import (
    NO_POSITION,
    add_label,
    make_clip,
    open_clip_frames,
    read_absent,
    read_number,
    read_point,
    read_table,
    read_visibility,
    subfolders,
    visible_files,
)
from tracknet.errors import UserError

EXPECTED = "<clip>.csv next to <clip>.mp4, in the folder itself or in one folder per game"
PREFIX = ""
OPTIONS = ("csv",)  # sections of the data section that read_game takes as arguments


@dataclass
class CsvConfig:
    """Names and meaning of the columns in ``layout: csv``."""

    frame: str = "frame"
    """Column with the frame number."""
    x: str = "x"
    """Column with the ball's distance from the left edge."""
    y: str = "y"
    """Column with the ball's distance from the top edge."""
    visibility: str | None = None
    """Column with 0 (absent), 1 (visible), 2 (hard to see) or 3 (occluded); ``null`` = a ball in rows with x and y."""
    first_frame: int | None = None
    """Number of the first frame in the tables; ``null`` = 0 for videos, the number of the first image for images."""
    normalized: bool = False
    """Unit of x and y: fractions of the width and height from the corner of the image (``true``) or pixels."""
    absent_xy: tuple[float, float] | None = None
    """Position that marks a frame without a ball, such as ``[-1,-1]`` or ``[0,0]``; ``null`` = none."""

    def __post_init__(self) -> None:
        columns = {"frame": self.frame, "x": self.x, "y": self.y, "visibility": self.visibility}
        for (a, name), (b, other) in itertools.combinations(columns.items(), 2):
            if name == other:
                raise UserError(f"data.csv.{a} and data.csv.{b} are both '{name}'; set each to a separate column.")
        if self.first_frame is not None and self.first_frame < 0:
            raise UserError(f"data.csv.first_frame={self.first_frame}: must be 0 or greater.")
        if self.absent_xy is not None and not all(map(math.isfinite, self.absent_xy)):
            raise UserError(f"data.csv.absent_xy={list(self.absent_xy)}: must be two finite numbers, such as [-1,-1].")


def list_games(root: Path) -> list[str]:
    """Return the names of the tables in the root, and of the folders that contain tables."""
    return [p.stem for p in visible_files(root, "*.csv")] + [
        p.name for p in subfolders(root) if visible_files(p, "*.csv")
    ]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return no splits, because the datasets of this layout are the user's own."""
    return {}


def read_game(root: Path, game: str, config: CsvConfig) -> list[Clip]:
    """Read all clips of a game.

    Raises:
        UserError: if a table or the frames of a clip are missing or malformed.
    """
    # Anything with this name is meant to be a table, even a broken link: if it cannot be read, that is an error rather
    # than a game without clips.
    if os.path.lexists(root / f"{game}.csv"):
        if visible_files(root / game, "*.csv"):
            raise UserError(f"{root}: '{game}' is both a table and a folder with tables; rename one.")
        return [_read_clip(root / f"{game}.csv", game, game, config)]
    return [_read_clip(p, game, f"{game}/{p.stem}", config) for p in visible_files(root / game, "*.csv")]


def _read_clip(path: Path, game: str, name: str, config: CsvConfig) -> Clip:
    """Read the table of a clip and open its frames."""
    frames = open_clip_frames(path.with_suffix(""), path.parent, path.stem, path)
    columns = [config.frame, config.x, config.y, *([config.visibility] if config.visibility else [])]
    labels: dict[int, BallLabel] = {}
    for where, row in read_table(path, columns):
        frame = read_number(row[config.frame], config.frame, where)
        if config.first_frame is not None:
            if frame < config.first_frame:
                raise UserError(f"{where}: frame {frame} comes before data.csv.first_frame={config.first_frame}.")
            frame += frames.first - config.first_frame  # make_clip expects the numbers of the images
        add_label(labels, frame, _read_label(row, config, frames.size_wh, where), where)
    _check_placeholders(labels, path)
    return make_clip(name, game, frames, labels, path)


def _read_label(row: dict[str, str], config: CsvConfig, size_wh: tuple[int, int], where: str) -> BallLabel:
    """Return the label of a row, with the position in pixels."""
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
    # Placeholders are kept as they are, so that _check_placeholders recognizes them.
    if config.normalized and point not in NO_POSITION:
        if not all(0 <= v <= 1 for v in point):
            raise UserError(
                f"{where}: ({x}, {y}) are not fractions of the image size; set data.csv.normalized=false if they are"
                " pixels."
            )
        point = (point[0] * size_wh[0] - 0.5, point[1] * size_wh[1] - 0.5)
    return BallLabel(kind, point)


def _check_placeholders(labels: dict[int, BallLabel], path: Path) -> None:
    """Raise an error if balls are at the placeholder of a missing ball more often than is plausible.

    That is at all for (-1, -1), and more than once for (0, 0).
    """
    for placeholder in NO_POSITION:
        number = sum(label.xy_image == placeholder for label in labels.values())
        if number > (1 if placeholder == (0, 0) else 0):
            text = f"[{placeholder[0]:g},{placeholder[1]:g}]"
            raise UserError(
                f"{path}: {number} of {len(labels)} rows have a ball at {text}. If this position means that there is no"
                f" ball, set data.csv.absent_xy={text}."
            )

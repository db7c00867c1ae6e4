"""Layout of TrackNet (tennis): ``gameN/ClipM/`` with ``Label.csv`` and numbered images or one video file.

``Label.csv`` has the columns ``file name, visibility, x-coordinate, y-coordinate, status``. x and y are blank where
visibility is 0; the column status may be missing. Row ``0012.jpg`` belongs to frame 12 of the video, or to the image
with this number.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.layouts.reading import (
    IMAGE_SUFFIXES,
    add_label,
    make_clip,
    numbered_images,
    open_images,
    open_video,
    read_absent,
    read_event,
    read_number,
    read_point,
    read_table,
    read_visibility,
    subfolders,
    visible_files,
)
from tracknet.data.video import VIDEO_SUFFIXES
from tracknet.errors import UserError

EXPECTED = "<game>/<clip>/Label.csv: game1/Clip1/Label.csv, …"
PREFIX = "game"
OPTIONS = ()  # sections of the data section that read_game takes as arguments
COLUMNS = ("file name", "visibility", "x-coordinate", "y-coordinate")
# Published splits. Where a publication has no validation games, the last training game is used for validation.
SPLITS: dict[str, dict[str, tuple[int, ...] | range | list[int]]] = {
    "wasb": {"train": range(1, 7), "val": [7], "test": [8, 9, 10]},  # BMVC 2023
    "tracknetv4": {"train": [2, 3, 5, 6, 7, 8], "val": [10], "test": [1, 4, 9]},
}


def list_games(root: Path) -> list[str]:
    """Return the names of the game folders: those that contain a ``Label.csv``, or a clip folder with one."""
    return [p.name for p in subfolders(root) if (p / "Label.csv").is_file() or any(p.glob("*/Label.csv"))]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the published splits of the ten games."""
    return {name: {k: [f"game{g}" for g in v] for k, v in split.items()} for name, split in SPLITS.items()}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all clips of a game.

    Raises:
        UserError: if labels or frames are missing or malformed. The message names file and row.
    """
    # Frames without labels are an error, so that a clip is never skipped silently.
    folder = root / game
    for clip in subfolders(folder):
        if not (clip / "Label.csv").is_file() and any(
            p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) for p in visible_files(clip)
        ):
            raise UserError(
                f"{clip}: has frames but no Label.csv. Label the clip (a file with only the header marks all frames as "
                "unlabeled), or move it out of the game's folder."
            )
    folders = [folder] if (folder / "Label.csv").is_file() else sorted(p.parent for p in folder.glob("*/Label.csv"))
    return [read_clip(f, game, game if f == folder else f"{game}/{f.name}") for f in folders]


def read_clip(folder: Path, game: str, name: str) -> Clip:
    """Read the labels and frames of a clip folder.

    Args:
        folder: folder of the clip.
        game: name of the game.
        name: name of the clip, unique within the dataset.

    Raises:
        UserError: if labels or frames are missing, ambiguous or malformed.
    """
    images = numbered_images(folder)
    videos = [p for p in visible_files(folder) if p.suffix.lower() in VIDEO_SUFFIXES]
    if images and videos:
        raise UserError(f"{folder}: contains both numbered images and '{videos[0].name}'; keep one of them.")
    if len(videos) > 1:
        raise UserError(f"{folder}: contains {len(videos)} videos ({', '.join(v.name for v in videos)}); keep one.")
    labels = read_labels(folder / "Label.csv")
    if not videos and not images:
        raise UserError(f"{folder}: has a Label.csv but neither numbered images nor a video.")
    frames = open_video(videos[0]) if videos else open_images(images, folder)
    return make_clip(name, game, frames, labels, folder / "Label.csv")


def read_labels(path: Path) -> dict[int, BallLabel]:
    """Read ``Label.csv`` and return its labels by frame number."""
    labels: dict[int, BallLabel] = {}
    for where, row in read_table(path, COLUMNS):
        name, visibility, x, y = (row[c] for c in COLUMNS)
        frame = read_number(name, "file name", where)
        kind = read_visibility(visibility, "visibility", where)
        event = read_event(row.get("status", ""), where)
        if kind is Visibility.ABSENT:
            label = read_absent(x, y, event)
        else:
            label = BallLabel(kind, read_point(x, y, where, f"visibility is {visibility}"), event)
        add_label(labels, frame, label, where)
    return labels

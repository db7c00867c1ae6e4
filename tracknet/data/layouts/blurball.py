"""BlurBall's table tennis: ``<match>/rallies_videos/<rally>.mp4`` or ``<match>/frames/<rally>/00000.png``, and a table
per rally.

Tables are ``<match>/csv/<rally>.csv``, or as the archive has them ``all_csv_annotations/<match>_csv_<rally>.csv``;
columns ``Frame, Visibility, X, Y, l, theta`` in any order, frames from 0. X, Y is the *middle* of the streak (TrackNet
marks its leading end), ``l`` its half length and ``theta`` its direction, which this project does not use.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.data.layouts.reading import (
    make_clip,
    open_frames,
    rallies_with_frames,
    read_ball_csv,
    subfolders,
    unique_by,
    visible_files,
)
from tracknet.errors import UserError
from tracknet.labels import Clip

EXPECTED = (
    "<match>/rallies_videos/<rally>.mp4 with <match>/csv/<rally>.csv or all_csv_annotations/<match>_csv_<rally>.csv:"
    " 00/…"
)
PREFIX = ""
OPTIONS = ()  # sections of the data section that read_game takes
VIDEO_FOLDERS = ("rallies_videos", "videos_rallies")


def list_games(root: Path) -> list[str]:
    """Return the matches: folders with videos or frames of rallies."""
    return [p.name for p in subfolders(root) if any((p / f).is_dir() for f in (*VIDEO_FOLDERS, "frames"))]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the published division: matches 22 to 25 test (21 of the others validates here)."""
    return {"blurball": {"train": [f"{g:02d}" for g in range(21)], "val": ["21"], "test": ["22", "23", "24", "25"]}}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all rallies of one match."""
    match = root / game
    tables = unique_by(visible_files(match / "csv", "*.csv"), lambda p: p.stem)
    if not tables:
        prefix = f"{game}_csv_"
        tables = unique_by(visible_files(root, f"all_csv*/**/{prefix}*.csv"), lambda p: p.stem.removeprefix(prefix))
    videos = next((match / f for f in VIDEO_FOLDERS if (match / f).is_dir()), None)
    if unlabeled := sorted(rallies_with_frames(match / "frames", videos) - tables.keys()):
        raise UserError(
            f"{match}: rally '{unlabeled[0]}' has frames but no table; expected csv/{unlabeled[0]}.csv or, beside the"
            f" matches, all_csv_annotations/{game}_csv_{unlabeled[0]}.csv."
        )
    return [
        make_clip(
            f"{game}/{rally}",
            game,
            open_frames(match / "frames" / rally, videos, rally, table),
            read_ball_csv(table),
            table,
        )
        for rally, table in tables.items()
    ]

"""Layout of BlurBall (table tennis).

Frames are ``<match>/rallies_videos/<rally>.mp4`` or ``<match>/frames/<rally>/00000.png …``. Tables are
``<match>/csv/<rally>.csv`` or, as in the published archive, ``all_csv_annotations/<match>_csv_<rally>.csv``, with the
columns ``Frame, Visibility, X, Y, l, theta`` in any order; frames count from 0. X, Y is the *middle* of the ball's
streak (TrackNet marks its leading end). ``l``, half the length of the streak, and ``theta``, its direction, are not
used.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.data.labels import Clip
from tracknet.data.layouts.reading import (
    make_clip,
    open_clip_frames,
    rallies_with_frames,
    read_ball_csv,
    subfolders,
    unique_by,
    visible_files,
)
from tracknet.errors import UserError

EXPECTED = (
    "<match>/rallies_videos/<rally>.mp4 with <match>/csv/<rally>.csv or all_csv_annotations/<match>_csv_<rally>.csv:"
    " 00/…"
)
PREFIX = ""
OPTIONS = ()  # sections of the data section that read_game takes as arguments
VIDEO_FOLDERS = ("rallies_videos", "videos_rallies")  # names of the folder of videos in a match


def list_games(root: Path) -> list[str]:
    """Return the names of the matches: folders with videos or frames of rallies."""
    return [p.name for p in subfolders(root) if any((p / f).is_dir() for f in (*VIDEO_FOLDERS, "frames"))]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the published split: matches 22 to 25 are for testing; of the others, 21 is used for validation here."""
    return {"blurball": {"train": [f"{g:02d}" for g in range(21)], "val": ["21"], "test": ["22", "23", "24", "25"]}}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all rallies of a match.

    Raises:
        UserError: if labels or frames of a rally are missing or malformed.
    """
    match = root / game
    tables = unique_by(visible_files(match / "csv", "*.csv"), lambda p: p.stem)
    if not tables:
        prefix = f"{game}_csv_"
        tables = unique_by(visible_files(root, f"all_csv*/**/{prefix}*.csv"), lambda p: p.stem.removeprefix(prefix))
    videos = next((match / f for f in VIDEO_FOLDERS if (match / f).is_dir()), None)
    if unlabeled := sorted(rallies_with_frames(match / "frames", videos) - tables.keys()):
        raise UserError(
            f"{match}: rally '{unlabeled[0]}' has frames but no table; expected csv/{unlabeled[0]}.csv or, next to the"
            f" matches, all_csv_annotations/{game}_csv_{unlabeled[0]}.csv."
        )
    return [
        make_clip(
            f"{game}/{rally}",
            game,
            open_clip_frames(match / "frames" / rally, videos, rally, table),
            read_ball_csv(table),
            table,
        )
        for rally, table in tables.items()
    ]

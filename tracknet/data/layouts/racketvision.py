"""Layout of RacketVision, in which one frame in five is labeled.

Tables are ``<sport>/all/<match>/csv/<rally>_ball.csv`` with the columns ``Frame, X, Y, Visibility`` in any order; a
frame without a row is unlabeled, which does not mean that it has no ball. Videos are
``<sport>/videos/<match>_<rally>.mp4``; images extracted to ``<sport>/all/<match>/frame/<rally>/0000.jpg …`` take
precedence. Splits are in ``<sport>/info/{train,val,test}.json`` as lists of ``[match, rally]``.
"""

from __future__ import annotations

import json
from pathlib import Path

from tracknet.data.labels import Clip
from tracknet.data.layouts.reading import (
    make_clip,
    open_clip_frames,
    read_ball_csv,
    read_text,
    subfolders,
    visible_files,
)
from tracknet.errors import UserError

EXPECTED = "<sport>/all/<match>/csv/<rally>_ball.csv: tennis/all/match1/csv/000_ball.csv, …"
PREFIX = ""
OPTIONS = ()  # sections of the data section that read_game takes as arguments


def list_games(root: Path) -> list[str]:
    """Return the names of the matches, ``<sport>/<match>``."""
    return [
        f"{sport.name}/{match.name}"
        for sport in subfolders(root)
        for match in subfolders(sport / "all")
        if (match / "csv").is_dir()
    ]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the split ``racketvision`` of all sports in the folder, and a split for each sport, named after it.

    Entries are rallies, ``<sport>/<match>/<rally>``.
    """
    by_sport: dict[str, dict[str, list[str]]] = {}
    for sport in sorted({g.partition("/")[0] for g in games}):
        files = {split: root / sport / "info" / f"{split}.json" for split in ("train", "val", "test")}
        if all(f.is_file() for f in files.values()):
            by_sport[sport] = {split: _read_entries(f, sport) for split, f in files.items()}
    all_sports = {split: [e for s in by_sport.values() for e in s[split]] for split in ("train", "val", "test")}
    return {"racketvision": all_sports, **by_sport} if by_sport else {}


def _read_entries(path: Path, sport: str) -> list[str]:
    """Read the list of rallies of a split."""
    text = read_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: is damaged JSON ({error}); expected a list of ["match", "rally"].') from error
    is_list = isinstance(entries, list) and all(isinstance(e, list) and len(e) == 2 for e in entries)
    if not is_list or not all(type(name) in (str, int) for e in entries for name in e):
        raise UserError(f'{path}: expected a list of ["match", "rally"].')
    return [f"{sport}/{match}/{rally}" for match, rally in entries]


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all rallies of a match.

    Raises:
        UserError: if labels or frames of a rally are missing or malformed.
    """
    sport, _, match = game.partition("/")
    folder = root / sport / "all" / match
    clips = []
    for table in visible_files(folder / "csv", "*_ball.csv"):
        rally = table.name.removesuffix("_ball.csv")
        frames = open_clip_frames(folder / "frame" / rally, root / sport / "videos", f"{match}_{rally}", table)
        clips.append(make_clip(f"{game}/{rally}", game, frames, read_ball_csv(table), table))
    if not clips:
        raise UserError(f"{folder / 'csv'}: contains no <rally>_ball.csv.")
    return clips

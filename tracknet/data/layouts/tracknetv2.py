"""TrackNetV2's shuttlecock layout: ``<match>/csv/<rally>_ball.csv`` beside ``<match>/video/<rally>.mp4``.

The original archive has ``Professional/match1 …``, ``Amateur/match1 …`` and ``Test/match1 …``; TrackNetV3 arranges them
as ``train/match1 …``, ``val/…``, ``test/…`` with frames in ``frame/<rally>/0.png …`` and corrected labels of the test
in ``corrected_csv``, which are taken where they are; WASB as ``match1 …`` and ``test_match1 …``. Columns ``Frame,
Visibility, X, Y``; frames count from 0.
"""

from __future__ import annotations

import re
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

EXPECTED = "<match>/csv/<rally>_ball.csv: Professional/match1/csv/1_01_00_ball.csv, or match1/csv/…"
PREFIX = "match"
OPTIONS = ()  # sections of the data section that read_game takes


def list_games(root: Path) -> list[str]:
    """Return the matches, ``match1`` or ``Professional/match1``: folders that hold a ``csv`` folder."""
    return [
        p.relative_to(root).as_posix()
        for group in subfolders(root)
        for p in (group, *subfolders(group))
        if (p / "csv").is_dir() or (p / "corrected_csv").is_dir()
    ]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return ``official``: trained on professionals and amateurs, tested on three further matches.

    A whole match of the training set validates: the last professional one. TrackNetV3 validates on the last rally of
    every match that it trains on (``tracknetv3``), which shows the same courts and is refused as a leak unless
    ``data.allow_leaks=true``.
    """

    def of(pattern: str) -> list[str]:
        found = [g for g in games if re.fullmatch(pattern, g)]
        return sorted(found, key=lambda g: int(g.rpartition("match")[2]))

    if of(r"train/match[0-9]+"):
        train, test = of(r"train/match[0-9]+"), of(r"test/match[0-9]+")
        last = train[-1]
        return {
            "official": {
                "train": train[:-1],
                "val": [g for g in (last, last.replace("train", "val")) if g in games],
                "test": test,
            },
            "tracknetv3": {"train": train, "val": of(r"val/match[0-9]+"), "test": test},
        }
    if of(r"Professional/match[0-9]+"):
        train = of(r"Professional/match[0-9]+")
        return {
            "official": {
                "train": train[:-1] + of(r"Amateur/match[0-9]+"),
                "val": train[-1:],
                "test": of(r"Test/match[0-9]+"),
            }
        }
    train = of(r"match[0-9]+")
    return {"official": {"train": train[:-1], "val": train[-1:], "test": of(r"test_match[0-9]+")}}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all rallies of one match.

    Raises:
        UserError: labels or frames of a rally are missing or malformed; names file and row.
    """
    match = root / game
    labeled = match / "corrected_csv" if (match / "corrected_csv").is_dir() else match / "csv"
    tables = unique_by(visible_files(labeled, "*.csv"), lambda p: p.stem.removesuffix("_ball"))
    if not tables:
        raise UserError(f"{labeled}: holds no <rally>_ball.csv.")
    if unlabeled := sorted(rallies_with_frames(match / "frame", match / "video") - tables.keys()):
        raise UserError(
            f"{match}: rally '{unlabeled[0]}' has frames but no {labeled.name}/{unlabeled[0]}_ball.csv; label it"
            " (the header alone means that nothing is labeled yet), or move it away."
        )
    return [
        make_clip(
            f"{game}/{rally}",
            game,
            open_frames(match / "frame" / rally, match / "video", rally, table),
            read_ball_csv(table),
            table,
        )
        for rally, table in tables.items()
    ]

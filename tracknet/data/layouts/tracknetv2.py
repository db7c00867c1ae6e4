"""Layout of TrackNetV2 (badminton): ``<match>/csv/<rally>_ball.csv`` next to ``<match>/video/<rally>.mp4``.

Tables have the columns ``Frame, Visibility, X, Y``; frames count from 0. Three arrangements of the matches are read:

- The original archive: ``Professional/match1 …``, ``Amateur/match1 …`` and ``Test/match1 …``.
- TrackNetV3: ``train/match1 …``, ``val/…`` and ``test/…``, with images in ``frame/<rally>/0.png …`` and corrected
  labels of the test matches in ``corrected_csv``, which take precedence.
- WASB: ``match1 …`` and ``test_match1 …``.
"""

from __future__ import annotations

import re
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

EXPECTED = "<match>/csv/<rally>_ball.csv: Professional/match1/csv/1_01_00_ball.csv, or match1/csv/…"
PREFIX = "match"
OPTIONS = ()  # sections of the data section that read_game takes as arguments


def list_games(root: Path) -> list[str]:
    """Return the names of the matches, ``match1`` or ``Professional/match1``: folders with a folder of tables."""
    return [
        p.relative_to(root).as_posix()
        for group in subfolders(root)
        for p in (group, *subfolders(group))
        if (p / "csv").is_dir() or (p / "corrected_csv").is_dir()
    ]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the published splits.

    ``official`` trains on the professional and amateur matches and tests on three further matches. Validation uses a
    whole match of the training set, the last professional one. TrackNetV3's split (``tracknetv3``) validates on the
    last rally of every training match. It shows the same courts, so it is refused as a leak unless
    ``data.allow_leaks=true``.
    """

    def select(pattern: str) -> list[str]:
        """Return the games that match a pattern, sorted by number."""
        matches = [g for g in games if re.fullmatch(pattern, g)]
        return sorted(matches, key=lambda g: int(g.rpartition("match")[2]))

    # TrackNetV3's arrangement. The rallies of a match are split between train/ and val/; validation takes both parts.
    if select(r"train/match[0-9]+"):
        train, test = select(r"train/match[0-9]+"), select(r"test/match[0-9]+")
        last = train[-1]
        return {
            "official": {
                "train": train[:-1],
                "val": [g for g in (last, last.replace("train", "val")) if g in games],
                "test": test,
            },
            "tracknetv3": {"train": train, "val": select(r"val/match[0-9]+"), "test": test},
        }
    # The original archive.
    if select(r"Professional/match[0-9]+"):
        train = select(r"Professional/match[0-9]+")
        return {
            "official": {
                "train": train[:-1] + select(r"Amateur/match[0-9]+"),
                "val": train[-1:],
                "test": select(r"Test/match[0-9]+"),
            }
        }
    # WASB's arrangement.
    train = select(r"match[0-9]+")
    return {"official": {"train": train[:-1], "val": train[-1:], "test": select(r"test_match[0-9]+")}}


def read_game(root: Path, game: str) -> list[Clip]:
    """Read all rallies of a match.

    Raises:
        UserError: if labels or frames of a rally are missing or malformed. The message names file and row.
    """
    match = root / game
    labeled = match / "corrected_csv" if (match / "corrected_csv").is_dir() else match / "csv"
    tables = unique_by(visible_files(labeled, "*.csv"), lambda p: p.stem.removesuffix("_ball"))
    if not tables:
        raise UserError(f"{labeled}: contains no <rally>_ball.csv.")
    if unlabeled := sorted(rallies_with_frames(match / "frame", match / "video") - tables.keys()):
        raise UserError(
            f"{match}: rally '{unlabeled[0]}' has frames but no {labeled.name}/{unlabeled[0]}_ball.csv. Label"
            " the rally (a file with only the header marks all frames as unlabeled), or move it to another folder."
        )
    return [
        make_clip(
            f"{game}/{rally}",
            game,
            open_clip_frames(match / "frame" / rally, match / "video", rally, table),
            read_ball_csv(table),
            table,
        )
        for rally, table in tables.items()
    ]

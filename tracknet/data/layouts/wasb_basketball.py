"""Layout of WASB's basketball: ``videos/<game>/<clip>/000000.jpg …`` and ``ball-annos/<game>/…_<clip>.xml`` (CVAT)."""

from __future__ import annotations

from pathlib import Path

from tracknet.data.labels import Clip
from tracknet.data.layouts.cvat import CvatConfig, read_cvat
from tracknet.data.layouts.reading import (
    make_clip,
    numbered_images,
    open_images,
    subfolders,
    unique_by,
    visible_files,
)
from tracknet.errors import UserError

EXPECTED = "videos/<game>/<clip>/000000.jpg and ball-annos/<game>/<name>_<clip>.xml"
PREFIX = ""
OPTIONS = ("cvat",)  # sections of the data section that read_game takes as arguments
TEST = [  # names of WASB's test games
    "21800974",
    "21801076",
    "21801079",
    "21800970",
    "21800965",
    "21801165",
    "21801071",
    "21801049",
    "21801070",
    "21800977",
    "21801162",
    "21801120",
    "21801007",
    "21801078",
    "21801123",
    "21801188",
    "21801038",
    "21800978",
    "21801159",
    "21801152",
    "21801204",
    "21801229",
    "21800988",
    "21801077",
    "21801153",
    "21801063",
    "21801096",
    "21801105",
    "21801050",
    "21801129",
]


def list_games(root: Path) -> list[str]:
    """Return the names of the games that have both clips and annotations."""
    return [p.name for p in subfolders(root / "videos") if visible_files(root / "ball-annos" / p.name, "*.xml")]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return WASB's split: thirty test games; of the others, the last is used for validation here."""
    train = [g for g in games if g not in TEST]
    return {"wasb": {"train": train[:-1], "val": train[-1:], "test": TEST}}


def read_game(root: Path, game: str, config: CvatConfig) -> list[Clip]:
    """Read all clips of a game.

    Raises:
        UserError: if annotations or frames are missing or malformed. A clip without an annotation is an error rather
            than a clip without a ball.
    """
    annotations = unique_by(visible_files(root / "ball-annos" / game, "*.xml"), lambda p: p.stem.rpartition("_")[2])
    folders = {p.name: p for p in subfolders(root / "videos" / game)}
    for clip in sorted(folders.keys() ^ annotations.keys()):
        if clip in folders:
            raise UserError(f"{folders[clip]}: has frames but no ball-annos/{game}/…_{clip}.xml.")
        raise UserError(f"{annotations[clip]}: found labels but no frames; expected images in 'videos/{game}/{clip}'.")
    clips = []
    for name, folder in folders.items():
        images = numbered_images(folder)
        if not images:
            raise UserError(f"{folder}: contains no numbered images.")
        frames = open_images(images, folder)
        labels = read_cvat(annotations[name], frames.num_frames, config)
        clips.append(
            make_clip(
                f"{game}/{name}", game, frames, {i + frames.first: v for i, v in labels.items()}, annotations[name]
            )
        )
    return clips

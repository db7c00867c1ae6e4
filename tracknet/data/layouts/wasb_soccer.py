"""Layout of WASB's soccer (ISSIA): ``frames/ID-1/00000.png …`` or ``videos/ID-1.avi``; ``annos/ID-1.xml`` (CVAT)."""

from __future__ import annotations

from pathlib import Path

from tracknet.data.labels import Clip
from tracknet.data.layouts.cvat import CvatConfig, read_cvat
from tracknet.data.layouts.reading import make_clip, open_clip_frames, visible_files

EXPECTED = "annos/<camera>.xml with frames/<camera>/00000.png or videos/<camera>.avi: annos/ID-1.xml, …"
PREFIX = "ID-"
OPTIONS = ("cvat",)  # sections of the data section that read_game takes as arguments


def list_games(root: Path) -> list[str]:
    """Return the names of the cameras that have an annotation."""
    return [p.stem for p in visible_files(root / "annos", "*.xml")]


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return WASB's split: cameras 1 to 4 for training, of which the last is used for validation here."""
    return {"wasb": {"train": ["ID-1", "ID-2", "ID-3"], "val": ["ID-4"], "test": ["ID-5", "ID-6"]}}


def read_game(root: Path, game: str, config: CvatConfig) -> list[Clip]:
    """Read the single clip of a camera.

    Raises:
        UserError: if the annotation or the frames are missing or malformed.
    """
    path = root / "annos" / f"{game}.xml"
    frames = open_clip_frames(root / "frames" / game, root / "videos", game, path)
    return [make_clip(game, game, frames, read_cvat(path, frames.num_frames, config), path)]

"""Rendered tennis rallies with exact labels, deterministic by seed.

A pinhole camera behind the baseline looks at a court; the ball flies under gravity, bounces and is hit back by two
players, streaks during the exposure, is hidden by players and leaves the picture; then come sensor noise and H.264.
Written in TrackNet's layout, and like TrackNet's annotators the label marks the leading end of the streak.
"""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from tracknet.data.physics import FPS, simulate
from tracknet.data.rendering import draw_scene, render_frame
from tracknet.data.video import VideoWriter
from tracknet.errors import UserError
from tracknet.files import new_folder, read_json
from tracknet.progress import track

MARKER = "synthetic.json"
MAX_BYTES = 100_000  # of that


@dataclass
class SyntheticConfig:
    """What to render; another setting needs another ``data.root``."""

    games: int = 21
    """Number of games, each with its own court, camera, light and players."""
    clips_per_game: int = 1
    """Rallies per game."""
    frames_per_clip: int = 60
    """Length of a rally at 30 frames per second."""
    size: tuple[int, int] = (512, 288)
    """Width and height of the video in pixels."""
    seed: int = 0
    """Everything follows from it."""

    def __post_init__(self) -> None:
        if min(self.games, self.clips_per_game) < 1 or self.frames_per_clip < 4 or min(self.size) < 64:
            raise UserError(
                "data.synthetic: games and clips_per_game are at least 1, frames_per_clip at least 4, "
                "size at least [64, 64]."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"data.synthetic.seed={self.seed}: must be from 0 to 2^63 - 1.")
        if max(self.games, self.clips_per_game, self.frames_per_clip) > 1_000_000 or max(self.size) > 8192:
            raise UserError(
                "data.synthetic: a million games, clips or frames, and a size of [8192, 8192], are the most that is"
                " rendered."
            )


def describe_settings(config: SyntheticConfig) -> str:
    """Return the arguments of ``synthesize`` that render these rallies."""
    texts = {name: f"[{value[0]},{value[1]}]" if name == "size" else str(value) for name, value in vars(config).items()}
    return " ".join(shlex.quote(f"data.synthetic.{name}={text}") for name, text in texts.items())


def ensure_rallies(root: Path, config: SyntheticConfig) -> None:
    """Render the rallies unless the folder holds just these already.

    Raises:
        UserError: the folder exists and holds something else.
    """
    # Through JSON, so that tuples compare equal to what a file gives back.
    wanted = json.loads(json.dumps(asdict(config)))
    if root.exists():
        marker = root / MARKER
        try:
            found = read_json(marker, MAX_BYTES) if marker.is_file() else None
        except UserError as error:
            raise UserError(
                f"{error} Delete the folder '{root}', which is rendered anew, or choose another data.root."
            ) from error
        if found != wanted:
            held = "other data" if found is None else f"rallies of other settings ({found})"
            raise UserError(
                f"data.root: '{root}' holds {held}, and the settings ask for {wanted}. "
                "Delete the folder or choose another data.root."
            )
        return
    try:
        with new_folder(root) as work:
            for game in track(range(config.games), f"Rendering {config.games} synthetic games"):
                for clip in range(config.clips_per_game):
                    write_clip(work / f"game{game + 1}" / f"Clip{clip + 1}", config, game, clip)
            (work / MARKER).write_text(json.dumps(wanted, indent=2))
    except OSError:
        if not root.exists():
            raise
        ensure_rallies(root, config)  # another process was faster: what it made is either the same or an error


def write_clip(folder: Path, config: SyntheticConfig, game: int, clip: int) -> None:
    """Render one rally into ``folder/clip.mp4`` and ``folder/Label.csv``."""
    scene_rng = np.random.default_rng([config.seed, game])
    rng = np.random.default_rng([config.seed, game, clip + 1])
    scene = draw_scene(config.size, scene_rng)
    rally = simulate(config.frames_per_clip, rng)
    folder.mkdir(parents=True)
    rows = []
    crf = int(scene_rng.integers(20, 28))
    with VideoWriter(folder / "clip.mp4", config.size, Fraction(FPS), crf) as video:
        for i in range(config.frames_per_clip):
            image, label = render_frame(scene, rally, i, rng)
            video.write(image)
            rows.append((f"{i:04d}.jpg", *label, rally.status[i]))
    with (folder / "Label.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file name", "visibility", "x-coordinate", "y-coordinate", "status"])
        writer.writerows(rows)

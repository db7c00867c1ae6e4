"""Synthetic tennis rallies with exact labels, determined by a seed.

A pinhole camera behind the baseline shows a court. The ball flies under gravity, bounces and is hit back by two
players; it leaves a streak during the exposure, is occluded by players and leaves the frame. Sensor noise and H.264
compression are added. Rallies are written in TrackNet's layout, and as in TrackNet's annotation, the label marks the
leading end of the streak.
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

MARKER = "synthetic.json"  # file in the dataset's folder that stores its settings
MAX_BYTES = 100_000  # largest size of that file


@dataclass
class SyntheticConfig:
    """Settings of the rendered rallies. Different settings require a different ``data.root``."""

    games: int = 21
    """Number of games, each with its own court, camera, light and players."""
    clips_per_game: int = 1
    """Rallies per game."""
    frames_per_clip: int = 60
    """Length of a rally at 30 frames per second."""
    size: tuple[int, int] = (512, 288)
    """Width and height of the video in pixels."""
    seed: int = 0
    """Seed of all random values."""

    def __post_init__(self) -> None:
        if min(self.games, self.clips_per_game) < 1 or self.frames_per_clip < 4 or min(self.size) < 64:
            raise UserError(
                "data.synthetic: games and clips_per_game must be at least 1, frames_per_clip at least 4, and size at "
                "least [64, 64]."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"data.synthetic.seed={self.seed}: must be from 0 to 2^63 - 1.")
        if max(self.games, self.clips_per_game, self.frames_per_clip) > 1_000_000 or max(self.size) > 8192:
            raise UserError(
                "data.synthetic: games, clips_per_game and frames_per_clip must be at most a million, and size at most"
                " [8192, 8192]."
            )


def describe_settings(config: SyntheticConfig) -> str:
    """Return the command line arguments of ``tracknet synthesize`` that render the same rallies."""
    texts = {name: f"[{value[0]},{value[1]}]" if name == "size" else str(value) for name, value in vars(config).items()}
    return " ".join(shlex.quote(f"data.synthetic.{name}={text}") for name, text in texts.items())


def ensure_rallies(root: Path, config: SyntheticConfig) -> None:
    """Render rallies into a folder unless it already contains them.

    Args:
        root: folder of the dataset.
        config: settings of the rallies.

    Raises:
        UserError: if the folder exists and contains anything else.
    """
    # Convert tuples to lists through JSON, so that the settings compare equal to those read from the file.
    wanted = json.loads(json.dumps(asdict(config)))
    if root.exists():
        marker = root / MARKER
        try:
            found = read_json(marker, MAX_BYTES) if marker.is_file() else None
        except UserError as error:
            raise UserError(
                f"{error} Delete the folder '{root}', so that it is rendered again, or choose another data.root."
            ) from error
        if found != wanted:
            content = "other data" if found is None else f"rallies of other settings ({found})"
            raise UserError(
                f"data.root: '{root}' contains {content}, but the configuration requires {wanted}. "
                "Delete the folder or choose another data.root."
            )
        return
    # Write to a temporary folder that is renamed at the end, so that the dataset is never incomplete.
    try:
        with new_folder(root) as work:
            for game in track(range(config.games), f"Rendering {config.games} synthetic games"):
                for clip in range(config.clips_per_game):
                    write_clip(work / f"game{game + 1}" / f"Clip{clip + 1}", config, game, clip)
            (work / MARKER).write_text(json.dumps(wanted, indent=2))
    except OSError:
        if not root.exists():
            raise
        # Another process has created the folder in the meantime: its content is either the same or an error.
        ensure_rallies(root, config)


def write_clip(folder: Path, config: SyntheticConfig, game: int, clip: int) -> None:
    """Render one rally into ``folder/clip.mp4`` and ``folder/Label.csv``.

    Args:
        folder: folder of the clip, created here.
        config: settings of the rallies.
        game: number of the game, from 0, which determines the scene.
        clip: number of the clip within the game, from 0, which determines the rally together with the game.
    """
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

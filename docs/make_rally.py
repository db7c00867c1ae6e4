"""Generator of the moving picture in README.md: the embedded model on a rendered rally.

python docs/make_rally.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

import tracknet
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import read_video

TARGET = Path(__file__).parent / "images/rally.webp"
SEED = 28  # the embedded model was trained on rallies of seed 2
CROP = (slice(40, 720), slice(150, 1118))  # rows and columns of the court in the rendered 1280x720
SIZE_WH = (900, 632)


def main() -> None:
    """Render a rally, track the ball, and write every second frame of the overlay."""
    with tempfile.TemporaryDirectory() as folder:
        rally, overlay = Path(folder) / "rally", Path(folder) / "overlay.mp4"
        write_clip(rally, SyntheticConfig(frames_per_clip=120, size=(1280, 720), seed=SEED), 1, 1)
        tracknet.load("embedded/vit_tiny_heatmap").track(rally / "clip.mp4").save_overlay(overlay)
        images = [
            Image.fromarray(frame[CROP].copy()).resize(SIZE_WH, Image.Resampling.LANCZOS)
            for _, frame in read_video(overlay)
        ]
    first, *rest = images[::2]
    first.save(TARGET, save_all=True, append_images=rest, duration=67, loop=0, quality=70, method=6)


if __name__ == "__main__":
    main()

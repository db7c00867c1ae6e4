"""Speed of tracking with overlapping windows (evaluation.stride=1), with and without shared backbone features.

    python benchmarks/overlap.py --rounds 4
    python benchmarks/overlap.py --backbone facebook/dinov2-small --rounds 2

Both are timed in alternating runs on a rendered 1280x720 video of 120 frames. Without --backbone, the embedded model;
with it, a model of random weights at 512x288.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import tracknet
from tracknet.api.run import Run
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.tracking import stream
from tracknet.tracking.frame_features import reuse_features

STRIDE = "evaluation.stride=1"


def build(backbone: str | None) -> Run:
    """Return the run to track with."""
    if backbone is None:
        return tracknet.load("embedded/vit_tiny_heatmap", device="cpu", overrides=[STRIDE])
    overrides = [STRIDE, f"model.backbone.name={backbone}", "model.backbone.weights=random"]
    config = tracknet.compose("synthetic", "vit_heatmap", "frozen", overrides)
    model, device = build_model(config.model, config.data.sequence.length), torch.device("cpu")
    apply_mode(model, config.training.mode, device)
    return Run(Path(), config, model.eval(), device)


def measure(run: Run, video: Path, share: bool) -> float:
    """Return the frames per second of tracking a video."""
    stream.reuse_features = reuse_features if share else lambda *_: None
    start = time.perf_counter()
    return sum(1 for _ in run.track(video)) / (time.perf_counter() - start)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", metavar="NAME", help="backbone of random weights (default: the embedded model)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="alternating runs (default: 3)")
    args = parser.parse_args()
    run = build(args.backbone)
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "rally", SyntheticConfig(frames_per_clip=120, size=(1280, 720)), 1, 1)
        video = Path(folder) / "rally/clip.mp4"
        measure(run, video, True)  # warm up
        rounds = [(measure(run, video, False), measure(run, video, True)) for _ in range(args.rounds)]
    apart, shared = (statistics.median(column) for column in zip(*rounds))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{apart:.1f} frames/s apart, {shared:.1f} shared: {ratio:.2f}x (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()

"""How fast a video is followed, from file to ball."""

from __future__ import annotations

import statistics
import time
from fractions import Fraction
from pathlib import Path

from tracknet.benchmark.speed import Runner
from tracknet.data.clips import WindowDataset
from tracknet.data.video import VideoWriter
from tracknet.progress import track
from tracknet.tracking.predictor import Predictor
from tracknet.tracking.stream import follow, open_source


def measure_inference(runners: list[Runner], video: Path, rounds: int) -> list[dict]:
    """Follow the ball through a video with each runner's model, decoding included; frames a second, median of
    rounds."""
    seconds: dict[str, list[float]] = {runner.variant.name: [] for runner in runners}
    frames = 0
    turns = [runner for _ in range(rounds) for runner in runners]
    for runner in track(turns, "following a video"):
        config = runner.variant.config
        size = config.evaluation.batch_size
        predictor = Predictor(runner.model, runner.device, config.training.micro_batching(size))
        begin = time.perf_counter()
        frames = sum(
            1
            for _ in follow(
                open_source(video, 30),
                predictor,
                config.data.sequence.length,
                config.data.preprocess.resize,
                config.evaluation,
            )
        )
        seconds[runner.variant.name].append(time.perf_counter() - begin)
    reference = statistics.median(seconds[runners[0].variant.name])
    return [
        {
            "name": name,
            "frames_per_s": frames / statistics.median(own),
            "relative": reference / statistics.median(own),
            "spread": [frames / max(own), frames / min(own)],
        }
        for name, own in seconds.items()
    ]


def video_of(test_set: WindowDataset, folder: Path, most: int) -> Path:
    """Return a video of the first test clip: its own, or its frames (at the model's size) written as one."""
    clip = test_set.clips[0]
    if clip.video is not None:
        return clip.video
    path = folder / "clip.mp4"
    width, height = test_set.config.preprocess.resize
    with VideoWriter(path, (width, height), Fraction(30)) as writer:
        for i in range(min(most, clip.num_frames)):
            writer.write(test_set.frames[0][i].transpose(1, 2, 0).copy())
    return path

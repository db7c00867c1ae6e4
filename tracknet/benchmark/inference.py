"""Speed of ball tracking in a video, from the file to the positions."""

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
    """Time ball tracking in a video with the model of each runner, decoding included.

    Args:
        runners: runners of the models; the first one is the reference.
        video: path of the video.
        rounds: number of passes over the video per model; the models alternate.

    Returns:
        One row per runner: ``name``, ``frames_per_s`` (median of the rounds), ``relative`` (speed relative to the first
        runner) and ``spread`` (slowest and fastest round, in frames per second).
    """
    seconds: dict[str, list[float]] = {runner.variant.name: [] for runner in runners}
    frames = 0
    turns = [runner for _ in range(rounds) for runner in runners]
    for runner in track(turns, "tracking in a video"):
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
            "frames_per_s": frames / statistics.median(times),
            "relative": reference / statistics.median(times),
            "spread": [frames / max(times), frames / min(times)],
        }
        for name, times in seconds.items()
    ]


def video_of(test_set: WindowDataset, folder: Path, max_frames: int) -> Path:
    """Return the path of a video of the first test clip, written from its frames if the clip is not a video.

    Args:
        test_set: windows of the test split.
        folder: folder for a written video.
        max_frames: maximum number of frames of a written video.
    """
    clip = test_set.clips[0]
    if clip.video is not None:
        return clip.video
    path = folder / "clip.mp4"
    width, height = test_set.config.preprocess.resize
    with VideoWriter(path, (width, height), Fraction(30)) as writer:
        for i in range(min(max_frames, clip.num_frames)):
            # Cached frames are planar RGB [3, h, w]; the writer expects [h, w, 3].
            writer.write(test_set.frames[0][i].transpose(1, 2, 0).copy())
    return path

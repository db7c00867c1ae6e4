"""Follow the ball through a video and write ``ball.csv`` and ``overlay.mp4``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tracknet.api.track import Track
from tracknet.runs.load import load_onnx, load_run
from tracknet.tracking.predictor import Predictor
from tracknet.tracking.stream import open_source

logger = logging.getLogger(__name__)


def predict(
    run: Path,
    video: Path,
    out: Path,
    checkpoint: str = "best",
    fps: float = 30.0,
    overlay: bool = True,
    overrides: Sequence[str] = (),
    engine: str = "torch",
    strict: bool = False,
) -> dict:
    """Follow the ball and write ``ball.csv`` and ``overlay.mp4``, each whole or not at all.

    Args:
        run: folder of the run.
        video: video file or folder of images.
        out: folder to write to.
        checkpoint: ``best`` or ``last``.
        fps: frame rate of a folder of images.
        overlay: whether to write ``overlay.mp4``.
        overrides: ``section.key=value`` on top of the run's configuration.
        engine: ``torch`` or ``onnx``.
        strict: refuse a damaged video, of which otherwise every frame that can be decoded is kept.

    Returns:
        ``num_frames``, ``num_detected``, ``csv``, ``overlay``, and ``damage``: what is wrong with the video, or
        ``None``.
    """
    damage: list[str] = []
    source = open_source(video, fps, None if strict else damage.append)
    load = load_onnx if engine == "onnx" else load_run
    config, model, device = load(run, checkpoint, overrides)
    settings = config.evaluation
    predictor = Predictor(model, device, config.training.micro_batching(settings.batch_size))
    track = Track(source, predictor, config.data.sequence.length, config.data.preprocess.resize, settings)
    table, video_out = out / "ball.csv", out / "overlay.mp4"
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        track.save(csv=table, overlay=video_out if overlay else None)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    num_frames, num_detected = len(track), sum(map(track.is_seen, track))
    for problem in damage:
        logger.warning(
            f"{problem} The {num_frames} frames that can be decoded were kept; --strict refuses such a video."
        )
    written = f"wrote {table}" + (f", {video_out}" if overlay else "")
    logger.info(f"{num_detected} of {num_frames} frames show a ball. {written}")
    return {
        "num_frames": num_frames,
        "num_detected": num_detected,
        "csv": str(table),
        "overlay": str(video_out) if overlay else None,
        "damage": damage[0] if damage else None,
    }

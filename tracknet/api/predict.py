"""Ball tracking in a video, written as ``ball.csv`` and ``overlay.mp4``."""

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
    """Track the ball and write ``ball.csv`` and ``overlay.mp4``; an error leaves no partial file.

    Args:
        run: folder of the run.
        video: video file or folder of images.
        out: folder for the output, created if it does not exist.
        checkpoint: ``best`` or ``last``.
        fps: frame rate of a folder of images, in frames per second.
        overlay: whether to write ``overlay.mp4``.
        overrides: ``section.key=value`` overrides of the run's configuration.
        engine: ``torch``, or ``onnx`` for a run exported by ``tracknet export --format onnx``.
        strict: whether to refuse a damaged video; otherwise every decodable frame is kept.

    Returns:
        ``num_frames``, ``num_detected`` (frames with a ball), ``csv`` and ``overlay`` (paths of the files, the latter
        ``None`` without overlay), and ``damage`` (a description of the video's damage, or ``None``).

    Raises:
        UserError: if the video or the run cannot be read.
    """
    # The video is opened before the model is loaded, so that a wrong path is reported at once.
    damage: list[str] = []
    source = open_source(video, fps, None if strict else damage.append)
    load = load_onnx if engine == "onnx" else load_run
    config, model, device = load(run, checkpoint, overrides)
    settings = config.evaluation
    predictor = Predictor(model, device, config.training.micro_batching(settings.batch_size))
    track = Track(source, predictor, config.data.sequence.length, config.data.preprocess.resize, settings)
    table, video_out = out / "ball.csv", out / "overlay.mp4"
    # A folder that was created here is removed again if an error leaves it empty.
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        track.save(csv=table, overlay=video_out if overlay else None)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    # The track keeps its detections, so counting them does not read the video again.
    num_frames, num_detected = len(track), sum(map(track.is_seen, track))
    for problem in damage:
        logger.warning(f"{problem} The {num_frames} decodable frames were kept; use --strict to refuse such a video.")
    written = f"wrote {table}" + (f", {video_out}" if overlay else "")
    logger.info(f"{num_detected} of {num_frames} frames show a ball. {written}")
    return {
        "num_frames": num_frames,
        "num_detected": num_detected,
        "csv": str(table),
        "overlay": str(video_out) if overlay else None,
        "damage": damage[0] if damage else None,
    }

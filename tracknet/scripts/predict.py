"""Follow the ball through a video.

    tracknet predict --run outputs/runs/<id> rally.mp4 --out out/
    tracknet predict --run embedded/vit_tiny_heatmap rally.mp4 --out out/
    tracknet predict --run outputs/runs/<id> rally.mp4 --out out/ --engine onnx
    tracknet predict --run outputs/runs/<id> frames/ --fps 30 --out out/ evaluation.threshold=0.3

Writes ball.csv, one row for every frame in order (frame,time_s,visibility,x,y,confidence; pixels of the video as a
player shows it, x and y blank where no ball was seen; hit and bounce, where the model finds events; file, of a folder
of images), and overlay.mp4 with the ball and its trail. Of a damaged video every frame that can be decoded is kept.
"""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

from tracknet.data.video import VideoWriter
from tracknet.errors import UserError, printable
from tracknet.files import new_file, write_json
from tracknet.inference.load import LOADABLE, load_onnx, load_run, locate_run
from tracknet.inference.overlay import Trail
from tracknet.inference.video import follow, open_source
from tracknet.predictor import Predictor
from tracknet.progress import track
from tracknet.reporting.console import echo
from tracknet.scripts.command_line import Parser, check_writable, existing_or_new_json, run_command

COLUMNS = ("frame", "time_s", "visibility", "x", "y", "confidence")
EVENT_COLUMNS = ("hit", "bounce")  # of a model with model.events


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _predict(argv))


def _predict(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "predict", LOADABLE)
    parser.add_argument("source", type=Path, metavar="VIDEO", help="video file or folder of images")
    parser.add_argument(
        "--run",
        metavar="RUN",
        required=True,
        help="folder of the run, its hub id (owner/name), or embedded/vit_tiny_heatmap, which ships with this package",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which state of it (default: best)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for ball.csv and overlay.mp4")
    parser.add_argument(
        "--engine",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx runs what tracknet export --format onnx made of the run",
    )
    parser.add_argument("--fps", type=float, default=30.0, help="frame rate of a folder of images (default: 30)")
    parser.add_argument("--strict", action="store_true", help="refuse a damaged or truncated video (exit code 2)")
    parser.add_argument("--no-overlay", action="store_true", help="write ball.csv only")
    parser.add_argument("--json", metavar="FILE", help="write counts and paths as one JSON object")
    args, overrides = parser.parse(argv)
    json_file = existing_or_new_json(args.json)
    if not 1e-3 <= args.fps < 1e6:
        raise UserError(f"--fps {args.fps}: must be at least 0.001.")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, expected a folder.")
    check_writable(args.out, "--out")
    if args.source.resolve() == (args.out / "overlay.mp4").resolve():
        raise UserError(f"--out {args.out}: the overlay would replace the video itself; choose another folder.")
    result = predict(
        locate_run(args.run),
        args.source,
        args.out,
        args.checkpoint,
        args.fps,
        not args.no_overlay,
        overrides,
        args.engine,
        args.strict,
    )
    if json_file:
        write_json(json_file, result)
    return 0


def predict(
    run: Path,
    video: Path,
    out: Path,
    checkpoint: str = "best",
    fps: float = 30.0,
    overlay: bool = True,
    overrides: list[str] | None = None,
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
    if engine == "onnx":
        config, model, device = load_onnx(run, checkpoint, overrides or ())
    else:
        config, model, device = load_run(run, checkpoint, overrides or ())
    settings = config.evaluation
    predictor = Predictor(model, device, config.training.micro_batching(settings.batch_size))
    detections = follow(source, predictor, config.data.sequence.length, config.data.preprocess.resize, settings)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    table = out / "ball.csv"
    num_frames = num_detected = 0
    trail = Trail(max(5, round(float(source.fps) / 3)))
    writer = VideoWriter(out / "overlay.mp4", source.size_wh, source.fps) if overlay else None
    try:
        # The table stands once the overlay does: an error in either leaves neither.
        with (
            new_file(table) as work,
            writer or contextlib.nullcontext(),
            work.open("w", newline="", encoding="utf-8") as file,
        ):
            rows = csv.writer(file)
            rows.writerow(
                [*COLUMNS, *(EVENT_COLUMNS if model.has_events else ()), *(["file"] if source.images else [])]
            )
            for d in track(detections, "Following the ball", source.num_frames):
                seen = d.confidence >= settings.threshold
                x, y = d.xy_image
                place = (f"{x:.2f}", f"{y:.2f}") if seen else ("", "")
                events = [f"{p:.4f}" for p in d.events or ()]
                name = [printable(source.images[d.frame].name)] if source.images else []
                rows.writerow([d.frame, f"{d.time_s:.4f}", int(seen), *place, f"{d.confidence:.4f}", *events, *name])
                if writer is not None:
                    writer.write(trail.draw(d.image, d.xy_image if seen else None))
                num_frames += 1
                num_detected += seen
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    for problem in damage:
        echo(f"{problem} The {num_frames} frames that can be decoded were kept; --strict refuses such a video.")
    echo(
        f"{num_detected} of {num_frames} frames show a ball. wrote {table}" + (f", {writer.path}" if writer else ""),
    )
    return {
        "num_frames": num_frames,
        "num_detected": num_detected,
        "csv": str(table),
        "overlay": str(writer.path) if writer else None,
        "damage": damage[0] if damage else None,
    }


if __name__ == "__main__":
    raise SystemExit(main())

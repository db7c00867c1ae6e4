"""Track the ball through a video.

    tracknet predict --run outputs/runs/<id> rally.mp4 --out out/
    tracknet predict --run embedded/vit_tiny_heatmap rally.mp4 --out out/
    tracknet predict --run outputs/runs/<id> rally.mp4 --out out/ --engine onnx
    tracknet predict --run outputs/runs/<id> frames/ --fps 30 --out out/ evaluation.threshold=0.3

Writes overlay.mp4, with the ball and its trail, and ball.csv, with one row per frame in order:

frame,time_s  number of the frame, and its time in seconds
visibility    1 if a ball was detected, 0 otherwise
x,y           position in pixels of the video as a player shows it; empty if no ball was detected
confidence    confidence of the detection, from 0 to 1
hit,bounce    confidences of the events, if the model detects them
file          name of the image, for a folder of images

Every decodable frame of a damaged video is kept, unless --strict is set.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.scripts.command_line import LOADABLE_HELP, Parser, check_writable, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _predict(argv))


def _predict(argv: list[str] | None) -> int:
    """Parse the arguments and track the ball; return the exit code."""
    parser = Parser(__doc__, "predict", LOADABLE_HELP)
    parser.add_argument("source", type=Path, metavar="VIDEO", help="video file or folder of images")
    parser.add_argument(
        "--run",
        metavar="RUN",
        required=True,
        help="folder of the run, its hub id (owner/name), or embedded/vit_tiny_heatmap, which ships with this package",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run (default: best)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for ball.csv and overlay.mp4")
    parser.add_argument(
        "--engine",
        choices=("torch", "onnx"),
        default="torch",
        help="inference engine; onnx requires an earlier tracknet export --format onnx of the run (default: torch)",
    )
    parser.add_argument("--fps", type=float, default=30.0, help="frame rate of a folder of images (default: 30)")
    parser.add_argument("--strict", action="store_true", help="refuse a damaged or truncated video (exit code 2)")
    parser.add_argument("--no-overlay", action="store_true", help="write ball.csv only")
    parser.add_argument("--json", metavar="FILE", help="write counts and paths to this file as a JSON object")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.predict import predict
    from tracknet.runs.load import locate_run

    json_file = existing_or_new_json(args.json)
    if not 1e-3 <= args.fps < 1e6:
        raise UserError(f"--fps {args.fps}: must be at least 0.001 and less than 1000000.")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, but a folder is required.")
    check_writable(args.out, "--out")
    if args.source.resolve() == (args.out / "overlay.mp4").resolve():
        raise UserError(f"--out {args.out}: the overlay would replace the input video; use another folder.")
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


if __name__ == "__main__":
    raise SystemExit(main())

"""Train with QLoRA on rendered rallies, score on unseen ones and track the ball through one.

    tracknet demo
    tracknet demo --output-dir outputs training.max_steps=400

Takes a few minutes without a GPU. Uses the small backbone that ships with the package and requires no network. Prints
the paths of an image of the worst frames, of the score curves and of an overlay video.
"""

from __future__ import annotations

import time
from pathlib import Path

from tracknet.files import write_json
from tracknet.reporting.console import echo
from tracknet.scripts.command_line import Parser, existing_or_new_json, print_config, run_command

CHOICE = ("synthetic", "vit_tiny_heatmap", "demo")  # --data, --model and --training of the demo
OVERRIDES = ("data.augment.crop=[256,144]",)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _demo(argv))


def _demo(argv: list[str] | None) -> int:
    """Parse the arguments, then train, score and predict; return the exit code."""
    parser = Parser(__doc__, "demo")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=Path("outputs"),
        help="folder for runs and logs (default: outputs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--json", metavar="FILE", help="write the scores to this file as a JSON object")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.evaluate import evaluate_split
    from tracknet.api.predict import predict
    from tracknet.api.train import new_run, train_run
    from tracknet.config import compose
    from tracknet.data.splits import read_split
    from tracknet.runs.load import load_run
    from tracknet.tracking.predictor import Predictor

    json_file = existing_or_new_json(args.json)
    config = compose(*CHOICE, [*OVERRIDES, *overrides])
    if args.dry_run:
        print_config(config)
        return 0
    # Train, then load the best checkpoint from the run's folder, as the other commands do.
    started = time.perf_counter()
    run = new_run(args.output_dir, "demo")
    run = Path(train_run(config, run)["run"])
    config, model, device = load_run(run)
    predictor = Predictor(model, device, config.training.micro_batching(config.evaluation.batch_size))
    scores = evaluate_split(config, config.data, "test", predictor, run, "run")
    rally = read_split(config.data, "test")[0]
    assert rally.video is not None, "rendered rallies are videos"
    prediction = predict(run, rally.video, run / "report")
    report, duration_s = run / "report", time.perf_counter() - started
    f1, tolerance_px = scores["f1_strict"], scores["tolerance_px"]
    echo(
        f"""
Done in {duration_s:.0f} s: F1 {f1:.3f} (strict, {tolerance_px:g} px) on rallies of unseen courts.
  worst frames:  {report / "run_test_worst.png"}
  curves:        {report / "run_test_curves.png"}
  overlay video: {prediction["overlay"]}
For your own video, run: tracknet predict --run {run} rally.mp4 --out out/"""
    )
    if json_file:
        write_json(json_file, {**scores, "overlay": prediction["overlay"]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

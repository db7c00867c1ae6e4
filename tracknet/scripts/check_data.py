"""Check a dataset before training.

    tracknet check_data --data tracknet data.root=<folder>
    tracknet check_data --data csv data.root=<folder> \\
        'data.split.train_games=[a]' 'data.split.val_games=[b]' 'data.split.test_games=[c]'

Counts frames and labels by split, game and visibility. Finds labels without frames and frames without labels; positions
outside the image, swapped, of another resolution or one frame off; labels that are on nothing that moves; repeated
frames; jumps that no ball can make; and splits that show the same court. Writes a contact sheet of frames with the
training targets drawn in.

Exit code 0: no errors (there may be findings to review). Exit code 2: at least one error.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.files import write_json
from tracknet.scripts.command_line import Parser, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _check(argv))


def _check(argv: list[str] | None) -> int:
    """Parse the arguments and check the dataset; return 2 if it has errors, otherwise 0."""
    parser = Parser(__doc__, "check_data", ["data."])
    parser.add_choices("data")
    parser.add_argument(
        "--fast", action="store_true", help="check labels and a few frames only, as tracknet train does"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="path of the contact sheet (default: outputs/check/<data>.png)"
    )
    parser.add_argument("--json", metavar="FILE", help="write counts and findings to this file as a JSON object")
    args, overrides = parser.parse(argv)
    json_file = existing_or_new_json(args.json)
    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.check_data import check
    from tracknet.config import compose_data

    # Leaks between splits are findings to report here, so they must not stop the reading of the data.
    config = compose_data(args.data, ["data.allow_leaks=true", *overrides], args.config_dir)
    result = check(config, args.fast, args.out or Path("outputs") / "check" / f"{args.data}.png")
    if json_file:
        write_json(json_file, result)
    return 2 if any(f["is_error"] for f in result["findings"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

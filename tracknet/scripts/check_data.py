"""Look a dataset over before the first epoch.

    tracknet check_data --data tracknet data.root=<folder>
    tracknet check_data --data csv data.root=<folder> \\
        'data.split.train_games=[a]' 'data.split.val_games=[b]' 'data.split.test_games=[c]'

Counts frames and labels by split, game and visibility; finds labels without frames and frames without labels, positions
outside the picture, swapped, of another resolution or one frame off, labels that lie on nothing that moves, repeated
frames, jumps that no ball can make, and splits that show the same court. Writes a contact sheet with the targets drawn
in. Exit code 0: nothing is wrong (or only worth a look); 2: something is.
"""

from __future__ import annotations

from pathlib import Path

from tracknet.files import write_json
from tracknet.scripts.command_line import Parser, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _check(argv))


def _check(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "check_data", ["data."])
    parser.add_choices("data")
    parser.add_argument(
        "--fast", action="store_true", help="labels and a few frames only: what tracknet train looks at"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="the contact sheet (default: outputs/check/<data>.png)")
    parser.add_argument("--json", metavar="FILE", help="write counts and findings as one JSON object")
    args, overrides = parser.parse(argv)
    json_file = existing_or_new_json(args.json)
    # Imported once the arguments are known to be right: torch takes seconds, help does not.
    from tracknet.api.check_data import check
    from tracknet.config import compose_data

    # Sharing games is one of the things to find, not a reason to stop.
    config = compose_data(args.data, ["data.allow_leaks=true", *overrides], args.config_dir)
    result = check(config, args.fast, args.out or Path("outputs") / "check" / f"{args.data}.png")
    if json_file:
        write_json(json_file, result)
    return 2 if any(f["is_error"] for f in result["findings"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

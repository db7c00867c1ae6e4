"""Render synthetic rallies with exact labels into a folder.

    tracknet synthesize --out data/my_rallies data.synthetic.games=50 data.synthetic.seed=7

The folder has the layout of the TrackNet dataset. To train on it, use --data synthetic data.root=<folder> with the same
data.synthetic settings.
"""

from __future__ import annotations

from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.reporting.console import echo
from tracknet.scripts.command_line import Parser, check_new_folder, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _synthesize(argv))


def _synthesize(argv: list[str] | None) -> int:
    """Parse the arguments and render the rallies; return the exit code."""
    parser = Parser(__doc__, "synthesize", ["data."])
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to create; it must not exist yet")
    parser.add_argument("--json", metavar="FILE", help="write the number of games and the folder to this file as JSON")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.config import compose_data
    from tracknet.data.synthetic import ensure_rallies

    json_file, out = existing_or_new_json(args.json), check_new_folder(args.out)
    data = compose_data("synthetic", overrides)
    if data.synthetic is None:
        raise UserError("data.synthetic=null: rendering requires the data.synthetic section; remove this override.")
    ensure_rallies(out, data.synthetic)
    echo(f"wrote {data.synthetic.games} games to {out}")
    if json_file:
        write_json(json_file, {"games": data.synthetic.games, "root": str(out)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

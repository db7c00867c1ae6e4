"""Render synthetic rallies with exact labels into a folder.

    tracknet synthesize --out data/my_rallies data.synthetic.games=50 data.synthetic.seed=7

The folder is in TrackNet's layout; train on it with --data synthetic data.root=<folder> and the same data.synthetic
settings.
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
    parser = Parser(__doc__, "synthesize", ["data."])
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make; it must not exist")
    parser.add_argument("--json", metavar="FILE", help="write what was made as one JSON object")
    args, overrides = parser.parse(argv)

    # Imported once the arguments are known to be right: torch takes seconds, help does not.
    from tracknet.config import compose_data
    from tracknet.data.synthetic import ensure_rallies

    json_file, out = existing_or_new_json(args.json), check_new_folder(args.out)
    data = compose_data("synthetic", overrides)
    if data.synthetic is None:
        raise UserError("data.synthetic=null leaves nothing to render.")
    ensure_rallies(out, data.synthetic)
    echo(f"wrote {data.synthetic.games} games to {out}")
    if json_file:
        write_json(json_file, {"games": data.synthetic.games, "root": str(out)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

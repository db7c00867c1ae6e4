"""Publish a run on the Hugging Face hub, with a model card.

    tracknet push --run outputs/runs/<id> --repo owner/name
    tracknet push --run outputs/runs/<id> --repo owner/name --dry-run published/

Anybody then runs tracknet predict --run owner/name rally.mp4 --out out/. Paths of this machine are taken out of the
configuration. A base that lies on the hub is named, not uploaded again; --self-contained uploads its weights too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tracknet.errors import UserError
from tracknet.files import new_folder, write_json
from tracknet.reporting.console import echo
from tracknet.scripts.command_line import LOADABLE_HELP, Parser, check_new_folder, existing_or_new_json, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _push(argv))


def _push(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "push", LOADABLE_HELP)
    parser.add_argument("--run", metavar="RUN", required=True, help="folder of the run")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="where on the hub; made if it is not there")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which state of it (default: best)"
    )
    parser.add_argument("--self-contained", action="store_true", help="with the base's weights")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write (default: main)")
    parser.add_argument("--license", metavar="ID", help="license for the model card, such as apache-2.0")
    parser.add_argument("--dry-run", metavar="DIR", help="write what would be sent into this new folder, and stop")
    parser.add_argument("--json", metavar="FILE", help="write where it went as one JSON object")
    args, overrides = parser.parse(argv)

    # Imported once the arguments are known to be right: torch takes seconds, help does not.
    from tracknet.runs.hub import upload, write_published
    from tracknet.runs.load import HUB_ID, load_run, locate_run
    from tracknet.training.checkpoint import find_checkpoint
    from tracknet.training.state import load_state

    json_file = existing_or_new_json(args.json)
    if not HUB_ID.fullmatch(args.repo):
        raise UserError(f"--repo {args.repo}: expected owner/name.")
    dry = check_new_folder(args.dry_run, "--dry-run") if args.dry_run else None
    run = locate_run(args.run)
    config, model, _ = load_run(run, args.checkpoint, overrides)
    state = load_state(find_checkpoint(run, args.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        out = dry or Path(folder) / "run"
        with new_folder(out) as work:
            write_published(work, config, model, state, args.repo, args.self_contained, args.license)
        where = str(out) if dry else upload(out, args.repo, args.private, args.revision)
    echo(f"wrote {where}")
    if json_file:
        write_json(json_file, {"repo": args.repo, "where": where})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Publish a run on the Hugging Face hub, with a model card.

    tracknet push --run outputs/runs/<id> --repo owner/name
    tracknet push --run outputs/runs/<id> --repo owner/name --dry-run published/

Anyone can then run: tracknet predict --run owner/name rally.mp4 --out out/

Paths of this machine are removed from the configuration. A backbone from the hub is referenced by its name and not
uploaded again; --self-contained uploads its weights as well.
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
    """Parse the arguments and publish the run; return the exit code."""
    parser = Parser(__doc__, "push", LOADABLE_HELP)
    parser.add_argument("--run", metavar="RUN", required=True, help="folder of the run")
    parser.add_argument(
        "--repo", metavar="OWNER/NAME", required=True, help="repository on the hub; created if it does not exist"
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run (default: best)"
    )
    parser.add_argument("--self-contained", action="store_true", help="include the weights of the frozen base")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to (default: main)")
    parser.add_argument("--license", metavar="ID", help="license for the model card, such as apache-2.0")
    parser.add_argument(
        "--dry-run", metavar="DIR", help="write the files to this new folder instead of uploading them, and exit"
    )
    parser.add_argument("--json", metavar="FILE", help="write the destination to this file as a JSON object")
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.runs.hub import upload, write_published
    from tracknet.runs.load import HUB_ID, load_run, locate_run
    from tracknet.training.checkpoint import find_checkpoint
    from tracknet.training.state import load_state

    json_file = existing_or_new_json(args.json)
    if not HUB_ID.fullmatch(args.repo):
        raise UserError(f"--repo {args.repo}: not a repository id; use owner/name.")
    dry_run_folder = check_new_folder(args.dry_run, "--dry-run") if args.dry_run else None
    # Loading the run checks that its files fit together before anything is published.
    run = locate_run(args.run)
    config, model, _ = load_run(run, args.checkpoint, overrides)
    state = load_state(find_checkpoint(run, args.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        out = dry_run_folder or Path(folder) / "run"
        with new_folder(out) as work:
            write_published(work, config, model, state, args.repo, args.self_contained, args.license)
        destination = str(out) if dry_run_folder else upload(out, args.repo, args.private, args.revision)
    echo(f"wrote {destination}")
    if json_file:
        write_json(json_file, {"repo": args.repo, "where": destination})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

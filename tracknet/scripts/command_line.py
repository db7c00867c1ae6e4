"""What all commands share: parsing, errors with a remedy, exit codes.

Exit codes: 0 done; 2 the input is wrong (the message says what and how to mend it); 130 interrupted; 143 ended by
SIGTERM, with what was trained saved; 1 a bug of ours.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from tracknet.config.names import SECTIONS, config_names, is_override
from tracknet.errors import UserError, nearest, of_dead_worker, printable
from tracknet.files import check_writable, is_unwritable
from tracknet.reporting.console import OPTIONS, configure_logging
from tracknet.training.interruption import EXIT_CODE, Terminated

if TYPE_CHECKING:
    from tracknet.config import Config

# What may be set of a run that is loaded, for help; the settings themselves say it (tracknet/config/changes.py).
LOADABLE_HELP = ("evaluation.", "data.", "training.device=", "training.precision=", "model.backbone.name=", "…")


class Parser(argparse.ArgumentParser):
    """An argument parser that takes ``section.key=value`` anywhere and names the nearest right flag."""

    def __init__(self, doc: str, prog: str, takes: Sequence[str] = ()):
        """Make a parser whose help says that settings may begin with one of ``takes``; with none given, any."""
        super().__init__(
            prog=f"tracknet {prog}",
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        which = f"these settings: {', '.join(takes)}" if takes else f"any setting (sections: {', '.join(SECTIONS)})"
        self.epilog = f"section.key=value overrides {which}; null switches a part off. All keys: docs/configuration.md."

    def add_choices(self, *sections: str, required: bool = True) -> None:
        """Add ``--data`` and its like, each naming what there is, and ``--config-dir``."""
        for section in sections:
            self.add_argument(
                f"--{section}",
                metavar="NAME",
                required=required,
                help=f"one of {', '.join(config_names(section))}, or one of your own",
            )
        self.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="folder with data/, model/, training/ of your own"
        )

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Split the overrides off and parse the rest."""
        argv = list(sys.argv[1:] if argv is None else argv)
        overrides = [a for a in argv if is_override(a)]
        known, unknown = self.parse_known_args([a for a in argv if a not in overrides])
        if unknown:
            from tracknet.config import Config  # here: help is shown without the settings of the model
            from tracknet.config.errors import suggest_for_flag

            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            flag = nearest(unknown[0], flags, 0.8)
            setting = suggest_for_flag(unknown[0], Config) if unknown[0].startswith("-") else ""
            self.error(f"unknown argument '{unknown[0]}'{flag or setting or nearest(unknown[0], flags, 0.7)}")
        return known, overrides

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], int]) -> int:
    """Run a command and turn what a user can mend into a message and exit code 2."""
    configure_logging()
    try:
        return command()
    except UserError as error:
        return _say_what_is_wrong(str(error))
    except OSError as error:
        if not is_unwritable(error):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        return _say_what_is_wrong(f"{place}{error.strerror}; choose another place or free this one.")
    except RuntimeError as error:
        if (refusal := of_dead_worker(error)) is None:
            raise
        return _say_what_is_wrong(str(refusal))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("ended by SIGTERM", file=sys.stderr)
        return EXIT_CODE


def _say_what_is_wrong(message: str) -> int:
    Console(stderr=True, **OPTIONS).print(f"error: {printable(message)}")
    return 2


def existing_or_new_json(path: str | None) -> Path | None:
    """Check early that a ``--json`` file can be written, before hours of work."""
    if path is None:
        return None
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--json {path}: the folder '{target.parent}' does not exist, or the path is a folder.")
    check_writable(target, "--json")
    return target


def check_new_folder(path: str, flag: str = "--out") -> Path:
    """Check that a folder that a command makes is not there yet."""
    if Path(path).exists():
        raise UserError(f"{flag} {path}: exists already.")
    check_writable(Path(path), flag)
    return Path(path)


UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | None) -> int | None:
    """Turn ``8GB`` or ``24GiB`` into bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--gpu-memory {text}: give a size such as 8GB or 24GiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def print_config(config: Config) -> None:
    """Print the resolved configuration as YAML."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")

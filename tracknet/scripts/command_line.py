"""Argument parsing, error reporting and exit codes shared by all commands.

Exit codes:
    0: success.
    1: bug in this package, with a traceback.
    2: wrong input; the message contains the cause and the remedy.
    130: interrupted (Ctrl+C).
    143: ended by SIGTERM, after the training state was saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from tracknet.config.names import SECTIONS, config_names, is_override
from tracknet.errors import UserError, nearest, of_dead_worker, printable
from tracknet.files import check_writable, is_unwritable
from tracknet.memory.budget import parse_bytes
from tracknet.reporting.console import OPTIONS, configure_logging
from tracknet.training.interruption import EXIT_CODE, Terminated

if TYPE_CHECKING:
    from tracknet.config import Config

# Settings that may be overridden when a run is loaded, for the help text only. The authoritative list is the metadata
# of the configuration's fields (tracknet/config/changes.py), which the help does not import.
LOADABLE_HELP = ("evaluation.", "data.", "training.device=", "training.precision=", "model.backbone.name=", "…")


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts ``section.key=value`` anywhere and suggests the nearest flag.

    Args:
        doc: description of the command, printed as it is.
        prog: name of the verb.
        takes: prefixes of the settings that the verb accepts, for its help; empty if it accepts any setting.
    """

    def __init__(self, doc: str, prog: str, takes: Sequence[str] = ()):
        super().__init__(
            prog=f"tracknet {prog}",
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        accepted = f"these settings: {', '.join(takes)}" if takes else f"any setting (sections: {', '.join(SECTIONS)})"
        self.epilog = (
            f"section.key=value overrides {accepted};\n"
            "null switches a part off. See docs/configuration.md for all keys."
        )

    def add_choices(self, *sections: str, required: bool = True) -> None:
        """Add ``--config-dir`` and one option per section, such as ``--data``, with its choices in the help.

        Args:
            sections: names of the configuration's sections: ``data``, ``model``, ``training``.
            required: whether the options are required.
        """
        for section in sections:
            self.add_argument(
                f"--{section}",
                metavar="NAME",
                required=required,
                help=f"one of {', '.join(config_names(section))}, or one of your own",
            )
        self.add_argument(
            "--config-dir",
            type=Path,
            metavar="DIR",
            help="folder with your own configurations, in data/, model/ and training/",
        )

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Separate the overrides from the options and parse the latter.

        Args:
            argv: arguments of the command; ``None`` uses those of the process.

        Returns:
            The parsed options, and the ``section.key=value`` overrides in their order.

        Raises:
            UserError: if an argument is unknown or invalid; suggests the nearest flag or setting.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        overrides = [a for a in argv if is_override(a)]
        args, unknown = self.parse_known_args([a for a in argv if a not in overrides])
        if unknown:
            # Imported on demand: the configuration imports the settings of the model, and the help does not need them.
            from tracknet.config import Config
            from tracknet.config.errors import suggest_for_flag

            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            flag = nearest(unknown[0], flags, 0.8)
            setting = suggest_for_flag(unknown[0], Config) if unknown[0].startswith("-") else ""
            self.error(f"unknown argument '{unknown[0]}'{flag or setting or nearest(unknown[0], flags, 0.7)}")
        return args, overrides

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError`` instead of printing the usage, so that all errors are reported alike."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; errors that the user can fix become a message and exit code 2.

    Any other exception propagates with its traceback.
    """
    configure_logging()
    try:
        return command()
    except UserError as error:
        return _report_error(str(error))
    except OSError as error:
        if not is_unwritable(error):
            raise
        file_name = f"{error.filename}: " if error.filename is not None else ""
        return _report_error(
            f"{file_name}{error.strerror}. Choose another path, or make this one writable (free space, permissions)."
        )
    except RuntimeError as error:
        # torch reports a killed loading process as a RuntimeError.
        if (refusal := of_dead_worker(error)) is None:
            raise
        return _report_error(str(refusal))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("ended by SIGTERM", file=sys.stderr)
        return EXIT_CODE


def _report_error(message: str) -> int:
    """Print an error to standard error and return exit code 2."""
    Console(stderr=True, **OPTIONS).print(f"error: {printable(message)}")
    return 2


def existing_or_new_json(path: str | None) -> Path | None:
    """Return the path of a ``--json`` file after checking that it can be written, before any long work starts.

    Args:
        path: value of the option; ``None`` if it was not given.

    Raises:
        UserError: if the folder does not exist, the path is a folder, or it cannot be written.
    """
    if path is None:
        return None
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--json {path}: the folder '{target.parent}' does not exist, or the path is a folder.")
    check_writable(target, "--json")
    return target


def check_new_folder(path: str, flag: str = "--out") -> Path:
    """Return the path of a folder that a command will create, after checking that it does not exist yet.

    Args:
        path: value of the option.
        flag: name of the option, for messages.

    Raises:
        UserError: if the path exists, or cannot be created.
    """
    if Path(path).exists():
        raise UserError(f"{flag} {path}: exists already; use a new folder.")
    check_writable(Path(path), flag)
    return Path(path)


def parse_size(text: str | None) -> int | None:
    """Parse the value of ``--gpu-memory``, such as ``8GB`` or ``24GiB``, into bytes.

    Raises:
        UserError: if the text is not a positive number followed by MB, GB, MiB or GiB.
    """
    if text is None:
        return None
    size = parse_bytes(text)
    if size is None:
        raise UserError(f"--gpu-memory {text}: not a size; use a number with a unit, such as 8GB or 24GiB.")
    return size


def print_config(config: Config) -> None:
    """Print the resolved configuration as YAML."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")

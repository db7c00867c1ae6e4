"""Where messages appear: one rich console, and the one handler that the command line gives to the package's logger."""

from __future__ import annotations

import logging
import sys
from typing import Any

import rich
from rich.console import Console
from rich.table import Table

from tracknet.errors import printable

# Messages may hold names of files and words from strangers, so no markup is interpreted. Tables that go to a file or a
# pipe have no window to fit into.
OPTIONS: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
LOGGER = logging.getLogger("tracknet")


def get_console() -> Console:
    """Return the console that messages, tables and progress bars share."""
    return rich.get_console()


def echo(line: str) -> None:
    """Print a line as it is."""
    get_console().print(printable(line))


class _ConsoleHandler(logging.Handler):
    """Prints records above the progress bars, warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        get_console().print(printable(self.format(record)), style=style)


def configure_logging() -> None:
    """Send the package's messages to the console, from INFO on. Commands do this; a library user configures logging."""
    rich.reconfigure(**OPTIONS, width=None if sys.stdout.isatty() else 120)
    if not any(isinstance(handler, _ConsoleHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_ConsoleHandler())
    LOGGER.setLevel(logging.INFO)


def render_table(table: Table) -> str:
    """Return a table as text."""
    console = Console(**OPTIONS, width=get_console().width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")

"""Console output: the shared rich console, and the log handler that the command line adds to the package's logger."""

from __future__ import annotations

import logging
import sys
from typing import Any

import rich
from rich.console import Console
from rich.table import Table

from tracknet.errors import printable

# Options of every console. Messages may contain untrusted text such as file names, so no markup is interpreted. Lines
# are not wrapped, because output to a file or a pipe has no window width.
OPTIONS: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
LOGGER = logging.getLogger("tracknet")


def get_console() -> Console:
    """Return the console that messages, tables and progress bars share."""
    return rich.get_console()


def echo(line: str) -> None:
    """Print a line verbatim, with control characters escaped."""
    get_console().print(printable(line))


class _ConsoleHandler(logging.Handler):
    """Log handler that prints records above the progress bars, warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        get_console().print(printable(self.format(record)), style=style)


def configure_logging() -> None:
    """Send the package's log messages of level INFO and above to the console.

    The command line calls this function. A program that uses the package as a library configures logging itself.
    """
    # A file or a pipe has no window width, so output to it is laid out for 120 columns.
    rich.reconfigure(**OPTIONS, width=None if sys.stdout.isatty() else 120)
    # Commands may run several times in one process, so the handler is added once.
    if not any(isinstance(handler, _ConsoleHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_ConsoleHandler())
    LOGGER.setLevel(logging.INFO)


def render_table(table: Table) -> str:
    """Render a table to text of the console's width."""
    console = Console(**OPTIONS, width=get_console().width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")

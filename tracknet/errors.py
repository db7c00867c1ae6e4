"""Exception for errors that the user can fix, and helpers for the text of messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

SCREEN = 4000  # maximum length of a message in characters, about one screen
# Unicode categories of characters that a terminal interprets or cannot display: control and format characters, single
# surrogates, private and unassigned characters, line and paragraph separators.
_UNSHOWN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


class UserError(ValueError):
    """Error in the user's input, with a message that states what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2. Any other exception is a bug in this
    package and keeps its traceback.

    Args:
        message: text of the error; unprintable characters are escaped, and a text longer than ``SCREEN`` is shortened.
    """

    def __init__(self, message: str):
        # DataLoader re-raises the error of a worker with the worker's traceback as its message. Keep only the original
        # message, which is the last part.
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rpartition("tracknet.errors.UserError: ")[2].strip()
        super().__init__(shorten(printable(message), SCREEN))


def printable(text: str) -> str:
    """Escape all characters of a text that a terminal would interpret or cannot display, except line breaks.

    File names and file contents are untrusted and may contain control sequences.
    """
    return "".join(c if c == "\n" or unicodedata.category(c) not in _UNSHOWN else ascii(c)[1:-1] for c in text)


def shorten(text: str, length: int) -> str:
    """Shorten a text to about ``length`` characters by replacing its middle with the number of omitted characters."""
    if len(text) <= length:
        return text
    return f"{text[: length * 3 // 4]} … ({len(text) - length} characters left out) … {text[-length // 4 :]}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the names, or an empty string if none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of about 400 characters at most, or the name of its type if it is empty."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 400)


def of_dead_worker(error: BaseException) -> UserError | None:
    """Convert the error of a killed data loading process to a ``UserError``.

    Args:
        error: any exception; torch reports a killed process as a ``RuntimeError``.

    Returns:
        Error to raise instead, or ``None`` if ``error`` has another cause.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not re.search(
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text
    ):
        return None
    signal = re.search(r"killed by signal: (\w[\w ]*)", text)
    return UserError(
        f"A data loading process ended{f' ({signal[1].strip()})' if signal else ''}: usually it ran out of memory or"
        " was killed. Lower data.num_workers (0 loads data in the training process)."
    )

"""The one exception that a user can cause and mend."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

SCREEN = 4000  # characters of a message, which is a screen of them
# Categories of characters that a terminal obeys instead of showing, or cannot show: controls, formats, halves of pairs,
# line separators.
_UNSHOWN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


class UserError(ValueError):
    """Something in the input is wrong: the message says what, where, and what to do.

    The command line prints it without a traceback and exits with code 2. Anything else is a bug of ours and keeps its
    traceback.
    """

    def __init__(self, message: str):
        # A loading process hands its error over as the text of a traceback; the last part is what was said.
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rpartition("tracknet.errors.UserError: ")[2].strip()
        super().__init__(shorten(printable(message), SCREEN))


def printable(text: str) -> str:
    """Return text with everything that a terminal would obey written out: names and values of files are a
    stranger's."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in _UNSHOWN else ascii(c)[1:-1] for c in text)


def shorten(text: str, length: int) -> str:
    """Return text of at most about this length; what is too long loses its middle."""
    if len(text) <= length:
        return text
    return f"{text[: length * 3 // 4]} … ({len(text) - length} characters left out) … {text[-length // 4 :]}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the names, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return all that an error says, in a line of at most a few hundred characters."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 400)


def of_dead_worker(error: BaseException) -> UserError | None:
    """Return what to say where a loading process was killed, which torch reports as a ``RuntimeError``; ``None`` for
    all else."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not re.search(
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text
    ):
        return None
    signal = re.search(r"killed by signal: (\w[\w ]*)", text)
    return UserError(
        f"A loading process ended{f' ({signal[1].strip()})' if signal else ''}: usually memory ran out, or somebody"
        " ended it. Use fewer with data.num_workers (0 loads in the training process)."
    )

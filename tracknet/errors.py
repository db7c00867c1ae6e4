"""The one exception that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the input is wrong: the message says what, where, and what to do.

    The command line prints it without a traceback and exits with code 2. Anything else is a bug of ours and keeps its
    traceback.
    """

    def __init__(self, message: str):
        # A loading process hands its error over as the text of a traceback; the last part is what was said.
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rpartition("tracknet.errors.UserError: ")[2].strip()
        super().__init__(message)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the names, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""One thing that a look over a dataset finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a short name.
        is_error: whether training on it would be a mistake; else it is worth a look.
        where: clip or file.
        message: what, and what to do.
    """

    kind: str
    is_error: bool
    where: str
    message: str

"""Result type of the dataset checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Problem found in a dataset.

    Attributes:
        kind: short name of the kind of problem, such as ``"leak"``.
        is_error: whether training on the dataset would be a mistake; otherwise the finding is a hint to check.
        where: clip, file, game or split that the finding is about.
        message: description of the problem and its remedy.
    """

    kind: str
    is_error: bool
    where: str
    message: str

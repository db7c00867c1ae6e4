"""Named implementations that a setting chooses among: backbone families, heads, layouts, losses, adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from tracknet.errors import UserError, nearest

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Mapping from the value of a setting to its implementation.

    Args:
        setting: full name of the setting, for messages, such as ``training.loss.name``.
    """

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def register(self, name: str, implementation: T) -> T:
        """Add an implementation and return it.

        Raises:
            ValueError: the name is taken. An extension that replaced a built-in implementation would change the
                meaning of saved runs.
        """
        if name in self:
            raise ValueError(f"{self.setting}={name} is already registered ({self[name]!r}).")
        self[name] = implementation
        return implementation

    def lookup(self, name: str) -> T:
        """Return the implementation of a name.

        Raises:
            UserError: there is none; the message lists the names that exist.
        """
        if name not in self:
            raise UserError(f"{self.setting}={name} is not one of {', '.join(self)}{nearest(name, list(self))}")
        return self[name]


def check_options(key: str, options: Iterable[str], known: Iterable[str], subject: str) -> None:
    """Raise a ``UserError`` for options that a registered implementation does not read.

    Args:
        key: full name of the setting that holds the options.
        options: names that are set.
        known: names that the implementation reads.
        subject: the implementation with its verb, for the message, such as ``the loss 'focal' has``.
    """
    names = list(known)
    for option in options:
        if option not in names:
            listed = f"the options {', '.join(names)}" if names else "no options"
            raise UserError(f"{key}.{option}: {subject} {listed}{nearest(option, names)}")

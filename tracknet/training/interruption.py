"""Ending a run when a scheduler says so: SIGTERM lets the step in progress end, saves, and stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM has come. Like ``KeyboardInterrupt`` no ``Exception``, so that nothing takes it for an error of its
    own."""


class Termination:
    """Turns SIGTERM into ``Terminated``, but not while something must be finished first.

    Attributes:
        requested: whether the signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._holds = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[Termination]:
        """Take the signal over while a run lasts; a run in a thread of somebody else's leaves it alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let what is inside end before the signal counts: a step, or a save."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self.requested and not self._holds:
            raise Terminated

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if not self._holds:
            raise Terminated


def leave_sigterm_to_parent(_worker: int) -> None:
    """Let a loading process outlive a SIGTERM that a scheduler sends to all: the training ends its step, saves, and
    ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

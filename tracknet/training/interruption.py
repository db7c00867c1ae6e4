"""Handling of SIGTERM: the current step is completed, the run is saved, and the process ends.

Job schedulers send SIGTERM before they kill a job.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM  # exit code that shells report for a process that SIGTERM ended (143)


class Terminated(BaseException):
    """Exception that ends a run after SIGTERM was received.

    Like ``KeyboardInterrupt``, it is not an ``Exception``, so that no handler of ordinary errors catches it.
    """


class Termination:
    """Handler that converts SIGTERM to ``Terminated``, delayed while a section must not be interrupted.

    Attributes:
        requested: whether SIGTERM was received.
    """

    def __init__(self) -> None:
        self.requested = False
        self._holds = 0  # nesting depth of `held`

    @contextlib.contextmanager
    def handled(self) -> Iterator[Termination]:
        """Handle SIGTERM in this context, and restore the previous handler afterwards.

        In a thread other than the main thread, the signal is left alone: Python allows only the main thread to set
        handlers.
        """
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
        """Delay ``Terminated`` until the end of this context, such as a step or a save; contexts may be nested."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        # Not reached after an error in the context, which takes precedence.
        if self.requested and not self._holds:
            raise Terminated

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the signal (called by Python in the main thread, between two bytecode instructions)."""
        self.requested = True
        if not self._holds:
            raise Terminated


def leave_sigterm_to_parent(_worker: int) -> None:
    """Ignore SIGTERM in a data loading process.

    Schedulers send SIGTERM to all processes of a job. The loading processes must keep working until the training
    process has completed its step; it ends them after saving.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

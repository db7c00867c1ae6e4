"""Progress bars with an ETA: one look everywhere, a line a minute in logs, nothing where nobody asked for it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOG_EVERY_S = 60.0
REFRESH_EVERY_S = 0.1

# rich draws one live display at a time, so a bar that begins inside another becomes a second line of it.
_display: Progress | None = None


class ProgressBar:
    """Progress bar on a terminal or in a notebook, elsewhere a log line a minute.

    A bar is drawn only when it is advanced, never by a thread of its own, so that it takes no time from what is
    measured. Bars are hidden where the package's logger is set above INFO.

    Args:
        description: what is being done.
        total: number of steps, ``None`` if unknown.
        completed: steps that were done before.
    """

    def __init__(self, description: str, total: int | None, completed: int = 0):
        self._description, self._total, self._completed = description, total, completed
        self._owns_display = False
        self._display: Progress

    def __enter__(self) -> ProgressBar:
        global _display
        if _display is None:
            _display = self._display = _new_display()
            self._owns_display = True
            self._display.start()
        else:
            self._display = _display
        self._task = self._display.add_task(self._description, total=self._total, completed=self._completed, status="")
        self._begin = self._logged = time.monotonic()
        self._drawn = 0.0
        self._first = self._completed
        return self

    def __exit__(self, *_: object) -> None:
        global _display
        self._display.remove_task(self._task)
        if self._owns_display:
            self._display.stop()
            _display = None

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Move the bar.

        Args:
            steps: number of steps that were done since the last call.
            status: shown behind the bar, and in the log line.
        """
        self._completed += steps
        now = time.monotonic()
        is_done = self._completed == self._total
        refresh = is_done or now - self._drawn >= REFRESH_EVERY_S
        self._drawn = now if refresh else self._drawn
        self._display.update(self._task, completed=self._completed, status=status, refresh=refresh)
        if self._display.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info("  ".join(part for part in (self._log_line(now), status) if part))

    def _log_line(self, now: float) -> str:
        if self._total is None:
            return f"{self._description}: {self._completed}"
        line = f"{self._description}: {self._completed} of {self._total}"
        rate = (self._completed - self._first) / (now - self._begin)
        minutes = (self._total - self._completed) / rate / 60 if rate else float("inf")
        return f"{line}, about {minutes:.0f} min left"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield items under a progress bar.

    Args:
        items: what is iterated over.
        description: what is being done.
        total: number of items where they have no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Hide progress bars and messages below a level."""
    package = logging.getLogger("tracknet")
    before = package.level
    package.setLevel(level)
    try:
        yield
    finally:
        package.setLevel(before)


def _new_display() -> Progress:
    console = rich.get_console()
    is_hidden = logging.getLogger("tracknet").level > logging.INFO
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=is_hidden or not (console.is_terminal or console.is_jupyter),
        auto_refresh=False,
        transient=True,
    )

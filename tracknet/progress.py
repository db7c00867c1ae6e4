"""Progress bars with a time estimate.

All commands share one style of bar. Without a terminal or notebook, progress is logged once a minute instead. Nothing
is shown if the level of the package's logger is above INFO.
"""

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
LOG_EVERY_S = 60.0  # seconds between log lines
REFRESH_EVERY_S = 0.1  # minimum seconds between two draws of a bar

# rich supports one live display at a time, so a nested bar becomes another line of the display that is open.
_display: Progress | None = None


class ProgressBar:
    """Progress bar in a terminal or notebook, or one log line per minute elsewhere.

    The bar is drawn only when it is advanced, never by a background thread, so that it does not disturb measurements of
    time. It is hidden if the level of the package's logger is above INFO.

    Args:
        description: title of the bar.
        total: number of steps, ``None`` if unknown.
        completed: number of steps completed before.
    """

    def __init__(self, description: str, total: int | None, completed: int = 0):
        self._description, self._total, self._completed = description, total, completed
        self._owns_display = False
        self._display: Progress

    def __enter__(self) -> ProgressBar:
        global _display
        # The outermost bar opens the display and closes it; nested bars add a line to it.
        if _display is None:
            _display = self._display = _new_display()
            self._owns_display = True
            self._display.start()
        else:
            self._display = _display
        self._task = self._display.add_task(self._description, total=self._total, completed=self._completed, status="")
        self._start_time = self._last_logged = time.monotonic()
        self._last_drawn = 0.0
        self._num_before = self._completed
        return self

    def __exit__(self, *_: object) -> None:
        global _display
        self._display.remove_task(self._task)
        if self._owns_display:
            self._display.stop()
            _display = None

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Advance the bar.

        Args:
            steps: number of steps completed since the last call.
            status: text shown after the bar and at the end of the log line.
        """
        self._completed += steps
        now = time.monotonic()
        is_done = self._completed == self._total
        refresh = is_done or now - self._last_drawn >= REFRESH_EVERY_S
        self._last_drawn = now if refresh else self._last_drawn
        self._display.update(self._task, completed=self._completed, status=status, refresh=refresh)
        # Without a terminal the display is disabled. A log line takes its place.
        if self._display.disable and now - self._last_logged >= LOG_EVERY_S:
            self._last_logged = now
            logger.info("  ".join(part for part in (self._log_line(now), status) if part))

    def _log_line(self, now: float) -> str:
        """Return the log line: steps completed and, if the total is known, an estimate of the remaining time."""
        if self._total is None:
            return f"{self._description}: {self._completed}"
        line = f"{self._description}: {self._completed} of {self._total}"
        # Steps completed before this bar started, as in a resumed run, do not count toward the rate.
        rate = (self._completed - self._num_before) / (now - self._start_time)
        minutes = (self._total - self._completed) / rate / 60 if rate else float("inf")
        return f"{line}, about {minutes:.0f} min left"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items with a progress bar.

    Args:
        items: items to iterate over.
        description: title of the bar.
        total: number of items, by default their length if they have one.

    Yields:
        The items.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Hide progress bars, and the package's log messages below a level, within the context."""
    package = logging.getLogger("tracknet")
    previous_level = package.level
    package.setLevel(level)
    try:
        yield
    finally:
        package.setLevel(previous_level)


def _new_display() -> Progress:
    """Create the display of all open bars. It is disabled without a terminal or notebook, and if bars are hidden."""
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
        auto_refresh=False,  # no background thread
        transient=True,  # erase bars when they end
    )

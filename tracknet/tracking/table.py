"""Table of detections, written to ``ball.csv`` and returned as data frames. All columns are defined in this module."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO

from tracknet.errors import printable
from tracknet.tracking.records import Detection


@dataclass(frozen=True)
class Column:
    """Column of the table.

    Attributes:
        name: heading of the column.
        value: function of a detection, and of whether its confidence reaches the threshold, that returns the cell: a
            number, text, or ``None`` for an empty cell.
        digits: number of decimals in the written text, ``None`` for integers and text.
    """

    name: str
    value: Callable[[Detection, bool], float | int | str | None]
    digits: int | None = None

    def text(self, detection: Detection, is_seen: bool) -> str:
        """Format the cell of a detection as text."""
        value = self.value(detection, is_seen)
        if value is None:
            return ""
        return str(value) if self.digits is None else f"{value:.{self.digits}f}"


COLUMNS = (
    Column("frame", lambda d, seen: d.frame),
    Column("time_s", lambda d, seen: d.time_s, digits=4),
    Column("visibility", lambda d, seen: int(seen)),
    Column("x", lambda d, seen: d.xy_image[0] if seen else None, digits=2),
    Column("y", lambda d, seen: d.xy_image[1] if seen else None, digits=2),
    Column("confidence", lambda d, seen: d.confidence, digits=4),
)
EVENT_COLUMNS = (
    Column("hit", lambda d, seen: d.events[0] if d.events else None, digits=4),
    Column("bounce", lambda d, seen: d.events[1] if d.events else None, digits=4),
)


def columns_of(has_events: bool, image_names: list[str]) -> tuple[Column, ...]:
    """Return the columns of a table.

    Args:
        has_events: whether the model detects hits and bounces.
        image_names: file names of a folder of images, in order; empty for a video.
    """
    columns = COLUMNS + (EVENT_COLUMNS if has_events else ())
    if image_names:
        columns += (Column("file", lambda d, seen: printable(image_names[d.frame])),)
    return columns


class TableWriter:
    """CSV writer for detections, one row at a time.

    The constructor writes the header.

    Args:
        file: text file that is open for writing.
        columns: columns of the table.
        threshold: minimum confidence of a visible ball.
    """

    def __init__(self, file: IO[str], columns: tuple[Column, ...], threshold: float):
        self._rows, self._columns, self._threshold = csv.writer(file), columns, threshold
        self._rows.writerow([column.name for column in columns])

    def write(self, detection: Detection) -> None:
        """Write the row of a detection."""
        is_seen = detection.confidence >= self._threshold
        self._rows.writerow([column.text(detection, is_seen) for column in self._columns])


def to_dicts(detections: Iterable[Detection], columns: tuple[Column, ...], threshold: float) -> list[dict]:
    """Convert detections to rows, as dicts of unrounded values by column name."""
    return [{column.name: column.value(d, d.confidence >= threshold) for column in columns} for d in detections]

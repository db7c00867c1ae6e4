"""Layouts of datasets on disk, one module each. A new layout is one module and one line below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tracknet.data.labels import Clip
from tracknet.data.layouts import (
    blurball,
    coco,
    csv,
    racketvision,
    tracknet,
    tracknetv2,
    wasb_basketball,
    wasb_soccer,
    wasb_volleyball,
)
from tracknet.registry import Registry


class Layout(Protocol):
    """Reader of a layout: a module, or any object with these members. Files are read in place and never changed.

    A *game* is the unit of splits: clips that share a court, a camera or players, so that none of it is both trained on
    and scored.

    Attributes:
        EXPECTED: description of the files that a dataset of this layout consists of, for messages.
        PREFIX: text before a bare number in a split: with ``"game"``, ``1`` means ``game1``.
        OPTIONS: names of the sections of ``data`` that ``read_game`` takes as further arguments.
    """

    EXPECTED: str
    PREFIX: str

    @property
    def OPTIONS(self) -> Sequence[str]: ...

    def list_games(self, root: Path) -> list[str]:
        """Return the names of the games in a folder; none if it holds nothing of the layout."""

    def published_splits(self, root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
        """Return the published splits by name, each as the games of ``train``, ``val`` and ``test``."""

    @property
    def read_game(self) -> Callable[..., list[Clip]]:
        """Reader of a game's clips with their labels: ``(root, game, *options)``.

        It raises a ``UserError`` that names file and row where a file is damaged or contradicts itself.
        """


LAYOUTS: Registry[Layout] = Registry("data.layout")
LAYOUTS.register("tracknet", tracknet)
LAYOUTS.register("tracknetv2", tracknetv2)
LAYOUTS.register("wasb_soccer", wasb_soccer)
LAYOUTS.register("wasb_volleyball", wasb_volleyball)
LAYOUTS.register("wasb_basketball", wasb_basketball)
LAYOUTS.register("blurball", blurball)
LAYOUTS.register("racketvision", racketvision)
LAYOUTS.register("coco", coco)
LAYOUTS.register("csv", csv)

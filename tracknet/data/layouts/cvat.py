"""CVAT's XML for video, tracks of points or boxes, as WASB's soccer and basketball labels use it: no layout by
itself."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tracknet.data.layouts.reading import add_label, read_point, read_text
from tracknet.errors import UserError, nearest
from tracknet.labels import BallLabel, Visibility


@dataclass
class CvatConfig:
    """What of CVAT's tracks is the ball, and what a frame without one means."""

    label: str | None = None
    """Name of the ball's label; ``null`` = the only one that has tracks."""
    keyframes_only: bool = True
    """Take what a person drew, and not what CVAT put between (``keyframe="0"``)."""
    unmarked: Literal["unlabeled", "absent"] = "unlabeled"
    """What a frame counts as in which no track has a ball: nothing is known, or there is none. Where a track says
    ``outside``, there is none either way."""


def read_cvat(path: Path, num_frames: int, config: CvatConfig) -> dict[int, BallLabel]:
    """Read ``<track label>`` with ``<points frame outside occluded keyframe points="x,y">`` or ``<box … xtl ytl xbr
    ybr>``.

    The middle of a box is the ball. What is ``occluded`` has an inferred position (class 3). What has an attribute
    ``used_in_game`` of 0 is a spare ball and left out.

    Args:
        path: the file.
        num_frames: of the clip.
        config: which label, and what counts.

    Returns:
        Labels by frame from 0.

    Raises:
        UserError: the XML is damaged, a value is missing or wrong, several labels have tracks and none was chosen, or
            two balls in play are in one frame.
    """
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(f"{path}: declares entities, which CVAT does not write and which are not read here.")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged XML ({error}).") from error
    labels: dict[int, BallLabel] = {}
    gone: set[int] = set()
    passed_over: set[int] = set()  # a ball is there, but not where a person put it
    for element, where in _elements(tree, config, path):
        frame = element.get("frame") or ""
        if not re.fullmatch(r"[0-9]{1,18}", frame):
            raise UserError(f"{where}: frame is '{frame[:60]}', expected a number.")
        flags = {name: _read_flag(element.get(name), name, where) for name in ("outside", "occluded")}
        is_keyframe = _read_flag(element.get("keyframe", "1"), "keyframe", where)
        used = next((a.text for a in element.iter("attribute") if a.get("name") == "used_in_game"), "1")
        if not _read_flag(used, "used_in_game", where):
            continue
        if config.keyframes_only and not is_keyframe:
            if not flags["outside"]:
                passed_over.add(int(frame))
            continue
        if flags["outside"]:
            gone.add(int(frame))
            continue
        kind = Visibility.OCCLUDED if flags["occluded"] else Visibility.EASY
        add_label(labels, int(frame), BallLabel(kind, _read_place(element, where)), where)
    absent = BallLabel(Visibility.ABSENT, None)
    without = set(range(num_frames)) - passed_over if config.unmarked == "absent" else gone - passed_over
    return {**{i: absent for i in sorted(without)}, **labels}


def _elements(tree: ElementTree.Element, config: CvatConfig, path: Path) -> Iterator[tuple[ElementTree.Element, str]]:
    """Yield points and boxes of the ball's tracks, and what to call each in messages."""
    tracks = list(tree.iter("track"))
    if not tracks:
        is_for_images = tree.find("image") is not None
        hint = " This is its XML for images: export the task as 'CVAT for video'." if is_for_images else ""
        raise UserError(
            f"{path}: holds no <track>; expected CVAT's XML for video, with tracks of points or boxes.{hint}"
        )
    names = sorted({track.get("label", "") for track in tracks} - {""})
    if config.label is None and len(names) > 1:
        raise UserError(
            f"{path}: has tracks of {len(names)} labels ({', '.join(names)[:300]}); say which is the ball:"
            " data.cvat.label=<name>."
        )
    if config.label is not None and config.label not in names:
        raise UserError(
            f"{path}: data.cvat.label={config.label} is not among its labels"
            f" ({', '.join(names)[:300]}){nearest(config.label, names)}"
        )
    for track in tracks:
        if config.label not in (None, track.get("label", config.label)):
            continue
        for element in track:
            if element.tag in ("points", "box"):
                yield element, f"{path}, track {track.get('id', '?')[:60]}, frame {element.get('frame', '?')[:60]}"
            elif element.tag != "attribute":
                raise UserError(
                    f"{path}, track {track.get('id', '?')[:60]}: is of <{element.tag[:60]}>; the ball is marked by"
                    " points or boxes."
                )


def _read_flag(value: str | None, name: str, where: str) -> bool:
    if value not in ("0", "1"):
        raise UserError(f"{where}: {name} is '{str(value)[:60]}', expected 0 or 1.")
    return value == "1"


def _read_place(element: ElementTree.Element, where: str) -> tuple[float, float]:
    if element.tag == "points":
        x, _, y = (element.get("points") or "").split(";")[0].partition(",")
        return read_point(x, y, where, "there is a ball")
    left, top = read_point(element.get("xtl", ""), element.get("ytl", ""), where, "there is a box")
    right, bottom = read_point(element.get("xbr", ""), element.get("ybr", ""), where, "there is a box")
    if right <= left or bottom <= top:
        raise UserError(f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area.")
    # Boxes are measured from the picture's corner, which is at -0.5 of pixel centers.
    return (left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5

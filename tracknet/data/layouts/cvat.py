"""Reader of CVAT's XML for video: tracks of points or boxes, as used by WASB's soccer and basketball labels.

This module is not a layout itself.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tracknet.data.labels import BallLabel, Visibility
from tracknet.data.layouts.reading import add_label, read_point, read_text
from tracknet.errors import UserError, nearest


@dataclass
class CvatConfig:
    """Selection of the ball among CVAT's tracks, and meaning of frames without one."""

    label: str | None = None
    """Name of the ball's label; ``null`` = the only label with tracks."""
    keyframes_only: bool = True
    """Use only positions that a person set, and skip those that CVAT interpolated (``keyframe="0"``)."""
    unmarked: Literal["unlabeled", "absent"] = "unlabeled"
    """Meaning of frames in which no track has a ball: ``unlabeled`` = unknown, ``absent`` = no ball. Frames that a
    track marks as ``outside`` have no ball either way."""


def read_cvat(path: Path, num_frames: int, config: CvatConfig) -> dict[int, BallLabel]:
    """Read the ball's tracks from an XML file.

    A ``<track label>`` contains ``<points frame outside occluded keyframe points="x,y">`` or ``<box … xtl ytl xbr
    ybr>``. The position of the ball is the point or the center of the box. ``occluded`` marks an inferred position
    (class 3). Elements whose attribute ``used_in_game`` is 0 are spare balls and are skipped.

    Args:
        path: path of the XML file.
        num_frames: number of frames in the clip.
        config: selection of the ball and meaning of frames without one.

    Returns:
        Labels by frame index, from 0.

    Raises:
        UserError: if the XML is damaged, a value is missing or invalid, several labels have tracks and none of them is
            selected, or a frame has two balls in play.
    """
    # Refuse entities before parsing: nested ones can expand to more text than memory holds.
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(f"{path}: declares entities, which CVAT does not write and TrackNet does not read.")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged XML ({error}).") from error
    labels: dict[int, BallLabel] = {}
    outside: set[int] = set()  # frames that a track marks as being without a ball
    interpolated: set[int] = set()  # frames with a ball whose position no person set: neither labeled nor absent
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
                interpolated.add(int(frame))
            continue
        if flags["outside"]:
            outside.add(int(frame))
            continue
        kind = Visibility.OCCLUDED if flags["occluded"] else Visibility.EASY
        add_label(labels, int(frame), BallLabel(kind, _read_position(element, where)), where)
    # A ball in one track takes precedence over the end of another track in the same frame.
    absent = BallLabel(Visibility.ABSENT, None)
    without_ball = set(range(num_frames)) - interpolated if config.unmarked == "absent" else outside - interpolated
    return {**{i: absent for i in sorted(without_ball)}, **labels}


def _elements(tree: ElementTree.Element, config: CvatConfig, path: Path) -> Iterator[tuple[ElementTree.Element, str]]:
    """Yield the points and boxes of the ball's tracks, and the location of each for messages.

    Raises:
        UserError: if the file has no tracks, the ball's label is ambiguous or not found, or its tracks contain other
            shapes.
    """
    tracks = list(tree.iter("track"))
    if not tracks:
        is_for_images = tree.find("image") is not None
        hint = " This is CVAT's XML for images; export the task as 'CVAT for video'." if is_for_images else ""
        raise UserError(
            f"{path}: contains no <track>; expected CVAT's XML for video, with tracks of points or boxes.{hint}"
        )
    names = sorted({track.get("label", "") for track in tracks} - {""})
    if config.label is None and len(names) > 1:
        raise UserError(
            f"{path}: contains tracks of {len(names)} labels ({', '.join(names)[:300]}). Set the label of the ball:"
            " data.cvat.label=<name>."
        )
    if config.label is not None and config.label not in names:
        raise UserError(
            f"{path}: data.cvat.label={config.label} is not among the labels"
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
                    f"{path}, track {track.get('id', '?')[:60]}: contains <{element.tag[:60]}>; the ball must be"
                    " marked by points or boxes."
                )


def _read_flag(value: str | None, name: str, where: str) -> bool:
    """Return the value of an attribute that must be 0 or 1."""
    if value not in ("0", "1"):
        raise UserError(f"{where}: {name} is '{str(value)[:60]}', expected 0 or 1.")
    return value == "1"


def _read_position(element: ElementTree.Element, where: str) -> tuple[float, float]:
    """Return the first point of a points element, or the center of a box, in pixels."""
    if element.tag == "points":
        x, _, y = (element.get("points") or "").split(";")[0].partition(",")
        return read_point(x, y, where, "there is a ball")
    left, top = read_point(element.get("xtl", ""), element.get("ytl", ""), where, "there is a box")
    right, bottom = read_point(element.get("xbr", ""), element.get("ybr", ""), where, "there is a box")
    if right <= left or bottom <= top:
        raise UserError(f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area.")
    # Boxes are measured from the corner of the image, which is at -0.5 with pixel centers at integers.
    return (left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5

"""CVAT's XML of point tracks, as WASB's soccer and basketball labels use it: no layout by itself."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tracknet.data.layouts.reading import add_label, read_point, read_text
from tracknet.errors import UserError
from tracknet.labels import BallLabel, Visibility


def read_points(path: Path, num_frames: int) -> dict[int, BallLabel]:
    """Read ``<track><points frame outside occluded points="x,y">`` into labels of all frames.

    The annotation covers the whole clip: a frame without a point, or with one that is ``outside``, shows no ball. A point that is
    ``occluded`` has an inferred position (class 3). Points whose attribute ``used_in_game`` is 0 are spare balls and left out.

    Raises:
        UserError: the XML is damaged, a value is missing or wrong, or two balls in play are in one frame.
    """
    try:
        tree = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is damaged XML ({error}).") from error
    if tree.find("track") is None:
        raise UserError(f"{path}: holds no <track>; expected CVAT's XML for video, with tracks of points.")
    labels: dict[int, BallLabel] = {}
    for track in tree.iter("track"):
        for element in track.iter("points"):
            where = f"{path}, track {track.get('id', '?')}, frame {element.get('frame', '?')}"
            if not (element.get("frame") or "").isdigit():
                raise UserError(f"{where}: frame is '{element.get('frame')}', expected a number.")
            flags = {name: element.get(name) for name in ("outside", "occluded")}
            for name, value in flags.items():
                if value not in ("0", "1"):
                    raise UserError(f"{where}: {name} is '{value}', expected 0 or 1.")
            used = next((a.text for a in element.iter("attribute") if a.get("name") == "used_in_game"), "1")
            if used not in ("0", "1"):
                raise UserError(f"{where}: used_in_game is '{used}', expected 0 or 1.")
            if flags["outside"] == "1" or used == "0":
                continue
            x, _, y = (element.get("points") or "").split(";")[0].partition(",")
            kind = Visibility.OCCLUDED if flags["occluded"] == "1" else Visibility.EASY
            add_label(
                labels, int(element.get("frame")), BallLabel(kind, read_point(x, y, where, "there is a ball")), where
            )
    absent = BallLabel(Visibility.ABSENT, None)
    return {**{i: absent for i in range(num_frames)}, **labels}

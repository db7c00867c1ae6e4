"""Layout of datasets in COCO's format: ``annotations.json`` or ``annotations/*.json``, with boxes or keypoints.

``file_name`` is relative to ``data.root`` or to its folder ``images``, and must not lead outside. The images of a
folder form a clip, ordered by the numbers at the end of their names; a gap in the numbers starts another clip. The
first folder of the path is the game. An image without an annotation has no ball. The position of the ball is the
keypoint or the center of the box.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.layouts.reading import ClipFrames, image_size, make_clip, read_text, visible_files
from tracknet.errors import UserError, nearest

EXPECTED = "annotations.json or annotations/<name>.json in COCO's format"
PREFIX = ""
OPTIONS = ("coco",)  # sections of the data section that read_game takes as arguments
# Required keys of the entries of each list, and the types of their values.
ENTRIES: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,)},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": (str,)},
}
# Visibility class by the visibility flag of a keypoint: 0 not labeled, 1 labeled but not visible, 2 visible.
KEYPOINT = {0: Visibility.ABSENT, 1: Visibility.OCCLUDED, 2: Visibility.EASY}


@dataclass
class CocoConfig:
    """Selection of the ball in ``layout: coco``."""

    category: str | None = None
    """Name of the ball's category; ``null`` = the only category of the file."""


def _files(root: Path) -> list[Path]:
    """Return the annotation files of a dataset."""
    single = root / "annotations.json"
    return [single] if single.is_file() else visible_files(root / "annotations", "*.json")


def list_games(root: Path) -> list[str]:
    """Return the first folders of the images' paths, or the name of the annotation file for images without a folder."""
    return sorted({_game(image, path) for path in _files(root) for image in _read(path)["images"]})


def published_splits(root: Path, games: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return no splits, because the datasets of this layout are the user's own."""
    return {}


def _game(image: dict, path: Path) -> str:
    """Return the game of an image that an annotation file lists."""
    parts = PurePosixPath(image["file_name"]).parts
    return parts[0] if len(parts) > 1 else path.stem


def read_game(root: Path, game: str, config: CocoConfig) -> list[Clip]:
    """Read all clips of a game.

    Raises:
        UserError: if an annotation file is malformed, an image is missing, or a frame has several balls.
    """
    # Image file, label and annotation file, by folder and number of the image.
    folders: dict[str, dict[int, tuple[Path, BallLabel, str]]] = {}
    for path in _files(root):
        content = _read(path)
        categories = _categories(content, config, path)
        by_image: dict[int, list[dict]] = {}
        for annotation in content["annotations"]:
            if annotation["category_id"] in categories:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        if unknown := by_image.keys() - {image["id"] for image in content["images"]}:
            raise UserError(
                f"{path}: an annotation refers to image {min(unknown, key=str)}, which is not in the list of images."
            )
        for image in content["images"]:
            if _game(image, path) != game:
                continue
            where = f"{path}, image {image['file_name']}"
            digits = re.search(r"([0-9]{1,18})$", PurePosixPath(image["file_name"]).stem)
            if not digits:
                raise UserError(
                    f"{where}: the file name must end with a number, the position of the image in its clip."
                )
            file = _find(root, image["file_name"], where)
            clip = folders.setdefault(str(PurePosixPath(image["file_name"]).parent), {})
            if int(digits[1]) in clip:
                raise UserError(f"{where}: another image of the same folder also has the number {int(digits[1])}.")
            clip[int(digits[1])] = (file, _label(by_image.get(image["id"], []), where), str(path))
    return [clip for folder, images in sorted(folders.items()) for clip in _clips(game, folder, images)]


def _clips(game: str, folder: str, images: dict[int, tuple[Path, BallLabel, str]]) -> list[Clip]:
    """Make one clip of each run of consecutive image numbers in a folder."""
    runs: list[list[int]] = []
    for number in sorted(images):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    clips = []
    for run in runs:
        files = tuple(images[n][0] for n in run)
        name = game if folder in (".", game) else folder
        name = name if len(runs) == 1 else f"{name}/{run[0]}"
        labels = {i: images[n][1] for i, n in enumerate(run)}
        frames = ClipFrames(files, None, len(files), image_size(files[0]))
        clips.append(make_clip(name, game, frames, labels, Path(images[run[0]][2])))
    return clips


def _read(path: Path) -> dict:
    """Read and check an annotation file, unless it was read before and has not changed since."""
    return _read_version(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_version(path: Path, _mtime_ns: int) -> dict:
    """Read and check an annotation file; cached, because several games may share a file."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged JSON ({error}).") from error
    for key, wanted in ENTRIES.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and all(type(e.get(name)) in kinds for name, kinds in wanted.items()) for e in entries
        ):
            raise UserError(f"{path}: expected COCO's '{key}', a list of entries with {', '.join(sorted(wanted))}.")
    ids = [image["id"] for image in content["images"]]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two images have the same id.")
    return content


def _categories(content: dict, config: CocoConfig, path: Path) -> set[int | str]:
    """Return the ids of the ball's category; tools that merge files give several ids to one name."""
    names = sorted({c["name"] for c in content["categories"]})
    if config.category is None and len(names) != 1:
        raise UserError(
            f"{path}: contains {len(names)} categories ({', '.join(names)}). Set the category of the ball:"
            " data.coco.category=<name>."
        )
    name = names[0] if config.category is None else config.category
    if name not in names:
        raise UserError(
            f"{path}: data.coco.category={name} is not among the categories ({', '.join(names)}){nearest(name, names)}"
        )
    return {c["id"] for c in content["categories"] if c["name"] == name}


def _find(root: Path, name: str, where: str) -> Path:
    """Return the path of an image that an annotation file lists.

    Raises:
        UserError: if the name leads outside ``root``, or the file does not exist.
    """
    # Only the text of the name is checked: the target of links inside the folder is the user's decision.
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or Path(name).is_absolute():
        raise UserError(f"{where}: the path leads outside data.root.")
    for base in (root, root / "images"):
        try:
            if (base / name).is_file():
                return base / name
        except OSError as error:
            raise UserError(f"{where[:300]}: {error.strerror}.") from error
    raise UserError(f"{where}: file not found in '{root}' or its folder 'images'.")


def _label(annotations: list[dict], where: str) -> BallLabel:
    """Return the label of an image from the ball annotations of the image."""
    if not annotations:
        return BallLabel(Visibility.ABSENT, None)
    if len(annotations) > 1:
        raise UserError(f"{where}: has {len(annotations)} balls, but a frame can have only one.")
    points, box = annotations[0].get("keypoints"), annotations[0].get("bbox")
    values = points or box
    if (
        not isinstance(values, list)
        or not all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
        or len(values) != (3 if points else 4)
    ):
        raise UserError(
            f"{where}: expected bbox [x, y, width, height] or keypoints [x, y, visibility], got {str(values)[:200]}."
        )
    if points:
        if values[2] not in KEYPOINT:
            raise UserError(f"{where}: the visibility of the keypoint is {values[2]}, expected 0, 1 or 2.")
        kind = KEYPOINT[values[2]]
        return BallLabel(kind, None if kind is Visibility.ABSENT else (float(values[0]), float(values[1])))
    if min(values[2:]) <= 0:
        raise UserError(f"{where}: the box {values} has no area.")
    # Boxes are measured from the corner of the image, which is at -0.5 with pixel centers at integers.
    return BallLabel(Visibility.EASY, (values[0] + values[2] / 2 - 0.5, values[1] + values[3] / 2 - 0.5))

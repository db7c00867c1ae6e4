"""Whatever stands in label files and lies in their folders, a reader gives clips or one message.

Flipped bits end at a parser; the damage done here passes it: cells, attributes and entries of other kinds and sizes,
and folders of other content.
"""

import copy
import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import pytest

from tests.data.test_layouts import ALL_TABLES, FORMATS
from tracknet.config import compose_data
from tracknet.data.checks import check_labels
from tracknet.data.splits import open_dataset, resolve_splits
from tracknet.errors import UserError

# Texts that mean something to one parser or another: of numbers, of paths, of tables, of terminals.
NUMBERS = ["", " ", "0", "1", "2", "3", "5", "-1", "-0", "+1", "1.0", "1.", ".5", "0x1", "1_0", "1e3", "1e400"]
NO_NUMBERS = ["nan", "inf", "-inf", "None", "true", "²", "١", "１", "½", "Ⅷ", "640", "63.4", "-0.6", "5,5", "5;5"]
LONG = ["9" * 18, "9" * 19, "9" * 5000, "0." + "3" * 5000, "x" * 300, "x" * 5000 + "1", "é" * 130 + "1"]
PATHS = ["5.jpg", "..", ".", "/", "../../x1", "a/b/1.jpg", "C:\\1.jpg", "\\", "~", "~nouser", "ball"]
SIGNS = ['"', "'", '""', '"1', ",", ";", "\t", "\n", "\r", "<", ">", "&", "&lt;", "&x;", "]]>", "%s", "{0}"]
CONTROLS = ["\x00", "1\x00", "\x1b[31m1", "\u2028", "\ufeff", "\U0001f3be1"]
TEXTS = [*NUMBERS, *NO_NUMBERS, *LONG, *PATHS, *SIGNS, *CONTROLS]
VALUES = [None, True, False, 0, 1, -1, 7, 0.5, 1e308, 10**400, -(10**20), float("nan"), float("inf")]
VALUES += [[], {}, [[]], [1], [1, 2, 2], [1, 2, 3, 4], {"id": 0}]
how_many = pytest.mark.parametrize("number", [pytest.param(400, marks=pytest.mark.slow), 12], ids=["all", "some"])


def read_everything(layout: str, root: Path) -> str | None:
    """Read all games and what is said of them; return the message where there is one."""
    try:
        config = compose_data(layout, [f"data.root={root}"])
        dataset = open_dataset(config)
        resolve_splits(config, dataset, needed=())
        for game in dataset.games:
            check_labels(dataset.read(game))
    except UserError as error:
        assert 0 < len(str(error)) < 4500
        return str(error)
    return None


def change_cells(rng: random.Random, text: str) -> str:
    """Change cells, rows and ends of lines of a table, or of lines of two numbers."""
    mark = "," if "," in text else " "
    rows = [line.split(mark) for line in text.splitlines()]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        match rng.randrange(5):
            case 0:
                row.insert(rng.randint(0, len(row)), rng.choice(TEXTS))
            case 1 if len(row) > 1:
                row.pop()
            case 2:
                rows.insert(rng.randint(0, len(rows)), list(rng.choice(rows)))
            case _:
                row[rng.randrange(len(row))] = rng.choice(TEXTS)
    return rng.choice(["\n", "\n", "\r\n", "\r", "\n\n"]).join(mark.join(row) for row in rows)


def change_elements(rng: random.Random, text: str) -> str:
    """Change attributes, texts, names and places of elements."""
    tree = ElementTree.fromstring(text)
    for _ in range(rng.randint(1, 3)):
        element = rng.choice(list(tree.iter()))
        legal = [t for t in TEXTS if not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", t)]
        match rng.randrange(6):
            case 0 if element.attrib:
                del element.attrib[rng.choice(list(element.attrib))]
            case 1:
                element.tag = rng.choice(["points", "box", "track", "attribute", "polygon", "image", "annotations"])
            case 2:
                element.text = rng.choice(legal)
            case 3:
                element.append(copy.deepcopy(rng.choice(list(tree.iter()))))
            case _:
                names = ["frame", "outside", "keyframe", "label", "points", "xtl", "ytl", "xbr", "ybr", "name"]
                element.set(rng.choice([*element.attrib, *names]), rng.choice(legal))
    return ElementTree.tostring(tree, "unicode")


def change_entries(rng: random.Random, text: str) -> str:
    """Put other kinds of values into a JSON tree, leave entries out and double them."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        inside, at = None, content
        while isinstance(at, dict | list) and at and (inside is None or rng.random() < 0.8):
            inside, key = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = inside[key]
        if inside is None:
            break
        match rng.randrange(5):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, list):
                inside.append(json.loads(json.dumps(rng.choice(inside))))
            case 2:
                inside[key] = rng.choice(TEXTS)
            case _:
                inside[key] = rng.choice(VALUES)
    return json.dumps(content)


CHANGES = {
    **dict.fromkeys((*ALL_TABLES, "wasb_volleyball"), change_cells),
    **dict.fromkeys(("wasb_soccer", "wasb_basketball"), change_elements),
    "coco": change_entries,
}


@how_many
@pytest.mark.parametrize("name", FORMATS)
def test_labels_of_other_content_give_clips_or_a_message(tmp_path, name, number):
    rng, layout = random.Random(zlib.crc32(name.encode())), name.replace("tracknetv3", "tracknetv2")
    labels, _ = FORMATS[name](tmp_path, 1)
    text, refused = labels.read_text(), 0
    assert read_everything(layout, tmp_path) is None
    for _ in range(number):
        labels.write_bytes(CHANGES[name](rng, text).encode("utf-8", "surrogatepass"))
        refused += read_everything(layout, tmp_path) is not None
    assert refused > number / 4


def change_folder(rng: random.Random, root: Path) -> None:
    """Change what lies in a dataset: names, links, folders in place of files, empty files, another's content."""
    path = rng.choice([root, *sorted(root.rglob("*"))])
    names = [t for t in TEXTS if len(t.encode()) < 200 and t not in ("", ".", "..") and not set(t) & {"/", "\x00"}]
    if path == root or path.is_symlink():
        return
    match rng.randrange(7):
        case 0:
            target = path.with_name(rng.choice(names) + rng.choice(["", path.suffix]))
            if not target.exists() and not target.is_symlink():
                path.rename(target)
        case 1:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        case 2 if path.is_file():
            path.write_bytes(b"")
        case 3 if path.is_file():
            path.unlink()
            path.mkdir()
        case 4:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.symlink_to(rng.choice([path.name, "nothing", "..", "/dev/null"]))
        case 5 if path.is_file():
            shutil.copy(path, path.with_name(rng.choice(names) + path.suffix))
        case _ if path.is_file():
            others = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()]
            path.write_bytes(rng.choice(others).read_bytes())


@how_many
@pytest.mark.parametrize("name", FORMATS)
def test_folders_of_other_content_give_clips_or_a_message(tmp_path, name, number):
    rng, layout = random.Random(zlib.crc32(name.encode())), name.replace("tracknetv3", "tracknetv2")
    FORMATS[name](tmp_path / "whole", 1)
    refused = 0
    for i in range(number // 2):
        root = tmp_path / f"{i}"
        shutil.copytree(tmp_path / "whole", root)
        for _ in range(rng.randint(1, 2)):
            change_folder(rng, root)
        refused += read_everything(layout, root) is not None
        shutil.rmtree(root)
    assert refused

"""Whatever stands in a configuration, an override or a state, the answer is a value or one message: nothing else is
raised."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

import tracknet
from tracknet.config import BUILT_IN, Config, compose, load_config, save_config
from tracknet.config_errors import list_settings
from tracknet.errors import UserError
from tracknet.scripts.command_line import Parser
from tracknet.training.state import load_state

NUMBER = 4000
SHIPPED = Path(tracknet.__file__).parent / "weights/vit_tiny_heatmap"
VALUES = [
    "",
    "~",
    "null",
    "true",
    "off",
    "-1",
    "0",
    "1",
    "2",
    "1e3",
    "1e400",
    ".nan",
    "-.inf",
    "9" * 400,
    "9" * 5000,
    "0x1f",
    "0b1",
    "1_0",
    "1:30",
    "[]",
    "[1]",
    "[1,2]",
    "[[1]]",
    "{}",
    "{a: 1}",
    "[a",
    "{a",
    "}",
    "'",
    '"',
    "'1'",
    "!!bool x",
    "!!int y",
    "!!python/name:os.system ''",
    "!x y",
    "&a [*a]",
    "*b",
    "${seed}",
    "${data.root}",
    "${nope}",
    "${oc.env:HOME}",
    "${oc.coerce:os.path,1}",
    "${${seed}}",
    "$",
    "${",
    "\\\\${seed}",
    "2024-01-01",
    "²",
    "١",
    "\0",
    "\x1b[31m",
    "\udcff",
    "\u2028",
    "ball",
    "game1",
    "- 1",
    "a: b",
    "? x",
    "<<: {a: 1}",
    "%YAML",
    "---",
    "--- 1\n--- 2",
    "# x",
    "|",
    ">",
    "@",
    "`",
    "a" * 3000,
    "[" * 500,
    "{a: " * 300,
    "NaN",
    "Infinity",
    "None",
    "1.0",
    "-0",
    "00010",
]


def overrides(rng, number):
    """Draw ``key=value`` arguments: known keys with any value, keys that are nearly right, and noise."""
    names = [name for name, _ in list_settings(Config)]
    for _ in range(number):
        name = rng.choice(names)
        if rng.random() < 0.2:
            name = rng.choice(
                [name + ".x", name[:-1], name.upper(), "." + name, name + "[0]", "data..root", "", "data", "seed.x"]
            )
        yield f"{name}={rng.choice(VALUES)}"


def damaged(rng, data):
    """Change a few places of some bytes: flipped, cut, repeated, replaced by what means something to a parser."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 200)] * rng.randint(1, 5)
        elif kind == 3:
            data[at : at + rng.randint(0, 8)] = rng.choice(VALUES).encode("utf-8", "surrogateescape")
        elif data:
            end = data.find(b"\n", at) if rng.random() < 0.5 else at + 12
            data[data.rfind(b":", 0, at) + 1 : end] = b" " + rng.choice(VALUES).encode("utf-8", "surrogateescape")
    return bytes(data)


def replaced(rng, value):
    """Put another kind of value at a random place of a JSON tree."""
    others = [None, True, -1, 2**70, 1.5, "", "x" * 50, [], {}, [1], {"a": 1}, "²"]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != name}
        return value | {name: replaced(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [replaced(rng, v) if i == at else v for i, v in enumerate(value)]
    return rng.choice(others)


def refused(attempt, source):
    """Whether an input was refused, in at most a screen and in words that name where it stands."""
    try:
        attempt()
    except UserError as error:
        assert 0 < len(str(error)) < 4500, source
        return True
    return False


@pytest.fixture(params=[pytest.param(NUMBER, marks=pytest.mark.slow), 60], ids=["all", "some"])
def number(request):
    return request.param


def test_no_override_raises_anything_else(number):
    rng = random.Random(0)
    answers = [
        refused(partial(compose, "synthetic", "vit_tiny_heatmap", "qlora", [override]), override)
        for override in overrides(rng, number)
    ]
    assert 0.2 < sum(answers) / number < 0.98  # some are sound


def test_no_argument_raises_anything_else(number):
    rng = random.Random(1)
    pieces = [
        "--data",
        "--seed",
        "--sed",
        "-x",
        "--",
        "--data=x",
        "-",
        "a=b",
        "seed=1",
        "\udcff",
        "--json",
        "²",
        "data.root=x",
        "--resume",
    ]
    for _ in range(number):
        argv = [rng.choice(pieces) for _ in range(rng.randint(0, 4))]
        parser = Parser("doc", "train")
        parser.add_argument("--seed", type=int)
        parser.add_argument("--json")
        refused(lambda parser=parser, argv=argv: parser.parse(argv), argv)


@pytest.mark.parametrize("section", ["data", "model", "training"])
def test_no_file_of_settings_raises_anything_else(tmp_path, number, section):
    rng = random.Random(2)
    (tmp_path / section).mkdir()
    files = [path.read_bytes() for path in sorted((BUILT_IN / section).glob("*.yaml"))]
    names = {"data": "synthetic", "model": "vit_tiny_heatmap", "training": "qlora", section: "mine"}
    for _ in range(number // 3):
        (tmp_path / section / "mine.yaml").write_bytes(data := damaged(rng, rng.choice(files)))
        refused(lambda: compose(names["data"], names["model"], names["training"], (), tmp_path), data)


def test_no_configuration_of_a_run_raises_anything_else(tmp_path, number):
    rng, path = random.Random(3), tmp_path / "config.yaml"
    save_config(compose("synthetic", "vit_tiny_heatmap", "qlora"), path)
    whole = path.read_bytes()
    for _ in range(number // 2):
        path.write_bytes(data := damaged(rng, whole))
        refused(lambda: load_config(path), data)


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_no_state_raises_anything_else(tmp_path, number, kind):
    rng = random.Random(4)
    shutil.copytree(SHIPPED / "best", tmp_path / "best")
    path = tmp_path / "best/state.json"
    whole = path.read_bytes()
    state = json.loads(whole) | {
        "micro_batch": {"size": 4, "failed": None, "clean": 3, "setting": "x"},
        "optimizer": {"id": "a", "groups": [{"params": [0, 1]}], "values": {"0": {"step": 3}}},
    }
    for _ in range(number):
        data = damaged(rng, whole) if kind == "bytes" else json.dumps(replaced(rng, state)).encode()
        path.write_bytes(data)
        refused(lambda: load_state(tmp_path / "best"), data)

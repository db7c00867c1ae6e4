"""Fuzz tests: no content of a configuration, an override or a state raises anything but a ``UserError``."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

import tracknet
from tests.fuzzing import VALUES, damaged, refused, replaced
from tracknet.config import BUILT_IN, Config, compose, load_config, save_config
from tracknet.config.errors import list_settings
from tracknet.scripts.command_line import Parser
from tracknet.training.state import load_state

NUMBER = 4000
SHIPPED = Path(tracknet.__file__).parent / "weights/vit_tiny_heatmap"


def overrides(rng, number):
    """Yield random ``key=value`` arguments: valid keys with any value, nearly valid keys, and noise."""
    names = [name for name, _ in list_settings(Config)]
    for _ in range(number):
        name = rng.choice(names)
        if rng.random() < 0.2:
            name = rng.choice(
                [name + ".x", name[:-1], name.upper(), "." + name, name + "[0]", "data..root", "", "data", "seed.x"]
            )
        yield f"{name}={rng.choice(VALUES)}"


@pytest.fixture(params=[pytest.param(NUMBER, marks=pytest.mark.slow), 60], ids=["all", "some"])
def number(request):
    return request.param


def test_no_override_raises_anything_else(number):
    rng = random.Random(0)
    answers = [
        refused(partial(compose, "synthetic", "vit_tiny_heatmap", "qlora", [override]), override)
        for override in overrides(rng, number)
    ]
    assert 0.2 < sum(answers) / number < 0.98  # some overrides are valid


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

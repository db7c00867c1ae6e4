"""Validation of an untrusted state.json: wrong types and values are rejected before anything is built from it."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tracknet
from tests.conftest import set_hash
from tracknet.errors import UserError
from tracknet.runs.load import load_run
from tracknet.training.checkpoint import load_weights
from tracknet.training.state import load_state

HASH = "0" * 64
WHOLE = {
    "format": 2,
    "transformers": "5.0",
    "from_base_sha256": HASH,
    "sha256": {},
    "progress": {"step": 3, "best_step": 1, "stale_validations": 0, "pending_validation": 1},
    "best": {"f1_strict": 0.5, "median_error_px": None},
    "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    "micro_batch": {"size": 4, "failed": None, "clean": 3, "setting": "x"},
    "optimizer": {"id": "a", "groups": [{}], "values": {"0": {}}},
    "backbone": {
        "architecture": {"model_type": "dinov2"},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "base": {"name": "x", "revision": None, "sha256": HASH},
    },
}
WRONG = [
    ("progress.step", -1),
    ("progress.step", 1.5),
    ("progress.step", True),
    ("progress.step", 2**60),
    ("progress", []),
    ("best.f1_strict", "high"),
    ("best.f1_strict", 10**400),
    ("scaler.scale", -(10**400)),
    ("best", None),
    ("scaler.scale", "x"),
    ("micro_batch.size", 0),
    ("micro_batch", 3),
    ("micro_batch.failed", -1),
    ("optimizer.groups", {}),
    ("optimizer.values", [1]),
    ("backbone", []),
    ("optimizer", None),
    ("backbone.mean", [0.5]),
    ("backbone.std", [0.2, 0.2, 0]),
    ("backbone.architecture", "dinov2"),
    ("backbone.base", "x"),
    ("backbone.base.sha256", "0"),
    ("backbone.base.name", 5),
    ("from_base_sha256", 3),
    ("sha256", {"a": "b"}),
    ("transformers", 5),
    ("stored_as", "fp8"),
]


def put(folder, state):
    (folder / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    (folder / "optimizer.safetensors").touch()


def place(state, key):
    *path, last = key.split(".")
    for name in path:
        state = state[name]
    return state, last


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: str(v)[:20])
def test_entries_of_another_kind_are_refused_by_name(tmp_path, key, value):
    put(tmp_path, WHOLE)
    assert load_state(tmp_path) == WHOLE
    state = json.loads(json.dumps(WHOLE))
    section, name = place(state, key)
    section[name] = value
    put(tmp_path, state)
    with pytest.raises(UserError, match=f"state.json: damaged .*{name}"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "key", ["progress", "best", "scaler", "optimizer", "transformers", "backbone.mean", "backbone.base.sha256"]
)
def test_entries_that_are_missing_are_named(tmp_path, key):
    state = json.loads(json.dumps(WHOLE))
    section, name = place(state, key)
    del section[name]
    put(tmp_path, state)
    with pytest.raises(UserError, match=rf"damaged \({key.replace('.', '[.]')} missing\)"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2, "best": {"a": NaN}}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\udcff",
    ],
    ids=["empty", "cut", "list", "null", "other format", "nan", "deep", "digits", "no UTF-8"],
)
def test_what_is_no_state_is_one_message(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        load_state(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.fixture
def shipped(tmp_path):
    """Copy the run that ships with the package, and add the hash of its weights to its state."""
    source = tracknet.__path__[0] + "/weights/vit_tiny_heatmap"
    run = tmp_path / "run"
    shutil.copytree(source, run)
    path = run / "best/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": {}}))
    set_hash(run / "best", "model.safetensors")
    return run


def test_one_flipped_bit_is_refused_wherever_it_is(shipped):
    path = shipped / "best/model.safetensors"
    whole = path.read_bytes()
    load_run(shipped, overrides=["training.device=cpu"])
    for seed in range(10):
        damaged = bytearray(whole)
        damaged[random.Random(seed).randrange(len(whole))] ^= 1 << random.Random(seed).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged, or not the file that was saved"):
            load_run(shipped, overrides=["training.device=cpu"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_none_is_refused_though_its_hash_fits(shipped, value):
    path = shipped / "best/model.safetensors"
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    set_hash(shipped / "best", path.name)
    with pytest.raises(UserError, match=f"{name} contains values that are not finite"):
        load_run(shipped, overrides=["training.device=cpu"])


def test_an_older_state_loads_and_says_that_it_cannot_be_checked(shipped, said):
    path = shipped / "best/state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    path.write_text(json.dumps(state))
    _, model, _ = load_run(shipped, overrides=["training.device=cpu"])
    assert sum("cannot be checked" in line for line in said) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(shipped / "best", model)
    assert sum("cannot be checked" in line for line in said) == 2

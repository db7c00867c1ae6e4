"""Whatever stands in the files of a run or a backbone, loading it gives a model or one message: nothing else is
raised."""

import json
import random
import shutil
import struct

import pytest
import yaml
from accelerate.state import AcceleratorState

from tests.conftest import TINY_DATA, set_hash
from tests.fuzzing import damaged, refused, replaced
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.models.backbone import BackboneConfig
from tracknet.models.pretrained import build_backbone
from tracknet.runs.load import load_run
from tracknet.runs.onnx import find_onnx

pytestmark = pytest.mark.filterwarnings("ignore")  # what libraries think of such values


@pytest.fixture(scope="module")
def trained(rallies, backbones, tmp_path_factory):
    """Two runs that were really trained: one on a base that it names, one with all its weights."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name, mode, more in (("based", "qlora", "seed=0"), ("whole", "int8", "training.self_contained=true")):
        settings = [
            *TINY_DATA,
            f"data.root={rallies}",
            f"data.cache_dir={folder / 'cache'}",
            f"model.backbone.name={backbones['vit']}",
            "model.decoder.channels=32",
            "training.batch_size=4",
            "training.max_steps=1",
            "training.device=cpu",
            more,
        ]
        train_run(compose("synthetic", "vit_tiny_heatmap", mode, settings), folder / name)
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(params=[pytest.param(400, marks=pytest.mark.slow), 8], ids=["all", "some"])
def number(request):
    return request.param


def change_json(rng, whole):
    """Put values of another kind into a JSON file, or damage its text."""
    if rng.random() < 0.2:
        return damaged(rng, whole)
    return json.dumps(replaced(rng, json.loads(whole))).encode()


def change_yaml(rng, whole):
    """Likewise of YAML."""
    if rng.random() < 0.2:
        return damaged(rng, whole)
    return yaml.safe_dump(replaced(rng, yaml.safe_load(whole)), allow_unicode=True).encode()


def change_header(rng, whole):
    """Likewise of the JSON that a safetensors file begins with, and of its length."""
    (size,) = struct.unpack("<Q", whole[:8])
    header = change_json(rng, whole[8 : 8 + size])
    length = rng.choice([0, 1, 2**31, 2**63, len(header) + 8]) if rng.random() < 0.1 else len(header)
    return struct.pack("<Q", length) + header + whole[8 + size :][: rng.choice([None, None, 0, 100])]


CHANGES = {"config.yaml": change_yaml, "best/state.json": change_json, "best/model.safetensors": change_header}


@pytest.mark.parametrize("name", ["based", "whole"])
@pytest.mark.parametrize("file", CHANGES)
def test_no_run_raises_anything_else(trained, tmp_path, number, name, file):
    rng, run = random.Random(f"{name} {file}"), tmp_path / "run"
    shutil.copytree(trained / name, run)
    path = run / file
    whole, answers = path.read_bytes(), []
    for _ in range(number):
        path.write_bytes(data := CHANGES[file](rng, whole))
        if path.suffix == ".safetensors":  # as somebody does who changes it on purpose
            set_hash(path.parent, path.name)
        answers.append(refused(lambda: load_run(run, overrides=["training.device=cpu"]), data))
    assert any(answers)


@pytest.mark.parametrize(
    "file", ["config.json", "preprocessor_config.json", "model.safetensors.index.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_no_backbone_raises_anything_else(backbones, tmp_path, number, kind, file):
    rng, folder = random.Random(f"{kind} {file}"), tmp_path / "b"
    shutil.copytree(backbones[kind], folder)
    if file.startswith("preprocessor"):
        content = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "size": {"height": 1}}
        (folder / file).write_text(json.dumps(content))
    if file.endswith("index.json"):
        header = (folder / "model.safetensors").read_bytes()
        names = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / file).write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")})
        )
    path = folder / file
    whole, answers = path.read_bytes(), []
    change = change_header if path.suffix == ".safetensors" else change_json
    for i in range(number):
        path.write_bytes(data := change(rng, whole))
        config = BackboneConfig(str(folder), weights="random" if i % 4 == 3 else "pretrained")
        answers.append(refused(lambda config=config: build_backbone(config), data))
    assert any(answers)


def test_no_sidecar_of_an_onnx_model_raises_anything_else(trained, tmp_path, number):
    rng, run = random.Random("onnx"), tmp_path / "run"
    shutil.copytree(trained / "based", run)
    (run / "onnx").mkdir()
    (run / "onnx/model.onnx").write_bytes(b"no model")
    path = run / "onnx/onnx.json"
    whole = json.dumps({"source_sha256": "0" * 64, "checkpoint": "best", "input": "x", "num_balls": 3}).encode()
    answers = []
    for _ in range(number):
        path.write_bytes(data := change_json(rng, whole))
        answers.append(refused(lambda: find_onnx(run, "best"), data))
    assert any(answers)

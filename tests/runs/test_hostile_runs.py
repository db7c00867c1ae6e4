"""A run, a backbone and an export of a stranger: nothing they say is imported, fetched, run, or written where they
want."""

import json
import os
import random
import re
import shlex
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tracknet
from tests.conftest import TINY_DATA, set_hash
from tests.fuzzing import damaged
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.data.cache import make_cache
from tracknet.errors import UserError
from tracknet.models.backbone import BackboneConfig
from tracknet.models.families import FAMILIES
from tracknet.models.foreign import check_architecture
from tracknet.models.pretrained import build_backbone
from tracknet.runs.export import public_name
from tracknet.runs.hub import build_card
from tracknet.runs.load import keep_own_cache, load_run
from tracknet.runs.onnx import find_onnx
from tracknet.scripts import cli

SECRET = "the-secret-of-this-machine"


@pytest.fixture(scope="module")
def trained(rallies, backbones, tmp_path_factory):
    """A run with all of its weights, so that loading it asks for nothing, and one that names its base."""
    runs = {}
    for name, mode, own in (("whole", "default", "training.self_contained=true"), ("based", "qlora", "seed=0")):
        folder = tmp_path_factory.mktemp(f"of-{SECRET}")
        settings = [
            *TINY_DATA,
            f"data.root={rallies}",
            f"data.cache_dir={folder / 'cache'}",
            f"model.backbone.name={backbones['vit']}",
            "model.decoder.channels=32",
            "training.batch_size=4",
            "training.max_steps=1",
            "training.device=cpu",
            own,
        ]
        train_run(compose("synthetic", "vit_tiny_heatmap", mode, settings), folder / "runs/r")
        runs[name] = folder / "runs/r"
    return runs


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, which a test makes hostile."""
    shutil.copytree(trained["whole"], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A machine with a secret in its environment, a module that betrays its import, and no connection that is not
    noticed."""
    module = tmp_path / "importable"
    module.mkdir()
    (module / "betrayer.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nx = float\n")
    monkeypatch.syspath_prepend(str(module))
    monkeypatch.setenv("SECRET", SECRET)
    asked = []

    def connect(self, address):
        asked.append(address)
        raise OSError("no connection here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield tmp_path
    assert asked == [] and not (tmp_path / "imported").exists()


def edit_config(run, change):
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


COMMANDS = {
    "evaluate": ["evaluate", "--run", "RUN", "training.device=cpu"],
    "predict": ["predict", "--run", "RUN", "VIDEO", "--out", "OUT"],
    "export": ["export", "--run", "RUN", "--format", "merged", "--out", "OUT"],
    "push": ["push", "--run", "RUN", "--repo", "a/b", "--dry-run", "OUT"],
    "resume": ["train", "--resume", "RUN", "training.max_steps=2"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "${oc.coerce:betrayer.x,1}"),
        ("seed", "${oc.env:SECRET}"),
        ("data.root", "${oc.env:SECRET}/x"),
        ("model.backbone.name", "${oc.env:SECRET}/x"),
        ("training.init_from", "${oc.env:SECRET}"),
        ("model.name", "betrayer.x"),
        ("data.layout", "betrayer"),
        ("training.optimizer.name", "betrayer.x"),
    ],
)
def test_a_configuration_imports_nothing_and_reads_no_environment(run, watched, rallies, capsys, command, key, value):
    def change(content):
        *sections, last = key.split(".")
        for section in sections:
            content = content[section]
        content[last] = value

    edit_config(run, change)
    before = sorted(watched.rglob("*"))
    names = {"RUN": str(run), "OUT": str(watched / "out"), "VIDEO": str(next((rallies / "game4").rglob("clip.mp4")))}
    assert cli.main([names.get(a, a) for a in COMMANDS[command]]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and key in said.err
    assert sorted(watched.rglob("*")) == before


@pytest.mark.parametrize("name", ["whole", "based"])
@pytest.mark.parametrize("what", ["merged", "adapter", "backbone", "onnx", "push"])
def test_what_is_published_names_no_place_of_this_machine(trained, backbones, watched, name, what):
    """Not in the configuration, not in the state, not in the backbone's, and not in the graph of an ONNX file."""
    out = watched / "out"
    command = ["export", "--run", str(trained[name]), "--format", what, "--out", str(out)]
    if what == "push":
        command = ["push", "--run", str(trained[name]), "--repo", "a/b", "--dry-run", str(out), "--self-contained"]
    if (name, what) == ("whole", "adapter"):
        assert cli.main(command) == 2
        return
    assert cli.main(command) == 0
    secrets = [SECRET.encode(), b"/tmp/", str(backbones["vit"]).encode(), str(Path(tracknet.__file__).parent).encode()]
    files = [p for p in out.rglob("*") if p.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        assert not [s for s in secrets if s in content], file
    if what in ("merged", "push"):
        load_run(out, overrides=["training.device=cpu"])
    if what == "adapter":
        with pytest.raises(UserError, match="model.backbone.name=<folder>"):
            load_run(out, overrides=["training.device=cpu", "model.backbone.local_files_only=true"])
        load_run(out, overrides=["training.device=cpu", f"model.backbone.name={backbones['vit']}"])


def test_names_that_are_published():
    assert public_name("facebook/dinov2-small") == "facebook/dinov2-small"
    assert public_name("embedded/vit_tiny") == "embedded/vit_tiny"
    assert public_name("/home/me/secret/base") == "base" and public_name("~/base") == "base"


@pytest.mark.parametrize("command", ["evaluate", "export", "resume"])
def test_a_run_does_not_say_where_this_machine_writes(run, watched, capsys, monkeypatch, command):
    """Neither rallies nor frames go where a stranger's configuration wants them."""
    monkeypatch.chdir(watched)

    def change(content):
        content["data"] |= {"root": str(watched / "chosen/rallies"), "cache_dir": str(watched / "chosen/cache")}

    edit_config(run, change)
    names = {"RUN": str(run), "OUT": str(watched / "out")}
    code = cli.main([names.get(a, a) for a in COMMANDS[command]])
    said = capsys.readouterr()
    assert not (watched / "chosen").exists()
    if command == "export":
        assert code == 0
        return
    assert code == 2 and "tracknet synthesize --out" in said.err and "is not a cache on this machine" in said.out


def test_the_command_that_the_error_names_renders_what_is_missing(run, watched, rallies, capsys):
    edit_config(run, lambda c: c["data"].update(root=str(watched / "r a"), cache_dir=str(watched / "cache")))
    assert cli.main(["evaluate", "--run", str(run), "training.device=cpu", f"data.cache_dir={watched / 'c'}"]) == 2

    command = shlex.split(re.search(r"tracknet (synthesize .*)", capsys.readouterr().err)[1])
    assert cli.main(command) == 0
    assert cli.main(["evaluate", "--run", str(run), "training.device=cpu", f"data.cache_dir={watched / 'c'}"]) == 0
    assert (watched / "c/CACHEDIR.TAG").exists() and not (watched / "cache").exists()


def test_a_cache_of_ones_own_is_known_by_its_tag(tmp_path, said):
    config = compose("synthetic", "vit_tiny_heatmap", "default", [f"data.cache_dir={tmp_path / 'mine'}"])
    default = compose("synthetic", "vit_tiny_heatmap", "default").data.cache_dir
    kept = keep_own_cache(config, [])
    assert kept.data.cache_dir == default and len(said) == 1
    assert keep_own_cache(config, [f"data.cache_dir={tmp_path / 'mine'}"]) == config
    make_cache(tmp_path / "mine")
    assert keep_own_cache(config, []) == config and len(said) == 1


# Backbones

CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}


@pytest.fixture
def backbone(backbones, tmp_path):
    shutil.copytree(backbones["vit"], tmp_path / "b")
    return tmp_path / "b"


def build(folder, **options):
    return build_backbone(BackboneConfig(name=str(folder), **options))


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; supported are"),
        ({"model_type": None}, "supported are"),
        ({"model_type": ["x"]}, "supported are"),
        ({"auto_map": {"AutoConfig": "code.Evil", "AutoModel": "code.Evil"}}, "auto_map names code"),
        ({"attn_implementation": "someone/kernel"}, "may fetch and run a kernel"),
        ({"_attn_implementation": "x/y"}, "kernel"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"transformers_weights": "/etc/x.safetensors"}, "file"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps is"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": "32"}, "damaged"),
        ({"hidden_size": None}, "damaged"),
        ({"num_attention_heads": 0}, "damaged"),
        ({"num_attention_heads": 5}, "damaged"),
        ({"patch_size": [[1]]}, "damaged"),
        ({"hidden_act": "import os"}, "damaged"),
        ({"layer_norm_eps": float("nan")}, "not a finite number"),
        ({"image_size": [1] * 100}, "image_size"),
    ],
)
def test_what_a_backbones_configuration_asks_for_is_checked_first(backbone, watched, weights, change, words):
    path = backbone / "config.json"
    (backbone / "code.py").write_text("import betrayer\nclass Evil: pass\n")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        build(backbone, weights=weights)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", "[" * 100_000, '{"model_type": "dinov2", "hidden_size": ' + "9" * 5000 + "}"]
)
def test_a_configuration_that_is_none_is_one_message(backbone, text):
    (backbone / "config.json").write_text(text)
    with pytest.raises(UserError):
        build(backbone)


@pytest.mark.parametrize(
    "file",
    ["model.bin", "../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors", ".hidden.safetensors", 5],
)
def test_an_index_names_files_beside_it_only(backbone, watched, file):
    (backbone / "model.safetensors").rename(backbone / "model-00001-of-00001.safetensors")
    names = list(load_file(backbone / "model-00001-of-00001.safetensors"))
    index = backbone / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    assert build(backbone).base is not None
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(UserError, match="only .safetensors files beside it are loaded"):
        build(backbone)


def test_a_stray_adapter_is_not_attached(backbone, watched):
    (backbone / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"})
    )
    with pytest.raises(UserError, match="contains an adapter_config.json.*Remove it"):
        build(backbone)


def test_pickled_weights_are_not_loaded(backbone, watched):
    tensors = load_file(backbone / "model.safetensors")
    (backbone / "model.safetensors").unlink()
    torch.save(tensors, backbone / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        build(backbone)


@pytest.mark.parametrize("kind", FAMILIES)
def test_configurations_as_transformers_writes_them_pass(kind):
    from transformers import AutoConfig

    written = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    assert check_architecture(written, "x")["model_type"] == kind


# States


def edit_state(run, change):
    path = run / "best/state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 65_536, "num_attention_heads": 2, "num_hidden_layers": 512}, "parameters; at most"),
        ({"num_hidden_layers": 200}, "parameters; at most|does not fit"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"model_type": "gpt2"}, "supported are"),
        ({"attn_implementation": "x/kernel"}, "kernel"),
        ({"hidden_size": "x"}, "damaged"),
    ],
)
def test_the_architecture_in_a_state_is_checked_before_it_is_built(run, watched, change, words):
    edit_state(run, lambda state: state["backbone"]["architecture"].update(change))
    with pytest.raises(UserError, match=words):
        load_run(run, overrides=["training.device=cpu"])


def test_a_run_with_larger_numbers_than_its_file_is_refused_before_memory_is_taken(run, watched):
    edit_config(run, lambda c: c["model"]["decoder"].update(channels=2**20))
    with pytest.raises(UserError, match=r"model\.decoder\.channels=1048576"):
        load_run(run, overrides=["training.device=cpu"])


@pytest.mark.parametrize("content", ["[]", "{}", '{"checkpoint": 5, "source_sha256": []}', "[" * 100_000, "\x00"])
def test_what_lies_beside_an_onnx_model_may_be_anything(run, content):
    (run / "onnx").mkdir()
    (run / "onnx/model.onnx").write_bytes(b"x")
    (run / "onnx/onnx.json").write_text(content)
    with pytest.raises(UserError, match=r"onnx"):
        find_onnx(run, "best")


def test_a_card_says_how_much_its_scores_are_worth():
    state = {
        "progress": {"step": 1, "best_step": 1},
        "best": {"f1_strict": 0.968, "tp": 15, "fp1": 1, "fn": 0, "num_frames": 20},
    }
    config = compose("synthetic", "vit_tiny_heatmap", "default", ["data.allow_leaks=true"])
    text = str(build_card(config, state, "a/b", None, None))
    assert "16 balls in 20 frames, too few to rely on" in text and "do not show how well" in text
    text = str(build_card(compose("synthetic", "vit_tiny_heatmap", "default"), state, "a/b", None, None))
    assert "do not show how well" not in text


def test_beginning_at_another_size_is_said(trained, rallies, backbones, tmp_path, capsys):
    settings = [
        *TINY_DATA,
        f"data.root={rallies}",
        f"data.cache_dir={tmp_path}",
        f"model.backbone.name={backbones['vit']}",
        "training.max_steps=1",
        "model.decoder.channels=32",
        "training.device=cpu",
        f"training.init_from={trained['whole']}",
    ]
    train_run(compose("synthetic", "vit_tiny_heatmap", "default", settings), tmp_path / "runs/a")
    assert "balls have another size" not in capsys.readouterr().out
    train_run(
        compose("synthetic", "vit_tiny_heatmap", "default", [*settings, "data.preprocess.resize=[160,88]"]),
        tmp_path / "runs/b",
    )
    assert "trained on frames of 128x72, and these are resized to 160x88" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_said_before_scoring(run, capsys):
    if os.geteuid() == 0:
        (run / "report").write_text("a file in its place")  # the superuser may write everywhere
    else:
        run.chmod(0o555)
    assert cli.main(["evaluate", "--run", str(run), "training.device=cpu"]) == 2
    said = capsys.readouterr()
    assert "report" in said.err and "Scoring" not in said.out


# Frames


def test_frames_of_another_kind_are_refused_with_the_remedy(run):
    model = load_run(run, overrides=["training.device=cpu"])[1]
    frames = torch.zeros(1, 3, 3, 72, 128, dtype=torch.uint8)
    assert model(frames).shape == (1, 3, 36, 64)
    for wrong, words in (
        (frames.float() / 255, r"float32: use frames\.mul\(255\)\.round\(\)\.to\(torch\.uint8\)"),
        (frames.long(), r"int64: use frames\.to\(torch\.uint8\)"),
        (frames.permute(0, 1, 3, 4, 2), r"frames\.permute\(0, 1, 4, 2, 3\)"),
        (frames[0], r"frames\[None\]"),
        (frames[:, :2], r"windows of 3 frames"),
        (frames[0, 0], r"\[3, 72, 128\]"),
    ):
        with pytest.raises(UserError, match=words):
            model(wrong)


# Whatever else


@pytest.mark.parametrize("number", [pytest.param(700, marks=pytest.mark.slow), 12], ids=["all", "some"])
@pytest.mark.parametrize("file", ["config.yaml", "best/state.json", "best/model.safetensors", "b/config.json"])
def test_no_file_of_a_run_raises_anything_else(run, backbone, number, file):
    rng, path = random.Random(3), backbone / "config.json" if file.startswith("b/") else run / file
    whole, refused = path.read_bytes(), 0
    for _ in range(number):
        if file.endswith("safetensors"):  # its header, under a hash that fits
            (size,) = struct.unpack("<Q", whole[:8])
            path.write_bytes(damaged(rng, whole[: 8 + size]) + whole[8 + size :])
            set_hash(run / "best", path.name)
        else:
            path.write_bytes(damaged(rng, whole))
        try:
            build(backbone) if file.startswith("b/") else load_run(run, overrides=["training.device=cpu"])
        except UserError as error:
            refused += 1
            assert 0 < len(str(error)) < 4500
    assert refused

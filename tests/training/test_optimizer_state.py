"""Validation of a saved optimizer state: kernels would read a tensor of a wrong shape beyond its end."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import set_hash
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError

KINDS = {"adamw": "default", "adamw8bit": "int8"}


@pytest.fixture(scope="module")
def trained(rallies, backbones, tmp_path_factory):
    """Train a run of one step with each optimizer; return each run with a configuration of two steps."""
    runs = {}
    for name, mode in KINDS.items():
        folder = tmp_path_factory.mktemp("run")
        settings = [
            f"data.root={rallies}",
            f"data.cache_dir={folder / 'cache'}",
            f"model.backbone.name={backbones['vit']}",
            "data.synthetic.games=4",
            "data.synthetic.frames_per_clip=14",
            "data.synthetic.size=[128,72]",
            "data.preprocess.resize=[128,72]",
            "data.split.train_games=[1,2]",
            "data.split.val_games=[3]",
            "data.split.test_games=[4]",
            "model.decoder.channels=32",
            "training.batch_size=4",
            "training.device=cpu",
            f"training.optimizer.name={name}",
        ]
        run = folder / "runs/r"
        train_run(compose("synthetic", "vit_tiny_heatmap", mode, [*settings, "training.max_steps=1"]), run)
        runs[name] = (run, compose("synthetic", "vit_tiny_heatmap", mode, [*settings, "training.max_steps=2"]))
    return runs


def change(run, edit):
    """Edit the tensors in the optimizer's file; keep its id and update its hash."""
    path = run / "last/optimizer.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)
    set_hash(run / "last", path.name)


def shorter(tensors, name):
    tensors[name] = tensors[name].flatten()[:1].clone()


def other_dtype(tensors, name):
    tensors[name] = tensors[name].to(torch.float64)


def not_finite(tensors, name):
    tensors[name].view(-1)[0] = torch.nan


def negative(tensors, name):
    tensors[name].view(-1)[0] = -1


def renamed(tensors, name):
    tensors[f"{name}x"] = tensors.pop(name)


def of_no_parameter(tensors, name):
    tensors[f"9999/{name.partition('/')[2]}"] = tensors[name].clone()


@pytest.mark.parametrize(
    ("optimizer", "entry", "edit", "message"),
    [
        ("adamw", "exp_avg", shorter, r"exp_avg is \[1\].*expected"),
        ("adamw", "exp_avg", other_dtype, r"float64, expected"),
        ("adamw", "exp_avg", not_finite, "not finite"),
        ("adamw", "exp_avg_sq", negative, "negative"),
        ("adamw", "exp_avg_sq", renamed, "exp_avg_sq is missing"),
        ("adamw", "exp_avg", of_no_parameter, "9999/exp_avg is not part of its state"),
        ("adamw8bit", "state1", shorter, r"state1 is \[1\].*expected"),
        ("adamw8bit", "absmax1", shorter, r"absmax1 is \[1\].*expected"),
        ("adamw8bit", "qmap2", shorter, r"qmap2 is \[1\].*expected"),
        ("adamw8bit", "absmax2", not_finite, "not finite"),
        ("adamw8bit", "qmap1", other_dtype, "float64, expected"),
        ("adamw8bit", "state2", renamed, "state2 is missing"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_it_is_used(trained, tmp_path, optimizer, entry, edit, message):
    source, config = trained[optimizer]
    run = tmp_path / "runs/r"
    shutil.copytree(source, run)
    before = (run / "last/model.safetensors").read_bytes()
    names = load_file(run / "last/optimizer.safetensors")
    name = next(n for n in names if n.endswith(f"/{entry}") and names[n].numel() > 1)
    change(run, lambda tensors: edit(tensors, name))
    with pytest.raises(UserError, match=message):
        train_run(config, run, resume=True)
    assert (run / "last/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [-1, 2**40, "1", None, 1.5])
def test_counts_of_steps_are_numbers_of_steps(trained, tmp_path, value):
    source, config = trained["adamw8bit"]
    run = tmp_path / "runs/r"
    shutil.copytree(source, run)
    path = run / "last/state.json"
    state = json.loads(path.read_text())
    for of_parameter in state["optimizer"]["values"].values():
        while not {"step"} & of_parameter.keys():
            of_parameter = next(iter(of_parameter.values()))
        of_parameter["step"] = value
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="expected a number of steps"):
        train_run(config, run, resume=True)


@pytest.mark.parametrize("optimizer", KINDS)
def test_the_settings_of_the_groups_are_those_of_the_configuration(trained, tmp_path, optimizer):
    """An untrusted state.json determines the state of the optimizer, but not its settings."""
    source, config = trained[optimizer]
    runs = [tmp_path / "a/runs/r", tmp_path / "b/runs/r"]
    for run in runs:
        shutil.copytree(source, run)
    path = runs[1] / "last/state.json"
    state = json.loads(path.read_text())
    for group in state["optimizer"]["groups"]:
        group |= {"weight_decay": 1e6, "betas": [0.0, 0.0], "eps": 1e6}
    path.write_text(json.dumps(state))
    for run in runs:
        train_run(config, run, resume=True)
    a, b = (load_file(run / "last/model.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)

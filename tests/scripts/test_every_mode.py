"""Each storage of the backbone on each kind: trained, saved, loaded elsewhere, resumed, merged and exported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import tracknet
from tests.conftest import TINY_DATA, set_hash
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.models.backbone import BackboneConfig
from tracknet.models.pretrained import build_backbone, resolve_source
from tracknet.runs import export
from tracknet.runs.load import load_run
from tracknet.runs.onnx import OnnxModel
from tracknet.scripts import cli
from tracknet.training import trainer

# fp16 runs are loaded on CPUs here, which say what they compute in instead.
pytestmark = pytest.mark.filterwarnings("ignore:.*this CPU computes in")
KINDS = {"vit": "vit_tiny_heatmap", "convnext": "convnext_tiny_heatmap"}
MODES = {
    "default": ("default", []),
    "int8": ("int8", []),
    "int8_full": ("int8_full", []),
    "int8+lora": ("int8", ["training.lora={r: 8}"]),
    "nf4+lora": ("qlora", []),
    "lora": ("default", ["training.lora={r: 8}"]),
}
EACH = [(kind, mode) for kind in KINDS for mode in MODES]
FRAMES = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def settings(rallies, backbones, cache, kind, mode, *more):
    name, overrides = MODES[mode]
    return compose(
        "synthetic",
        KINDS[kind],
        name,
        [
            *TINY_DATA,
            f"data.root={rallies}",
            f"data.cache_dir={cache}",
            f"model.backbone.name={backbones[kind]}",
            "model.decoder.channels=32",
            "training.batch_size=2",
            "training.max_steps=20",
            "training.device=cpu",
            "training.optimizer.lr=3e-3",
            "training.scheduler.warmup_epochs=0",
            *overrides,
            *more,
        ],
    )


@pytest.fixture(scope="module")
def runs(rallies, backbones, tmp_path_factory):
    """Twelve runs of 20 steps, and what each model put out just before it was saved for the last time."""
    folder, cache = tmp_path_factory.mktemp("modes"), tmp_path_factory.mktemp("cache")
    outputs, found, real = {}, {}, trainer.save_checkpoint

    def remember(where, model, *args):
        with torch.no_grad():
            outputs[where.parent] = model.eval()(FRAMES)
        model.train()
        return real(where, model, *args)

    trainer.save_checkpoint = remember
    try:
        for kind, mode in EACH:
            run = folder / kind / mode / "runs" / "r"
            train_run(settings(rallies, backbones, cache, kind, mode), run)
            AcceleratorState._reset_state(reset_partial_state=True)
            found[kind, mode] = run
    finally:
        trainer.save_checkpoint = real
    return {key: (run, outputs[run]) for key, run in found.items()}


def test_a_new_process_computes_the_same_bits(runs, tmp_path):
    """One process loads all of them, runs each twice, and is compared with the processes that trained."""
    save_file({"frames": FRAMES}, tmp_path / "frames.safetensors")
    code = (
        "import sys, torch, tracknet\n"
        "from safetensors.torch import load_file, save_file\n"
        "frames = load_file(sys.argv[1])['frames']\n"
        "found = {}\n"
        "for i, run in enumerate(sys.argv[3:]):\n"
        "    model = tracknet.load(run, 'last', 'cpu')\n"
        "    with torch.no_grad():\n"
        "        for _ in range(3): found[str(i)] = model(frames)\n"
        "save_file(found, sys.argv[2])\n"
    )
    paths = [str(run) for run, _ in runs.values()]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "frames.safetensors"), str(tmp_path / "there.safetensors"), *paths],
        check=True,
        env=os.environ,
    )
    there = load_file(tmp_path / "there.safetensors")
    for i, (key, (_, here)) in enumerate(runs.items()):
        assert torch.equal(here, there[str(i)]), key


@pytest.mark.parametrize(("kind", "mode"), EACH)
def test_what_was_planned_stands_beside_what_was_measured(runs, kind, mode):
    """Within 5 %, on a step that was really taken, optimizer included."""
    metrics = json.loads((runs[kind, mode][0] / "metrics.json").read_text())
    assert metrics["planned_peak_bytes"] == pytest.approx(metrics["peak_bytes"], rel=0.05)
    assert sum(metrics["bytes_by_kind"].values()) == metrics["peak_bytes"] and all(
        v >= 0 for v in metrics["bytes_by_kind"].values()
    )


@pytest.mark.parametrize(("kind", "mode"), EACH)
def test_a_run_keeps_what_was_trained_and_names_the_rest(runs, kind, mode):
    run = runs[kind, mode][0]
    kept = load_file(run / "last/model.safetensors")
    base = json.loads((run / "last/state.json").read_text())["backbone"]["base"]
    model = load_run(run, "last")[1]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("weight_grad_proxy")}
    assert trained <= kept.keys()
    if mode in ("default", "int8_full"):
        assert base is None and kept.keys() == model.state_dict().keys()
    else:
        assert len(base["sha256"]) == 64 and base["revision"] is None
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert not (frozen & kept.keys())


@pytest.mark.parametrize(("kind", "mode"), EACH)
def test_a_run_that_stopped_half_way_ends_with_the_same_bits(runs, rallies, backbones, tmp_path, kind, mode):
    more = ("training.checkpoint_every_steps=10", "training.validate_every_epochs=100")
    whole, cut = tmp_path / "a/runs/r", tmp_path / "b/runs/r"
    config = settings(rallies, backbones, tmp_path / "cache", kind, mode, *more)
    seen = []
    real = trainer.set_learning_rate

    def stop_at_13(*args):
        seen.append(1)
        if len(seen) == 13:
            raise KeyboardInterrupt
        return real(*args)

    train_run(config, whole)
    trainer.set_learning_rate = stop_at_13
    try:
        with pytest.raises(KeyboardInterrupt):
            train_run(config, cut)
    finally:
        trainer.set_learning_rate = real
    train_run(config, cut, resume=True)
    a, b = (load_file(run / "last/model.safetensors") for run in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(("kind", "mode"), EACH)
@torch.no_grad()
def test_merged_computes_the_same_without_bitsandbytes_and_peft(runs, tmp_path, kind, mode):
    run, _ = runs[kind, mode]
    out = tmp_path / "merged"
    assert cli.main(["export", "--run", str(run), "--checkpoint", "last", "--format", "merged", "--out", str(out)]) == 0
    own = load_run(run, "last", ["training.precision=fp32"])[1]
    before = own(FRAMES)
    merged = tracknet.load(out, device="cpu").model
    merged.compute_dtype = torch.float32
    after = merged(FRAMES)
    # Of heatmap values: int8 also rounds the activations, NF4's product is in bf16 where the CPU has it.
    assert (after.sigmoid() - before.sigmoid()).abs().max() < (2e-2 if "int8" in mode or "nf4" in mode else 1e-4)
    assert not any("lora" in n or "scale" in n or "absmax" in n for n in merged.state_dict() if "layer_scale" not in n)
    if "lora" in mode:  # and it is not that adapters hardly matter here
        for name, parameter in own.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert (after - before).norm() < 0.2 * (own(FRAMES) - before).norm()


def test_a_merged_run_loads_where_neither_is_installed(runs, tmp_path):
    run, _ = runs["vit", "nf4+lora"]
    sizes = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        assert cli.main(["export", "--run", str(run), "--format", "merged", "--dtype", dtype, "--out", str(out)]) == 0
        sizes[dtype] = (out / "best/model.safetensors").stat().st_size
    assert sizes["bf16"] < 0.6 * sizes["fp32"]
    code = (
        "import sys\nsys.modules['bitsandbytes'] = sys.modules['peft'] = None\nimport torch, tracknet\nfp32, bf16 ="
        " (tracknet.load(p, device='cpu')(torch.zeros(1, 3, 3, 72, 128, dtype=torch.uint8)) for p in"
        " sys.argv[1:])\nassert (fp32.sigmoid() - bf16.sigmoid()).abs().max() < 0.02\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "fp32"), str(tmp_path / "bf16")], check=True, env=os.environ
    )


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(*e, marks=() if e in (("vit", "nf4+lora"), ("convnext", "int8")) else pytest.mark.slow)
        for e in EACH
    ],
)
def test_onnx_agrees_with_torch_and_predicts(runs, rallies, tmp_path, kind, mode):
    run = tmp_path / "runs/r"
    shutil.copytree(runs[kind, mode][0], run)
    argv = [
        "export",
        "--run",
        str(run),
        "--format",
        "onnx",
        "--out",
        str(run / "onnx"),
        "--json",
        str(tmp_path / "o.json"),
    ]
    assert cli.main(argv) == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["max_heatmap_difference"] < 1e-4 and result["max_displacement_px"] < 0.01
    video = str(next((rallies / "game4").rglob("clip.mp4")))
    predict = [
        "predict",
        "--run",
        str(run),
        video,
        "--no-overlay",
        "evaluation.threshold=0.01",
        "training.precision=fp32",
    ]
    tables = {}
    for engine in ("torch", "onnx"):
        # Three windows a forward: the exported batch is dynamic, and the last one is smaller.
        out = tmp_path / engine
        assert cli.main([*predict, "evaluation.batch_size=3", "--engine", engine, "--out", str(out)]) == 0
        rows = (out / "ball.csv").read_text().splitlines()[1:]
        tables[engine] = [[float(v or "nan") for v in row.split(",")] for row in rows]
    a, b = (torch.tensor(tables[e]) for e in ("torch", "onnx"))
    assert (
        len(a) == 14 and (a[:, -1] - b[:, -1]).abs().max() < 0.02
    )  # confidence; the run's own arithmetic against fp32
    assert cli.main([*predict, "--engine", "onnx", "--checkpoint", "last", "--out", str(tmp_path / "x")]) == 2
    assert cli.main([*predict, "--engine", "onnx", "data.preprocess.resize=[64,40]", "--out", str(tmp_path / "x")]) == 2
    # Another state of the run must not be mixed up with this file.
    tensors = load_file(run / "best/model.safetensors")
    next(iter(tensors.values())).add_(1)
    save_file(tensors, run / "best/model.safetensors")
    assert cli.main([*predict, "--engine", "onnx", "--out", str(tmp_path / "x")]) == 2


def test_an_exported_backbone_is_the_merged_one(runs, tmp_path):
    for mode in ("default", "nf4+lora"):
        out = tmp_path / mode
        run = runs["vit", mode][0]
        assert (
            cli.main(["export", "--run", str(run), "--checkpoint", "last", "--format", "backbone", "--out", str(out)])
            == 0
        )
        exported = build_backbone(BackboneConfig(str(out))).eval()
        x = FRAMES[0]
        own = load_run(run, "last", ["training.precision=fp32"])[1].backbone
        with torch.no_grad():
            a, b = own(x)[-1], exported(x)[-1]
        assert (a - b).norm() < 0.02 * a.norm()


def test_adapters_are_swapped_on_one_base(runs, rallies, backbones, tmp_path):
    """Two runs on the same base: the base's tensors stay where they are in memory."""
    other = tmp_path / "o/runs/r"
    train_run(settings(rallies, backbones, tmp_path / "c", "vit", "nf4+lora", "seed=5"), other)
    out = tmp_path / "adapter"
    assert (
        cli.main(["export", "--run", str(other), "--checkpoint", "last", "--format", "adapter", "--out", str(out)]) == 0
    )
    run, expected = runs["vit", "nf4+lora"]
    model = tracknet.load(run, "last", "cpu")
    codes = {n: t.data_ptr() for n, t in model.model.state_dict().items() if t.dtype == torch.uint8}
    with torch.no_grad():
        assert torch.equal(model(FRAMES), expected)
        tracknet.swap_adapter(model, out)
        assert torch.equal(model(FRAMES), tracknet.load(other, "last", "cpu")(FRAMES))
        assert not torch.equal(model(FRAMES), expected)
        tracknet.swap_adapter(model, run, "last")
        assert torch.equal(model(FRAMES), expected)
    assert codes == {n: t.data_ptr() for n, t in model.model.state_dict().items() if t.dtype == torch.uint8}
    with pytest.raises(UserError, match=r"differs from the loaded model in training\.quantization"):
        tracknet.swap_adapter(model, runs["vit", "int8+lora"][0])
    with pytest.raises(UserError, match="has no base to share"):
        tracknet.swap_adapter(model, runs["vit", "default"][0])
    with pytest.raises(UserError, match="was trained on another base"):
        tracknet.swap_adapter(model, runs["convnext", "nf4+lora"][0])
    with torch.no_grad():
        assert torch.equal(model(FRAMES), expected)


def test_another_base_is_refused_and_a_copy_elsewhere_is_not(runs, backbones, tmp_path):
    run, expected = runs["vit", "nf4+lora"]
    copy, wrong = tmp_path / "copy", tmp_path / "wrong"
    shutil.copytree(backbones["vit"], copy)
    shutil.copytree(backbones["vit"], wrong)
    tensors = load_file(wrong / "model.safetensors")
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    model = load_run(run, "last", [f"model.backbone.name={copy}"])[1]
    with torch.no_grad():
        assert torch.equal(model(FRAMES), expected)
    with pytest.raises(UserError, match=r"contains other weights than the base .*sha256"):
        load_run(run, "last", [f"model.backbone.name={wrong}"])
    with pytest.raises(UserError, match=r"keeps no copy of its frozen base weights.*model\.backbone\.name=<folder>"):
        load_run(run, "last", ["model.backbone.name=/nowhere/at/all"])


def test_a_self_contained_run_needs_no_base(rallies, backbones, tmp_path):
    moved = tmp_path / "backbone"
    shutil.copytree(backbones["vit"], moved)
    config = settings(
        rallies,
        {"vit": moved},
        tmp_path / "c",
        "vit",
        "nf4+lora",
        "training.max_steps=2",
        "training.self_contained=true",
    )
    run = tmp_path / "o/runs/r"
    train_run(config, run)
    with torch.no_grad():
        here = tracknet.load(run, device="cpu")(FRAMES)
        shutil.rmtree(moved)
        assert torch.equal(tracknet.load(run, device="cpu")(FRAMES), here)
    assert cli.main(["export", "--run", str(run), "--format", "adapter", "--out", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lora.lora_alpha=128", "would make another model"),
        ("training.quantization.bnb_4bit_quant_type=fp4", "would make another model"),
    ],
)
def test_loading_changes_nothing_of_the_model(runs, override, words):
    with pytest.raises(UserError, match=words):
        load_run(runs["vit", "nf4+lora"][0], "last", [override])


def test_a_run_that_holds_all_its_weights_takes_no_base(runs):
    with pytest.raises(UserError, match="holds all its weights itself"):
        load_run(runs["vit", "default"][0], "last", ["model.backbone.name=somewhere/else"])


def test_a_published_run_names_the_base_and_not_the_copy(rallies, tmp_path):
    """Trained on the embedded base, loaded from a copy of it: whoever fetches the run has the embedded one only."""
    config = settings(rallies, {"vit": "embedded/vit_tiny"}, tmp_path / "c", "vit", "nf4+lora", "training.max_steps=1")
    run, copy = tmp_path / "o/runs/r", tmp_path / "copy"
    train_run(config, run)
    shutil.copytree(resolve_source("embedded/vit_tiny")[0], copy)
    push = ["push", "--run", str(run), "--repo", "a/b", "--dry-run", str(tmp_path / "p"), f"model.backbone.name={copy}"]
    assert cli.main(push) == 0
    assert "name: embedded/vit_tiny" in (tmp_path / "p/config.yaml").read_text()
    with torch.no_grad():
        assert torch.equal(
            tracknet.load(tmp_path / "p", device="cpu")(FRAMES), tracknet.load(run, device="cpu")(FRAMES)
        )


def test_an_onnx_model_that_computes_something_else_is_not_written(runs, tmp_path, monkeypatch, capsys):
    real = export.compare

    def other(a, b, *rest):
        list(a.head.parameters())[-1].data.add_(0.5)  # after the file was written: the two differ now
        return real(a, b, *rest)

    monkeypatch.setattr(export, "compare", other)
    out = tmp_path / "new" / "onnx"
    assert cli.main(["export", "--run", str(runs["vit", "default"][0]), "--format", "onnx", "--out", str(out)]) == 2
    assert "differs from torch" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape", "truncated"])
def test_a_damaged_run_is_refused(runs, tmp_path, damage):
    run = tmp_path / "r"
    shutil.copytree(runs["convnext", "int8+lora"][0], run)
    path = run / "last/model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "lora_A" in n)
    if damage == "missing":
        del tensors[name]
    elif damage == "surplus":
        tensors["backbone.hf.extra"] = torch.zeros(1)
    elif damage == "shape":
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged, or not the file that was saved"):
        load_run(run, "last")
    # Who changes a file can change its hash as well: what is inside is checked all the same.
    set_hash(run / "last", "model.safetensors")
    with pytest.raises(
        UserError,
        match={
            "missing": "is missing",
            "surplus": "is not part of the model",
            "shape": "expected",
            "truncated": "damaged",
        }[damage],
    ):
        load_run(run, "last")


def test_publishing_writes_a_card_and_no_path_of_this_machine(runs, tmp_path, capsys):
    run, expected = runs["vit", "nf4+lora"]
    push = ["push", "--run", str(run), "--checkpoint", "last", "--repo", "someone/ball", "--license", "apache-2.0"]
    assert cli.main([*push, "--dry-run", str(tmp_path / "no")]) == 2  # its base is a folder that nobody else has
    assert "push with --self-contained" in capsys.readouterr().err and not (tmp_path / "no").exists()
    folder = tmp_path / "published"
    assert cli.main([*push, "--self-contained", "--dry-run", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    progress = json.loads((run / "last/state.json").read_text())["progress"]
    # The scores in a card are those of the weights beside it.
    assert ("F1 (strict)" in card) == (progress["step"] == progress["best_step"])
    assert "license: apache-2.0" in card and "tracknet predict --run someone/ball" in card
    assert "/" not in (folder / "config.yaml").read_text().replace("data/tracknet", "").replace(
        "~/.cache/tracknet/frames", ""
    )
    with torch.no_grad():
        assert torch.equal(tracknet.load(folder, device="cpu")(FRAMES), expected)


def test_a_hub_id_that_cannot_be_had_is_an_error():
    with pytest.raises(
        UserError, match="no-such-owner/no-such-run: no such folder exists, and it cannot be downloaded as a hub id"
    ):
        tracknet.load("no-such-owner/no-such-run")


def test_publishing_without_the_hub_is_an_error(runs, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    push = ["push", "--run", str(runs["vit", "default"][0]), "--repo", "someone/ball"]
    assert cli.main(push) == 2
    assert "someone/ball: cannot be written on the hub" in capsys.readouterr().err


def test_a_damaged_onnx_file_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model\.onnx: onnxruntime cannot load it"):
        OnnxModel(tmp_path / "model.onnx", torch.device("cpu"))

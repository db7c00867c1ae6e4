"""The benchmark command on tiny rallies, and the script that runs it on a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_DATA
from tracknet.api.train import train_run
from tracknet.benchmark.accuracy import AccuracyPlan, measure_accuracy
from tracknet.benchmark.memory import plan_memory
from tracknet.benchmark.report import render_accuracy, render_memory
from tracknet.benchmark.variants import Subject, ingredients, timed
from tracknet.errors import UserError
from tracknet.scripts.benchmark import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def on_tiny(tiny):
    return [o for o in tiny("vit") if not o.startswith("training.max_steps")]


def test_speed_is_measured_by_phase_and_against_a_bare_loop(on_tiny, tmp_path, capsys):
    assert (
        main(
            [
                "--data",
                "synthetic",
                "--model",
                "vit_tiny_heatmap",
                "--modes",
                "default",
                "--what",
                "speed",
                "--rounds",
                "1",
                "--out",
                str(tmp_path / "out"),
                *on_tiny,
            ]
        )
        == 0
    )
    speed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["speed"]
    rows = {row["name"]: row for row in speed["steps"]}
    assert {"default", "lora", "frozen", "frozen, features cached"} < set(rows)
    assert all(
        min(row["seconds"][phase] for phase in ("forward", "backward", "optimizer")) > 0 for row in rows.values()
    )
    assert speed["loop"]["ratio"] > 0.5 and speed["inference"][0]["frames_per_s"] > 0
    assert "bare PyTorch loop" in (tmp_path / "out" / "report.md").read_text()


def test_memory_is_planned_by_ingredient(on_tiny):
    names = ("full fine-tuning", "full, 8-bit optimizer", "LoRA, NF4")
    rows = [v for v in ingredients(Subject("synthetic", "vit_tiny_heatmap", tuple(on_tiny))) if v.name in names]
    full, eight, nf4 = plan_memory(rows, 2 * 10**9)
    assert full["share"] == 1 and eight["bytes_by_kind"]["optimizer"] < full["bytes_by_kind"]["optimizer"]
    assert nf4["share"] < 1 and nf4["fits"] >= full["fits"] > 0
    assert render_memory([full, nf4])[-1].startswith("| LoRA, NF4")


@pytest.mark.slow
def test_everything_is_measured_and_reported(on_tiny, tmp_path, capsys):
    code = main(
        [
            "--data",
            "synthetic",
            "--model",
            "vit_tiny_heatmap",
            "--modes",
            "default",
            "qlora",
            "--rounds",
            "2",
            "--seeds",
            "1",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "out"),
            "--json",
            str(tmp_path / "r.json"),
            *on_tiny,
        ]
    )
    assert code == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (
        last
        == json.loads((tmp_path / "r.json").read_text())
        == json.loads((tmp_path / "out" / "result.json").read_text())
    )
    memory = {row["name"]: row for row in last["memory"]}
    assert memory["qlora.yaml, checkpointing in full"]["peak_bytes"] < memory["full fine-tuning"]["peak_bytes"]
    assert all(sum(row["bytes_by_kind"].values()) == row["peak_bytes"] and row["fits"] > 0 for row in memory.values())
    steps = {row["name"]: row for row in last["speed"]["steps"]}
    for row in steps.values():
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert min(row["seconds"][phase] for phase in ("forward", "backward", "optimizer")) > 0, row["name"]
        whole = 4 * 3 / row["images_per_s"]
        assert sum(row["seconds"].values()) < 3 * whole and sum(row["measured_bytes_by_kind"].values()) > 0
    assert steps["default"]["relative"] == 1.0
    # A step is slower than a large product of the same number of operations, but by less than a thousand times.
    assert all(1e-3 < row["flops_per_s"] / last["speed"]["matrix_flops_per_s"] < 1 for row in steps.values())
    # The planner and the meter agree where both speak of the same step.
    planned = {row["name"]: row["peak_bytes"] for row in last["modes_memory"]}
    measured = sum(steps["default"]["measured_bytes_by_kind"].values())
    assert abs(planned["default"] / measured - 1) < 0.15
    assert last["speed"]["loop"]["ratio"] > 0.5 and len(last["speed"]["loop"]["by_round"]) == 4
    assert {row["name"] for row in last["speed"]["inference"]} == {"default", "qlora"}
    assert [row["name"] for row in last["accuracy"]["rows"]] == ["default", "qlora"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "QLoRA" not in report and "| qlora | " in report and "Not measured here" in report
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 5000 for name in ("memory", "speed", "accuracy"))


def test_ingredients_and_controls_are_what_they_are_called(on_tiny):
    subject = Subject("synthetic", "vit_tiny_heatmap", tuple(on_tiny))
    rows = {v.name: v.config for v in ingredients(subject)}
    assert len(rows) == len(ingredients(subject)), "names differ"
    plain = rows["full fine-tuning"].training
    assert (plain.quantization, plain.lora, plain.memory_optimization.checkpointing) == (None, None, "none")
    assert rows["LoRA, 16 bit"].training.quantization is None and rows["LoRA, 16 bit"].training.lora.enabled
    assert (
        rows["frozen backbone, NF4"].training.quantization.load_in_4bit
        and rows["frozen backbone, NF4"].training.trainable == "nothing"
    )
    assert {c.training.batch_size for c in rows.values()} == {4} and {c.training.precision for c in rows.values()} == {
        "bf16"
    }
    names = [v.name for v in timed(subject, ["default", "int8"], True)]
    assert "default, checkpointing in full" in names and "int8, no checkpointing, compiled" in names
    fused = [v for v in timed(subject, ["default", "int8"], False, fused=True) if "checkpointing, " in v.name]
    assert [v.config.training.int8_kernel for v in fused] == ["triton", "bitsandbytes"]


def test_what_would_make_all_modes_alike_is_refused(on_tiny):
    with pytest.raises(UserError, match="the modes differ in this key"):
        Subject("synthetic", "vit_tiny_heatmap", (*on_tiny, "training.lora.r=4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "int9"], "int9"),
        (["--rounds", "0"], "must be at least 1"),
        (["--gpu-memory", "lots"], "not a size"),
        (["--what", "speed", "training.batch_size=400"], "not one whole batch"),
        (["--what", "pace"], "pace"),
        (["--int8-kernels", "training.device=cpu"], "--int8-kernels times kernels for a GPU"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_nothing(on_tiny, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["--data", "synthetic", "--model", "vit_tiny_heatmap", *on_tiny, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "outputs").exists()


def test_a_baseline_without_backbone_is_measured_alone(on_tiny, tmp_path, capsys):
    overrides = [o for o in on_tiny if not o.startswith("model.")]
    assert (
        main(
            [
                "--data",
                "synthetic",
                "--model",
                "wasb_hrnet",
                "--what",
                "memory",
                "--out",
                str(tmp_path / "o"),
                *overrides,
            ]
        )
        == 0
    )
    assert [row["name"] for row in json.loads(capsys.readouterr().out.strip().splitlines()[-1])["memory"]] == [
        "default"
    ]


def test_the_gpu_script_is_sound_without_one(tmp_path):
    """Every later change keeps it running: a GPU is rare, and no time on one is lost to an import that moved."""
    script = [sys.executable, str(ROOT / "benchmarks/gpu.py")]
    done = subprocess.run(
        [*script, "--device", "cpu", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["machine", "step", "step", "infer", "end"]
    assert rows[1]["relative"] == 1 and rows[2]["planned_mb"] > 0 and rows[3]["frames_per_s"] > 0
    listed = subprocess.run([*script, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert {"tests", "steps:small", "kernels", "parity", "oom", "infer", "offload", "compile", "accuracy"} < set(listed)
    wrong = subprocess.run([*script, "--only", "stps"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "--only stps: the sections are steps:small" in wrong.stderr


def test_learning_rates_are_searched_and_an_interrupted_comparison_continues(on_tiny, tmp_path, monkeypatch):
    subject = Subject("synthetic", "vit_tiny_heatmap", tuple(on_tiny))
    plan = AccuracyPlan(seeds=2, steps=2, lr_scales=(0.5, 3.0))
    trained = []

    def train(config, run):
        trained.append((run.name, config.training.optimizer.lr))
        result = train_run(config, run)
        # The second factor looks better on the validation split.
        result["val_f1_strict"] = 0.9 if "lr3" in run.name else 0.1
        (run / "metrics.json").write_text(json.dumps(result))
        return result

    (row,) = measure_accuracy(subject, ["qlora"], plan, train, tmp_path)
    lr = subject.compose("qlora").training.optimizer.lr
    assert trained == [("qlora-lr0.5-0", lr * 0.5), ("qlora-lr3-0", lr * 3), ("qlora-lr3-1", lr * 3)]
    assert (
        row["lr"] == lr * 3 and row["val_f1_by_lr"] == [[lr * 0.5, 0.1], [lr * 3, 0.9]] and len(row["f1_by_seed"]) == 2
    )
    assert "(searched)" in render_accuracy([row])[-1]

    # Without the last run, only that one is trained again; a run of other settings is refused.
    trained.clear()
    shutil.rmtree(tmp_path / "runs" / "qlora-lr3-1")
    assert measure_accuracy(subject, ["qlora"], plan, train, tmp_path) == [row]
    assert trained == [("qlora-lr3-1", lr * 3)]
    other = Subject("synthetic", "vit_tiny_heatmap", (*on_tiny, "training.loss.radius=3"))
    with pytest.raises(UserError, match="was trained with other settings: give another folder"):
        measure_accuracy(other, ["qlora"], plan, train, tmp_path)


def test_a_comparison_of_a_model_without_backbone_continues_too(rallies, tmp_path):
    data = [o for o in TINY_DATA if not o.startswith("data.preprocess")]
    overrides = (*data, f"data.root={rallies}", "data.preprocess.resize=[64,40]", "training.batch_size=4")
    subject = Subject("synthetic", "wasb_hrnet", (*overrides, "training.device=cpu"))
    trained = []

    def train(config, run):
        trained.append(run.name)
        return train_run(config, run)

    rows = [measure_accuracy(subject, ["default"], AccuracyPlan(1, 1), train, tmp_path) for _ in range(2)]
    assert rows[0] == rows[1] and trained == ["default-lr1-0"]


def test_modes_as_shipped_are_timed_alone(on_tiny, tmp_path, capsys):
    options = [
        "--what",
        "speed",
        "--as-shipped",
        "--rounds",
        "1",
        "--modes",
        "default",
        "qlora",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["--data", "synthetic", "--model", "vit_tiny_heatmap", *options, *on_tiny]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["name"]: row for row in result["speed"]["steps"]}
    assert set(rows) == {"default", "qlora"} and result["speed"]["loop"] is None and not result["speed"]["inference"]
    # The budget of qlora.yaml takes smaller micro-batches, as in training, and the plan of the memory table agrees.
    planned = {row["name"]: row for row in result["modes_memory"]}
    assert rows["default"]["micro_batch_size"] == 4 > rows["qlora"]["micro_batch_size"]
    assert planned["qlora"]["micro_batch_size"] <= 4 and planned["default"]["gradient_checkpointing"] == "none"


@pytest.mark.parametrize("scales", [["1", "1"], ["0"], ["-1"], ["nan"]])
def test_factors_that_are_no_search_are_refused(on_tiny, scales, capsys):
    assert main(["--data", "synthetic", "--model", "vit_tiny_heatmap", "--lr-scales", *scales, *on_tiny]) == 2
    assert "give different positive factors" in capsys.readouterr().err

"""The planner counts what a real step takes."""

import json
from dataclasses import replace

import cv2
import pytest
import torch

from tests.quantization.test_apply import NAMES
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.models.heatmap_model import build_model
from tracknet.planning.estimate import estimate_memory, usable_bytes
from tracknet.planning.planner import Planner
from tracknet.planning.step_plan import plan_step
from tracknet.quantization.apply import apply_mode
from tracknet.scripts import cli
from tracknet.scripts.command_line import parse_size
from tracknet.training.losses import heatmap_loss
from tracknet.training.optimizer import build_optimizer

CPU = torch.device("cpu")
CASES = [
    (kind, mode, level)
    for kind in NAMES
    for mode in ("default", "int8", "int8_full", "qlora")
    for level in ("none", "blocks", "full")
]


@pytest.mark.parametrize(("kind", "mode", "level"), CASES)
def test_the_plan_is_within_five_percent_of_a_real_step(backbones, kind, mode, level):
    """Weights, gradients, optimizer state and the peak of forward and backward, against tensors that really exist."""
    config = compose(
        "synthetic",
        f"{kind}_tiny_heatmap",
        mode,
        [
            f"model.backbone.name={backbones[kind]}",
            "data.preprocess.resize=[128,72]",
            "training.precision=bf16",
            f"training.memory_optimization.gradient_checkpointing={level}",
            *(["training.quantization.llm_int8_threshold=0"] if "int8" in mode else []),
        ],
    )
    planned = estimate_memory(config.model, config.training, 3, (128, 72))
    model = build_model(config.model, 3)
    training = config.training
    apply_mode(model, replace(training.mode, precision="fp32"), CPU)
    model.compute_dtype = torch.bfloat16
    for module in model.backbone.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    if level != "none":
        checkpoint_(model, level)
    model.train()
    windows = 4
    batch = {
        "frames": torch.randint(0, 256, (windows, 3, 3, 72, 128), dtype=torch.uint8),
        "xy": torch.rand(windows, 3, 2) * 70,
        "visible": torch.ones(windows, 3, dtype=torch.bool),
        "weight": torch.ones(windows, 3),
    }
    loss = heatmap_loss(model(batch["frames"]), batch, training.loss)
    loss.backward()
    optimizer = build_optimizer(model, training.optimizer, CPU)
    optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    del loss
    with LiveBytes([*batch.values(), *model.parameters(), *model.buffers(), *grads]) as meter:
        (heatmap_loss(model(batch["frames"]), batch, training.loss) / 1.0).backward()
    own = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    state = [
        t
        for s in optimizer.state.values()
        for k, t in s.items()
        if isinstance(t, torch.Tensor) and k.startswith(("exp_", "state", "absmax"))
    ]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    measured = sum(own.values()) + size(grads) + size(state) + meter.peak + size(batch.values())
    assert planned.peak_bytes(windows) == pytest.approx(measured, rel=0.05)
    assert planned.gradients == pytest.approx(size(grads), rel=0.01)  # ConvNeXt's last norm is not used
    assert planned.optimizer == pytest.approx(size(state), rel=0.02)
    assert planned.weights + planned.trained_weights == pytest.approx(sum(own.values()), rel=0.02)


def test_the_shipped_modes_meet_the_memory_targets():
    """At 512x288, three frames, batch 16: int8 within a half, QLoRA within a quarter of full fine-tuning."""
    peaks = {}
    for mode in ("default", "int8", "qlora"):
        config = compose("tracknet", "vit_heatmap", mode)
        peaks[mode] = plan_step(Planner(config.model, config.training, 3, (512, 288)), 16).peak_bytes
    assert peaks["int8"] <= 0.5 * peaks["default"] and peaks["qlora"] <= 0.25 * peaks["default"]


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_without_a_byte_of_them():
    config = compose(
        "tracknet", "vit_heatmap", "qlora", ["model.backbone.name=facebook/dinov3-vit7b16-pretrain-lvd1689m"]
    )
    estimate = Planner(config.model, config.training, 3, (512, 288)).at("full").estimate
    assert 3e9 < estimate.weights < 5e9  # half a byte each
    assert estimate.largest_micro_batch(usable_bytes(80 * 10**9), 1) == 1
    assert estimate.largest_micro_batch(usable_bytes(4 * 10**9), 1) == 0


def test_the_command_prints_draws_and_writes(tmp_path, capsys):
    argv = [
        "plan",
        "--data",
        "synthetic",
        "--model",
        "vit_tiny_heatmap",
        "--training",
        "qlora",
        "--gpu-memory",
        "0.63GB",
        "training.batch_size=64",
        "data.preprocess.resize=[64,40]",
        "--json",
        str(tmp_path / "p.json"),
        "--out",
        str(tmp_path / "p.png"),
    ]
    assert cli.main(argv) == 0
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["peak_bytes"] == sum(plan["bytes_by_kind"].values()) and 0 < plan["largest_micro_batch"] < 64
    assert "To fit more windows:" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "p.png")).std() > 5


@pytest.mark.parametrize("text", ["8GB", "7.5GiB", "800 MB"])
def test_sizes_are_read(text):
    assert parse_size(text) > 0


@pytest.mark.parametrize("text", ["8", "8TB", "GB", "-1GB", "0GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_size(text)

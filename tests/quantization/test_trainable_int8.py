"""int8 weights that train: the rounding is right on average, the state is codes, and it learns."""

import pytest
import torch
from torch import nn

from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.inference.load import load_run
from tracknet.quantization.trainable_int8 import (
    TrainableInt8Linear,
    int8_layers,
    round_stochastically,
)
from tracknet.scripts.training_run import train
from tracknet.training.bnb_optimizers import AdamW8bit

INT8_FULL = ["training.optimizer.lr=1e-2", "training.optimizer.backbone_lr_scale=1.0"]


def test_rounding_is_right_on_average_and_to_a_neighbour():
    x = torch.tensor([-3.75, -0.25, 0.0, 0.5, 7.1, 126.9]).repeat(20_000, 1)
    codes = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert ((codes == x.floor()) | (codes == x.floor() + 1)).all()
    # The standard error of a mean of 20,000 coins is at most 0.0036.
    assert (codes.mean(dim=0) - x[0]).abs().max() < 0.015
    nearest = x.round().mean(dim=0)
    assert (nearest - x[0]).abs().max() > 0.2  # what rounding to nearest would be off by


def test_steps_below_half_a_code_are_taken_on_average():
    """A hundred small equal steps move the weight by their sum; rounded to nearest, none would move it at all."""
    torch.manual_seed(0)
    layer = TrainableInt8Linear(nn.Linear(256, 64, bias=False), 0.0)
    before = layer.dequantize()
    step = float(layer.scale.mean()) / 127 * 0.05
    generator = torch.Generator().manual_seed(1)
    inner = before.abs() < 0.8 * layer.scale[:, None]
    for _ in range(100):
        weight = layer.dequantize()
        weight[inner] += step
        layer.store_(weight, generator)
    moved = (layer.dequantize() - before)[inner].mean().item()
    assert moved == pytest.approx(100 * step, rel=0.1)


def test_the_gradient_is_that_of_the_dequantised_weight_and_its_place_costs_nothing():
    torch.manual_seed(0)
    layer = TrainableInt8Linear(nn.Linear(64, 48), 0.0)
    assert layer.gradient_of.untyped_storage().nbytes() == 4
    x, g = torch.randn(6, 64), torch.randn(6, 48)
    layer(x).backward(g)
    assert torch.allclose(layer.gradient_of.grad, g.T @ x, atol=1e-5)
    assert layer.to(torch.device("cpu")).gradient_of.untyped_storage().nbytes() == 4
    assert sorted(layer.state_dict()) == ["bias", "scale", "weight"]


def test_a_layer_fits_a_target_with_codes_only():
    """Regression onto another layer: the loss falls by far more than the codes' own rounding leaves."""
    torch.manual_seed(0)
    target, layer = nn.Linear(128, 64), TrainableInt8Linear(nn.Linear(128, 64), 0.0)
    optimizer = AdamW8bit(layer.parameters(), lr=3e-3)
    optimizer.layers, optimizer.seed = int8_layers(layer), 0
    losses = []
    for _ in range(300):
        x = torch.randn(64, 128)
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert layer.weight.dtype == torch.int8
    assert sum(losses[-20:]) < 0.05 * sum(losses[:20])
    assert layer.dequantize().sub(target.weight).norm() < 0.3 * target.weight.norm()


def test_a_run_trains_saves_and_resumes_its_codes(tiny, tmp_path):
    overrides = [*tiny("vit"), *INT8_FULL, "training.checkpoint_every_steps=2"]
    whole = compose("synthetic", "vit_tiny_heatmap", "int8_full", [*overrides, "training.max_steps=6",
                    "training.scheduler.name=constant", "training.scheduler.warmup_epochs=0"])  # fmt: skip
    train(whole, tmp_path / "a/runs/r")
    states = []
    for steps in (3, 6):
        config = compose("synthetic", "vit_tiny_heatmap", "int8_full", [*overrides, f"training.max_steps={steps}",
                         "training.scheduler.name=constant", "training.scheduler.warmup_epochs=0"])  # fmt: skip
        train(config, tmp_path / "b/runs/r", resume=steps == 6)
        states.append(load_run(tmp_path / "b/runs/r", "last")[1].state_dict())
    codes = [n for n, t in states[0].items() if t.dtype == torch.int8]
    assert codes and any(not torch.equal(states[0][n], states[1][n]) for n in codes)
    final = load_run(tmp_path / "a/runs/r", "last")[1].state_dict()
    assert all(torch.equal(final[n], states[1][n]) for n in final)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optimizer.name=adamw", "int8_trainable=true needs an optimizer.*adamw8bit"),
        ("training.lora={r: 4}", "trains the weights that training.lora freezes"),
        ("training.backbone_trains=norms", "trains every weight"),
        ("model.backbone.freeze=true", "model.backbone.freeze=true and .*int8_trainable=true contradict"),
        ("training.quantization.load_in_8bit=false", "int8_trainable|neither"),
    ],
)
def test_what_contradicts_it_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        compose("synthetic", "vit_tiny_heatmap", "int8_full", [override])


@pytest.mark.gpu
def test_it_learns_on_cuda():
    torch.manual_seed(0)
    target, layer = nn.Linear(128, 64).cuda(), TrainableInt8Linear(nn.Linear(128, 64), 6.0).cuda()
    optimizer = AdamW8bit(layer.parameters(), lr=3e-3)
    optimizer.layers, optimizer.seed = int8_layers(layer), 0
    losses = []
    for _ in range(300):
        x = torch.randn(64, 128, device="cuda")
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.05 * sum(losses[:20])

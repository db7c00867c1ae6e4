"""int8 weights that train: the rounding is right on average, the state is codes, and it learns."""

import pytest
import torch
from torch import nn

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.quantization.trainable_int8 import (
    TrainableInt8Linear,
    int8_layers,
    round_stochastically,
)
from tracknet.runs.load import load_run
from tracknet.training.bnb_optimizers import AdamW8bit

INT8_FULL = ["training.optimizer.lr=1e-2", "training.optimizer.backbone_lr_scale=1.0"]


def test_rounding_is_right_on_average_and_to_a_neighbor():
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


def test_the_gradient_is_that_of_the_dequantized_weight_and_its_place_costs_nothing():
    torch.manual_seed(0)
    layer = TrainableInt8Linear(nn.Linear(64, 48), 0.0)
    assert layer.weight_grad_proxy.untyped_storage().nbytes() == 4
    x, g = torch.randn(6, 64), torch.randn(6, 48)
    layer(x).backward(g)
    assert torch.allclose(layer.weight_grad_proxy.grad, g.T @ x, atol=1e-5)
    assert layer.to(torch.device("cpu")).weight_grad_proxy.untyped_storage().nbytes() == 4
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
    whole = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "int8_full",
        [*overrides, "training.max_steps=6", "training.scheduler.name=constant", "training.scheduler.warmup_epochs=0"],
    )
    train_run(whole, tmp_path / "a/runs/r")
    states = []
    for steps in (3, 6):
        config = compose(
            "synthetic",
            "vit_tiny_heatmap",
            "int8_full",
            [
                *overrides,
                f"training.max_steps={steps}",
                "training.scheduler.name=constant",
                "training.scheduler.warmup_epochs=0",
            ],
        )
        train_run(config, tmp_path / "b/runs/r", resume=steps == 6)
        states.append(load_run(tmp_path / "b/runs/r", "last")[1].state_dict())
    codes = [n for n, t in states[0].items() if t.dtype == torch.int8]
    assert codes and any(not torch.equal(states[0][n], states[1][n]) for n in codes)
    final = load_run(tmp_path / "a/runs/r", "last")[1].state_dict()
    assert all(torch.equal(final[n], states[1][n]) for n in final)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optimizer.name=adamw", "int8_trainable=true requires an optimizer.*adamw8bit"),
        ("training.lora={r: 4}", "trains the weights that training.lora freezes"),
        ("training.trainable=norms", "trains every weight"),
        ("model.backbone.freeze=true", "model.backbone.freeze=true and .*int8_trainable=true contradict"),
        ("training.quantization.load_in_8bit=false", "int8_trainable|neither"),
    ],
)
def test_what_contradicts_it_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        compose("synthetic", "vit_tiny_heatmap", "int8_full", [override])


def stepped(seed=0, steps=1, layers=1, lr=1e-3):
    """Layers of one value of gradient after steps of AdamW8bit, and what they were before."""
    torch.manual_seed(0)
    made = [TrainableInt8Linear(nn.Linear(64, 16, bias=False), 0.0) for _ in range(layers)]
    for layer in made[1:]:
        layer.load_state_dict(made[0].state_dict())
    before = made[0].dequantize()
    optimizer = AdamW8bit([layer.weight_grad_proxy for layer in made], lr=lr, weight_decay=0.0)
    optimizer.layers, optimizer.seed = int8_layers(nn.ModuleList(made)), seed
    for _ in range(steps):
        for layer in made:
            layer.weight_grad_proxy.grad = torch.ones(16, 64)
        optimizer.step()
    return [layer.dequantize() for layer in made], before, made[0]


def test_every_step_rounds_anew():
    """A weight that was rounded down is not rounded down for ever: 40 steps of a tenth of a code move nearly all."""
    _, _, layer = stepped()
    tenth = 0.1 * layer.scale.mean().item() / 127
    (after,), before, layer = stepped(steps=40, lr=tenth)
    codes = (before - after) / (layer.scale / 127)[:, None]
    inner = before.abs() < 0.8 * layer.scale[:, None]
    # With one draw for all steps a tenth of the weights would have moved, ten times as far.
    assert (codes[inner] > 0.5).float().mean() > 0.9
    assert codes[inner].mean() == pytest.approx(4, rel=0.15) and codes[inner].std() < 3


def test_rounding_repeats_with_the_seed_and_differs_by_seed_and_layer():
    (a, other_layer), _, _ = stepped(seed=1, layers=2)
    assert torch.equal(a, stepped(seed=1, layers=2)[0][0])
    assert not torch.equal(a, stepped(seed=2, layers=2)[0][0]) and not torch.equal(a, other_layer)


def test_rounding_differs_by_group():
    layers = [TrainableInt8Linear(nn.Linear(64, 16, bias=False), 0.0) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizer = AdamW8bit([{"params": [layer.weight_grad_proxy]} for layer in layers], lr=1e-3)
    optimizer.layers = int8_layers(nn.ModuleList(layers))
    for layer in layers:
        layer.weight_grad_proxy.grad = torch.ones(16, 64)
    optimizer.step()
    assert not torch.equal(layers[0].weight, layers[1].weight)


def test_what_is_stored_is_within_a_code_of_what_was_given():
    torch.manual_seed(0)
    layer = TrainableInt8Linear(nn.Linear(64, 16), 0.0)
    weight = torch.randn(16, 64)
    weight[3] = 0.0  # a row of zeros has no magnitude to divide by
    layer.store_(weight, torch.Generator().manual_seed(0))
    assert torch.equal(layer.scale, weight.abs().amax(dim=1))
    assert ((layer.dequantize() - weight).abs() <= 1.001 * layer.scale[:, None] / 127).all()
    assert layer.weight.abs().amax(dim=1).tolist() == [127, 127, 127, 0, *[127] * 12]


def test_rounding_stays_within_127_codes():
    x = torch.tensor([-127.9, -127.0, 127.0, 127.9]).repeat(100, 1)
    codes = round_stochastically(x, torch.Generator().manual_seed(0))
    assert codes.dtype == torch.int8 and codes.min() == -127 and codes.max() == 127


def test_a_failure_while_codes_are_written_leaves_the_layer_as_it_was():
    layer = TrainableInt8Linear(nn.Linear(64, 16), 0.0)
    before = layer.dequantize()

    class Interrupting(torch.overrides.TorchFunctionMode):
        """Stops at the second copy into place, which is that of the codes."""

        copies = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                self.copies += 1
                if self.copies == 2:
                    raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with pytest.raises(KeyboardInterrupt), Interrupting():
        layer.store_(torch.randn(16, 64), torch.Generator())
    assert torch.equal(layer.dequantize(), before)


def test_parameters_that_are_no_codes_are_stepped_as_ever():
    torch.manual_seed(0)
    layer, plain = TrainableInt8Linear(nn.Linear(64, 16), 0.0), nn.Linear(64, 16)
    plain.bias.data.copy_(layer.bias.data)
    optimizers = [AdamW8bit(module.parameters(), lr=1e-2) for module in (layer, plain)]
    optimizers[0].layers = int8_layers(layer)
    x = torch.randn(6, 64)
    for module, optimizer in zip((layer, plain), optimizers):
        module(x).sum().backward()
        optimizer.step()
    assert torch.allclose(layer.bias, plain.bias) and layer.bias.dtype == torch.float32
    assert layer.weight_grad_proxy.untyped_storage().nbytes() == 4  # the place is a place again


def test_places_of_gradients_are_found_in_the_whole_model_and_survive_being_moved():
    model = nn.Sequential(TrainableInt8Linear(nn.Linear(8, 8), 0.0), nn.Linear(8, 8))
    assert int8_layers(model) == {model[0].weight_grad_proxy: model[0]}
    assert model[0].weight_grad_proxy.shape == (8, 8)
    for trains in (False, True):
        model[0].weight_grad_proxy.requires_grad_(trains)
        model.to(torch.float32)
        assert model[0].weight_grad_proxy.requires_grad is trains
    assert "weight_grad_proxy" in dict(model[0].named_parameters())


def test_a_state_without_the_place_loads_strictly_and_one_without_codes_does_not():
    one, two = (nn.Sequential(TrainableInt8Linear(nn.Linear(8, 8), 0.0)) for _ in range(2))
    state = one.state_dict()
    assert sorted(state) == ["0.bias", "0.scale", "0.weight"]
    two.load_state_dict(state, strict=True)
    assert torch.equal(two[0].dequantize(), one[0].dequantize()) and two[0].weight_grad_proxy.shape == (8, 8)
    del state["0.scale"]
    with pytest.raises(RuntimeError, match="0.scale"):
        two.load_state_dict(state, strict=True)


def test_threshold_and_kernel_reach_the_product():
    layer = TrainableInt8Linear(nn.Linear(64, 48), 6.0, "triton")
    assert (layer.threshold, layer.kernel, layer.has_fp16_weight) == (6.0, "triton", False)
    x = torch.randn(32, 64)
    x[:, 7] *= 600
    wanted = x @ layer.dequantize().T + layer.bias
    assert (layer(x) - wanted).norm() < 0.01 * wanted.norm()
    assert (TrainableInt8Linear(nn.Linear(8, 8), 0.0).kernel) == "bitsandbytes"


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

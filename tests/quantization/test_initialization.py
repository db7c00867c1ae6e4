"""Starts of adapters that depend on quantized weights or on data: LoftQ and EVA; and the learning rates of LoRA+."""

from dataclasses import replace

import pytest
import torch

from tests.quantization.test_apply import INT8, NF4, build
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.quantization.adapters import LoraConfig, adapted_layers
from tracknet.quantization.adapters.initialization import start_from_inputs_
from tracknet.training.optimizer import OptimizerConfig, build_optimizer

LOFTQ = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, init_lora_weights="loftq")
FRAMES = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantization", [INT8, NF4])
def test_loftq_starts_from_the_best_update_of_its_rank(backbones, quantization):
    """By the theorem of Eckart and Young, of all updates of a rank it leaves the smallest residual."""
    full = build(backbones, "vit").backbone.hf
    model = build(backbones, "vit", quantization, LOFTQ)
    plain = build(backbones, "vit", quantization, replace(LOFTQ, init_lora_weights=True))
    for name, layer in adapted_layers(model.backbone.hf).items():
        weight = full.get_submodule(name).weight
        residual = weight - layer.base_layer.dequantize()
        left = (residual - layer.get_delta_weight("default")).norm()
        assert torch.isclose(left, torch.linalg.svdvals(residual)[8:].norm(), rtol=1e-3) and left < residual.norm()
        # The codes are those of the weight itself, so the run can refer to its base.
        assert torch.equal(layer.base_layer.weight, plain.backbone.hf.get_submodule(name).base_layer.weight)
    assert model.backbone.base == plain.backbone.base


def test_loftq_brings_the_output_closer_to_the_full_precision_one(backbones):
    outputs = [
        build(backbones, "vit", *mode).eval().backbone(FRAMES[0])[-1]
        for mode in ((None, None), (NF4, LOFTQ), (NF4, replace(LOFTQ, init_lora_weights=True)))
    ]
    exact, loftq, plain = (output.detach() for output in outputs)
    assert (loftq - exact).norm() < 0.8 * (plain - exact).norm()


def test_eva_starts_from_the_main_directions_of_the_inputs_and_changes_no_output(backbones):
    lora = replace(LOFTQ, init_lora_weights="eva", rank_pattern={"fc2": 3})
    model = build(backbones, "vit", NF4, lora)
    before = model.eval()(FRAMES).detach()
    inputs = {}
    for name, layer in adapted_layers(model.backbone.hf).items():
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: inputs.setdefault(name, []).append(args[0].detach())
        )
    start_from_inputs_(model, [FRAMES[:1], FRAMES[1:]])
    for name, layer in adapted_layers(model.backbone.hf).items():
        a, rows = layer.lora_A["default"].weight, torch.cat([x.flatten(0, -2) for x in inputs[name]]).float()
        assert len(a) == (3 if name.endswith("fc2") else 8)
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)
        kept = (rows @ a.T).norm() ** 2
        assert torch.isclose(kept, torch.linalg.svdvals(rows)[: len(a)].norm() ** 2, rtol=1e-3)
    assert torch.equal(model(FRAMES), before) and not model.training


def test_runs_with_these_starts_are_trained_and_loaded(tiny, tmp_path):
    for start in ("eva", "loftq"):
        config = compose(
            "synthetic", "vit_tiny_heatmap", "qlora", [*tiny("vit"), f"training.lora.init_lora_weights={start}"]
        )
        assert train_run(config, tmp_path / start / "runs" / "r")["steps"] == 3


@pytest.mark.parametrize(
    ("mode", "overrides", "message"),
    [
        ("lora", ["training.lora.init_lora_weights=loftq"], "loftq starts from what quantization rounds away"),
        (
            "qlora",
            ["training.lora.init_lora_weights=loftq", "training.lora.use_dora=true"],
            "magnitudes of the weights",
        ),
        (
            "qlora",
            ["training.lora.init_lora_weights=eva", "training.memory_optimization.use_disk_offload=true"],
            "eva runs the backbone before training",
        ),
        ("default", ["training.optimizer.lora_plus_lr_ratio=16"], "but no LoRA adapters train"),
        ("int8", ["training.optimizer.lora_plus_lr_ratio=16"], "but no LoRA adapters train"),
    ],
)
def test_starts_that_cannot_be_are_refused(tiny, mode, overrides, message):
    with pytest.raises(UserError, match=message):
        compose("synthetic", "vit_tiny_heatmap", mode, [*tiny("vit"), *overrides])


@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_more_directions_than_a_layer_has_are_refused(backbones, start):
    with pytest.raises(UserError, match=f"init_lora_weights={start} takes r directions of the layer, but .* has 32 of"):
        build(backbones, "vit", NF4, replace(LOFTQ, init_lora_weights=start, r=33))


def test_layers_without_an_adapter_are_not_factorized(backbones, monkeypatch):
    svds, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: svds.append(1) or svd(*args, **kwargs))
    build(backbones, "vit", NF4, LOFTQ, "auto", 1)
    assert len(svds) == 6, "of the last block only"


def test_lora_plus_gives_b_a_rate_of_its_own(backbones):
    model = build(backbones, "vit", NF4, LoraConfig(r=4))
    names = {id(p): n for n, p in model.named_parameters()}

    def rates(ratio):
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, lora_plus_lr_ratio=ratio), torch.device("cpu"))
        return {names[id(p)]: g["base_lr"] for g in optimizer.param_groups for p in g["params"]}, optimizer

    plain, plus = rates(1.0)[0], rates(16.0)[0]
    assert plain.keys() == plus.keys() and {n for n in plus if plus[n] != plain[n]} == {
        n for n in plus if "lora_B" in n
    }
    assert all(plus[n] == 16 * plain[n] for n in plus if "lora_B" in n)
    # Without it, the groups are those of older checkpoints.
    assert len(rates(1.0)[1].param_groups) == len(rates(16.0)[1].param_groups) - 1

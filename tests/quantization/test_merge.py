"""Merging leaves plain layers that compute the same, biases and all, and that nothing trains any more."""

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import INT8, NF4, build
from tests.quantization.test_lora import PLAIN, stir
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.quantization.adapters import adapted_layers
from tracknet.quantization.merge import _plain, merge_
from tracknet.quantization.nf4 import Linear4bit


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["plain", "int8", "nf4"])
@torch.no_grad()
def test_a_merged_layer_has_the_sum_of_weight_and_adapter_and_the_bias_of_before(backbones, quantization):
    model = stir(build(backbones, "vit", quantization, PLAIN))
    wanted = {}
    for name, layer in adapted_layers(model.backbone.hf).items():
        base = layer.get_base_layer()
        nn.init.normal_(base.bias)  # begins as zeros, of which none would be missed
        weight = base.weight if quantization is None else base.dequantize()
        wanted[name] = (weight + layer.get_delta_weight("default"), base.bias.clone())
    merge_(model)
    assert wanted and not adapted_layers(model)
    for name, (weight, bias) in wanted.items():
        merged = model.backbone.hf.get_submodule(name)
        assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
        assert torch.allclose(merged.weight, weight, atol=1e-6) and torch.equal(merged.bias, bias)
        assert merged(torch.ones(merged.in_features)).shape == (merged.out_features,)


def test_without_adapters_layers_take_their_dequantized_weight(backbones):
    model = build(backbones, "vit", NF4)
    weights = {n: m.dequantize() for n, m in model.backbone.hf.named_modules() if isinstance(m, Linear4bit)}
    state = torch.get_rng_state()
    merge_(model)
    assert weights and all(torch.equal(model.backbone.hf.get_submodule(n).weight, w) for n, w in weights.items())
    assert torch.equal(torch.get_rng_state(), state)  # no layer was drawn only to be overwritten


def test_a_merged_backbone_is_frozen_evaluates_and_names_no_base(backbones):
    model = build(backbones, "vit", INT8, PLAIN).train()
    assert model.backbone.base is not None
    assert merge_(model) is model and not model.training
    assert model.backbone.base is None
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.head.parameters())


def test_adapters_that_diverged_are_not_merged(backbones):
    model = build(backbones, "vit", None, PLAIN)
    nn.init.constant_(next(p for n, p in model.named_parameters() if "lora_B" in n), torch.inf)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_(model)


def test_a_model_without_a_backbone_has_nothing_to_merge():
    model = build_model(ModelConfig("tracknet_v2", None), 3)
    assert merge_(model) is model


@pytest.mark.parametrize("bias", [True, False])
def test_a_dequantized_layer_is_frozen_and_has_a_bias_where_it_had_one(bias):
    linear = nn.Linear(64, 48, bias=bias)
    plain = _plain(Linear4bit(linear, "nf4", torch.float32, True))
    assert not plain.weight.requires_grad and plain.weight.shape == (48, 64) and plain.bias is linear.bias

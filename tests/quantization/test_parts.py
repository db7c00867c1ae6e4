"""The table that a run begins with, row by row."""

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import INT8, NF4, build
from tests.quantization.test_lora import PLAIN
from tracknet.quantization.apply import QuantizationConfig
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.nf4 import Linear4bit
from tracknet.quantization.parts import Part, describe_parts

LAYERS = 12  # linear ones in the tiny ViT's two blocks
WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 128)
OUTPUTS = 2 * (4 * 32 + 128 + 32)


def rows(model):
    return {(part.name, part.dtype, part.trained): part for part in describe_parts(model)}


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_backbone_at_full_precision_is_one_row_and_the_decoder_another(backbones):
    model = build(backbones, "vit", None)
    model.backbone.hf.embeddings.mask_token.requires_grad_(True)
    parts = describe_parts(model)
    assert [(p.name, p.dtype, p.trained) for p in parts] == [
        ("backbone", "float32", True),
        ("decoder", "float32", True),
    ]
    for part, module in zip(parts, (model.backbone, model.head)):
        assert part.num_parameters == sum(p.numel() for p in module.parameters())
        assert part.num_bytes == 4 * part.num_parameters
        assert part.num_layers == sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def test_frozen_int8_codes_are_one_byte_a_weight_and_four_an_output(backbones):
    found = rows(build(backbones, "vit", INT8))
    assert found["backbone", "int8", False] == Part("backbone", "int8", LAYERS, WEIGHTS, WEIGHTS + 4 * OUTPUTS, False)


def test_int8_codes_that_train_count_as_trained_and_the_place_of_their_gradient_as_nothing(backbones):
    found = rows(build(backbones, "vit", QuantizationConfig(load_in_8bit=True, int8_trainable=True)))
    assert found["backbone", "int8", True] == Part("backbone", "int8", LAYERS, WEIGHTS, WEIGHTS + 4 * OUTPUTS, True)
    own = {n: p for n, p in build(backbones, "vit", INT8).backbone.named_parameters() if p.requires_grad}
    assert found["backbone", "float32", True].num_parameters == sum(p.numel() for p in own.values())
    assert ("backbone", "int8", False) not in found


def test_four_bit_codes_count_two_weights_a_byte_and_their_scales_as_bytes_only(backbones):
    model = build(backbones, "vit", NF4)
    stored = [
        t
        for m in model.modules()
        if isinstance(m, Linear4bit)
        for n, t in [*m.named_parameters(), *m.named_buffers()]
        if n != "bias"
    ]
    assert rows(model)["backbone", "nf4", False] == Part("backbone", "nf4", LAYERS, WEIGHTS, size(stored), False)


@pytest.mark.parametrize("quantization", [INT8, NF4], ids=["int8", "nf4"])
def test_biases_of_quantized_layers_stand_with_what_is_not_quantized(backbones, quantization):
    model = build(backbones, "vit", quantization)
    plain = rows(model)["backbone", "float32", True]
    quantized = [m for m in model.modules() if isinstance(m, (Int8Linear, Linear4bit))]
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert {id(m.bias) for m in quantized} <= {id(p) for p in trained}
    assert plain.num_parameters == sum(p.numel() for p in trained) and plain.num_bytes == 4 * plain.num_parameters


def test_a_weight_that_trains_in_floating_point_is_listed_as_such(backbones):
    found = rows(build(backbones, "vit", QuantizationConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)))
    assert not any(dtype == "int8" for _, dtype, _ in found)
    assert found["backbone", "float32", True].num_parameters > WEIGHTS


def test_adapters_are_a_row_of_their_own(backbones):
    model = build(backbones, "vit", NF4, PLAIN)
    found = rows(model)
    values = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert found["adapters", "float32", True] == Part("adapters", "float32", 2 * LAYERS, values, 4 * values, True)
    assert found["backbone", "nf4", False] == rows(build(backbones, "vit", NF4))["backbone", "nf4", False]
    frozen = [p for n, p in model.backbone.named_parameters() if not p.requires_grad and p.is_floating_point()]
    assert found["backbone", "float32", False].num_parameters == sum(p.numel() for p in frozen)
    assert ("backbone", "float32", True) not in found
    assert found["decoder", "float32", True].num_parameters == sum(p.numel() for p in model.head.parameters())


def test_rows_come_in_order_and_the_constants_of_pictures_in_none(backbones):
    model = build(backbones, "vit", NF4, PLAIN)
    parts = describe_parts(model)
    assert [p.name for p in parts] == sorted(p.name for p in parts)
    constants = [model.backbone.mean, model.backbone.std]
    everything = [*model.parameters(), *(b for b in model.buffers() if not any(b is c for c in constants))]
    assert sum(p.num_bytes for p in parts) == size(everything)
    model.backbone.hf.layernorm = nn.LayerNorm(32).to(torch.bfloat16)
    assert ("backbone", "bfloat16", True) in rows(model)

"""What a run keeps is what only it has; the rest is what the base and the settings give again."""

from dataclasses import replace

import pytest
import torch

from tests.quantization.test_apply import INT8, NF4, build
from tests.quantization.test_lora import PLAIN
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.models.pretrained import hash_tensors
from tracknet.quantization.apply import QuantizationConfig
from tracknet.quantization.storage import CheckpointSplit, select_tensors, split_state_dict

NOTHING = CheckpointSplit(frozenset(), None)
MASK = "backbone.hf.embeddings.mask_token"


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["plain", "int8", "nf4"])
def test_beside_adapters_every_tensor_of_the_backbone_comes_from_the_base(backbones, quantization):
    model = build(backbones, "vit", quantization, PLAIN)
    state = model.state_dict()
    wanted = {n for n in state if n.startswith("backbone.hf.") and "lora_" not in n}
    storage = split_state_dict(model)
    assert storage.base_keys == wanted and len(wanted) > 10
    assert {n for n in state if n not in wanted} >= {n for n, p in model.named_parameters() if p.requires_grad}
    assert storage.sha256 == hash_tensors({n: state[n] for n in wanted})


def test_what_trains_of_the_backbone_is_kept(backbones):
    model = build(backbones, "vit", NF4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    base_keys = split_state_dict(model).base_keys
    assert not base_keys & trained
    assert {n for n in base_keys if n.endswith("fc1.weight")} and not any(n.endswith("bias") for n in base_keys)


def test_adapters_are_kept_even_where_they_do_not_train(backbones):
    model = build(backbones, "vit", NF4, PLAIN).requires_grad_(False)
    assert not any("lora_" in n for n in split_state_dict(model).base_keys)


def test_codes_that_train_are_kept_with_their_scales(backbones):
    model = build(backbones, "vit", QuantizationConfig(load_in_8bit=True, int8_trainable=True))
    model.backbone.hf.embeddings.requires_grad_(False)
    embeddings = {n for n in model.state_dict() if n.startswith("backbone.hf.embeddings.")}
    assert split_state_dict(model).base_keys == embeddings


def test_a_mask_token_alone_is_no_reason_to_need_the_base(backbones):
    model = build(backbones, "vit")
    model.backbone.hf.embeddings.mask_token.requires_grad_(False)
    assert split_state_dict(model) == NOTHING
    model.backbone.hf.embeddings.cls_token.requires_grad_(False)
    assert split_state_dict(model).base_keys == {MASK, "backbone.hf.embeddings.cls_token"}


def test_a_run_that_has_no_base_or_wants_none_keeps_everything(backbones):
    model = build(backbones, "vit", NF4, PLAIN)
    assert split_state_dict(model).base_keys
    assert split_state_dict(model, self_contained=True) == NOTHING
    model.backbone.base = None
    assert split_state_dict(model) == NOTHING
    assert split_state_dict(build_model(ModelConfig("tracknet_v2", None), 3)) == NOTHING


def test_the_fingerprint_is_that_of_the_tensors_as_they_are_stored(backbones):
    hashes = [split_state_dict(build(backbones, "vit", q, PLAIN)).sha256 for q in (None, INT8, NF4)]
    assert len(set(hashes)) == 3
    model = build(backbones, "vit", replace(NF4, bnb_4bit_use_double_quant=False), PLAIN)
    before = split_state_dict(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).add_(1)
    assert split_state_dict(model) == before  # of adapters it does not speak
    next(b for n, b in model.named_buffers() if n.endswith("absmax")).add_(1)
    assert split_state_dict(model).base_keys == before.base_keys and split_state_dict(model).sha256 != before.sha256


def test_selected_tensors_are_those_of_the_names(backbones):
    model = build(backbones, "vit")
    assert select_tensors(model, frozenset()) == {}
    (found,) = select_tensors(model, frozenset([MASK])).items()
    assert found[0] == MASK and torch.equal(found[1], model.backbone.hf.embeddings.mask_token)

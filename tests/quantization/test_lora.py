"""Every LoRA key reaches peft and does what it says, on plain and on quantised layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import INT8, NF4, build
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.meter import LiveBytes
from tracknet.models.windows import Windows
from tracknet.quantization.lora import LoraConfig, lora_layers
from tracknet.quantization.merge import merge_

PLAIN = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
FRAMES = torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stir(model):
    """Give the adapters, which begin as nothing, something to say."""
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(p, std=0.3)
        elif "magnitude" in name:
            p.data.mul_(6)
    return model


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["plain", "int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_merging_keeps_what_the_model_computes(backbones, quantization, dora):
    x = FRAMES[0]
    model = stir(build(backbones, "vit", quantization, replace(PLAIN, use_dora=dora))).eval()
    bare = build(backbones, "vit", quantization).eval().backbone(x)[-1]
    before = model.backbone(x)[-1]
    after = merge_(model).backbone(x)[-1]
    assert {type(m) for m in model.backbone.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert (before - bare).norm() > 0.3 * bare.norm()  # the adapters matter
    # int8 rounds activations too, which the merged model does not.
    assert (after - before).norm() < (0.02 if quantization is INT8 else 1e-4) * before.norm()


def test_fresh_dora_changes_nothing_on_codes(backbones):
    """The length of each row is measured on the dequantised weight; on the raw codes it would be nonsense."""
    dora = build(backbones, "vit", NF4, replace(PLAIN, use_dora=True)).eval()
    with torch.no_grad():
        x = FRAMES[0]
        assert torch.allclose(dora.backbone(x)[-1], build(backbones, "vit", NF4).eval().backbone(x)[-1], atol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(backbones):
    model = build(backbones, "vit", None, replace(PLAIN, use_rslora=True))
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {8 / math.sqrt(4)}


def test_rank_and_alpha_patterns(backbones):
    model = build(backbones, "vit", NF4, replace(PLAIN, rank_pattern={"q_proj": 8}, alpha_pattern={"fc1": 32}))
    for name, layer in lora_layers(model).items():
        assert layer.r["default"] == (8 if name.endswith("q_proj") else 4)
        assert layer.lora_alpha["default"] == (32 if name.endswith("fc1") else 8)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_lists_the_names(backbones, key):
    with pytest.raises(UserError, match=rf"{key}: 'q_prj' matches no layer.*k_proj.*did you mean 'q_proj'"):
        build(backbones, "vit", None, replace(PLAIN, **{key: {"q_prj": 8}}))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_starts_that_peft_offers(backbones, start):
    """All leave the function as it was; PiSSA and OLoRA do so by taking a part of the base into the adapter."""
    config = replace(PLAIN, init_lora_weights=start)
    model = build(backbones, "vit", None, config).eval()
    plain = build(backbones, "vit").eval()
    with torch.no_grad():
        x = FRAMES[0]
        same = torch.allclose(model.backbone(x)[-1], plain.backbone(x)[-1], atol=1e-3)
    assert same or start == "orthogonal"  # orthogonal A and B do not cancel
    base = next(iter(lora_layers(model).values())).get_base_layer().weight
    original = next(m for m in plain.backbone.modules() if isinstance(m, nn.Linear)).weight
    assert torch.equal(base, original) != config.changes_base


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_move_the_base_are_refused_on_codes(start):
    with pytest.raises(UserError, match=rf"init_lora_weights={start} .*training\.quantization"):
        compose("synthetic", "vit_tiny_heatmap", "qlora", [f"training.lora.init_lora_weights={start}"])


@pytest.mark.parametrize(
    ("start", "r", "words"), [("pissa", 64, "fewer than r=64"), ("olora", 64, "fewer"), ("orthogonal", 5, "even ranks")]
)
def test_starts_have_only_the_ranks_that_there_are(backbones, start, r, words):
    with pytest.raises(UserError, match=words):
        build(backbones, "vit", None, replace(PLAIN, init_lora_weights=start, r=r))


@pytest.mark.parametrize("section", ["quantization", "lora"])
def test_a_section_can_be_switched_off(backbones, section):
    off = {"quantization": replace(NF4, enabled=False), "lora": replace(PLAIN, enabled=False)}[section]
    model = build(backbones, "vit", **{section: off})
    assert {type(m) for m in model.backbone.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not any("lora_" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_along_as_said(backbones, bias):
    model = build(backbones, "vit", NF4, replace(PLAIN, bias=bias, target_modules=["fc1"]))
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad and n.endswith("bias")}
    adapted = {n for n in trained if "fc1" in n}
    assert bool(trained) == (bias != "none") and (bias == "all") == bool(trained - adapted)


def test_dropout_keeps_nothing_for_backward(backbones):
    kept = []
    for p in (0.0, 0.2):
        model = build(backbones, "vit", NF4, replace(PLAIN, lora_dropout=p)).train()
        x = torch.randint(0, 256, (2, 3, 72, 128), dtype=torch.uint8)
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
            maps = model.backbone(x)
        kept.append(meter.live)
        del maps
    assert kept[0] == kept[1]


def test_the_task_type_is_recorded(backbones):
    model = build(backbones, "vit", NF4, PLAIN)
    assert model.backbone.hf.peft_config["default"].task_type == "FEATURE_EXTRACTION"


def test_only_the_last_blocks_train_and_nothing_below_is_kept(backbones):
    def kept(layers):
        model = build(backbones, "vit", None, replace(PLAIN, layers=layers))
        names = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        x = torch.randint(0, 256, (2, 3, 72, 128), dtype=torch.uint8)
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
            maps = model.backbone(x)
        return names, meter.live, maps

    all_names, all_bytes, _ = kept(None)
    last_names, last_bytes, maps = kept("last-1")
    assert last_names < all_names and all("layer.1." in n for n in last_names)
    assert last_bytes < 0.6 * all_bytes
    assert [m.requires_grad for m in maps] == [False, True]  # block 1 runs without gradient


def test_last_blocks_beyond_the_depth_are_an_error(backbones):
    with pytest.raises(UserError, match=r"layers=last-9: the backbone has 2 blocks"):
        build(backbones, "vit", None, replace(PLAIN, layers="last-9"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lora.layers=4", "last-<k>"),
        ("training.lora.init_lora_weights=gausian", "did you mean 'gaussian'"),
        ("training.lora.rank_pattern={q_proj: 0}", "at least 1"),
        ("training.lora.rank_pattern={'q(': 3}", "is no pattern"),
        ("training.backbone_trains=nothing training.lora=null", "nothing of the backbone trains"),
        ("training.lora.layers=last-2 training.backbone_trains=norms", "keeps the blocks below without gradient"),
        ("model.backbone.freeze=true training.backbone_trains=norms", "contradict each other"),
        ("training.lora.layers=last-1 training.lora.bias=all", "keeps the blocks below without gradient"),
        ("training.backbone_trains=nothing training.lora.bias=all", "trains biases of the backbone"),
        ("training.quantization.llm_int8_has_fp16_weight=true", "load_in_8bit is false"),
        ("training.lora.init_lora_weights='true'", "is one of"),
    ],
)
def test_what_cannot_be_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        compose("synthetic", "vit_tiny_heatmap", "qlora", _split(override))


def _split(overrides):
    parts = overrides.split(" training.")
    return [parts[0], *(f"training.{p}" for p in parts[1:])]


@pytest.mark.parametrize("quantization", [None, INT8], ids=["plain", "int8"])
def test_norms_train_beside_adapters(backbones, quantization):
    model = build(backbones, "vit", quantization, PLAIN, trains="norms")
    names = {n for n, p in model.backbone.hf.named_parameters() if p.requires_grad}
    assert any("lora_" in n for n in names) and any("norm" in n for n in names)
    assert all(n.endswith(("norm1.weight", "norm2.weight", "layernorm.weight", "bias", "lambda1", "cls_token")) or "lora_" in n
               for n in names)  # fmt: skip


def test_an_adapter_keeps_two_bytes_per_value_of_its_input():
    """q, k and v read one 16-bit input, and backward keeps that one; stock peft copies it to fp32 for each."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(256)
            self.q, self.k, self.v = (nn.Linear(256, 8, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.norm(x)
            return self.q(x) + self.k(x) + self.v(x)

    def kept(ours):
        from tracknet.models.backbone import _cast_to_autocast
        from tracknet.quantization.lora import add_lora

        torch.manual_seed(0)
        module = Attention()
        if ours:
            module.norm.register_forward_hook(_cast_to_autocast)
            add_lora(module, [module], PLAIN, Windows())
        else:
            module.requires_grad_(False)
            inject_adapter_in_model(PeftConfig(r=4, target_modules=["q", "k", "v"]), module)
        x = torch.randn(512, 256)
        with LiveBytes([x, *module.parameters()]) as meter, torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        return meter.live / x.numel(), out

    ours, _ = kept(True)
    stock, _ = kept(False)
    assert ours < 2.2  # one bf16 input; ranks and outputs are small
    assert stock > 5.9  # three bf16 copies, at least

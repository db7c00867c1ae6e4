"""Build, quantise, adapt: what comes out, and what is refused."""

import pytest
import torch
from torch import nn

from tracknet.errors import UserError
from tracknet.models.backbone import BackboneConfig
from tracknet.models.decoder import DecoderConfig
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.quantization.apply import QuantizationConfig, apply_mode, quantize
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.lora import LoraConfig, match_targets
from tracknet.quantization.nf4 import Linear4bit
from tracknet.quantization.parts import describe_parts

CPU = torch.device("cpu")
NAMES = {"vit": "vit_heatmap", "convnext": "convnext_fpn_heatmap"}
INT8 = QuantizationConfig(load_in_8bit=True)
NF4 = QuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="fp32")
MODES = {
    "default": (None, None), "int8": (INT8, None), "nf4": (NF4, None), "qlora": (NF4, LoraConfig(lora_dropout=0.0)),
    "int8+lora": (INT8, LoraConfig(lora_dropout=0.0)), "lora": (None, LoraConfig(lora_dropout=0.0)),
}  # fmt: skip


def build(backbones, kind="vit", quantization=None, lora=None, trains="auto", **backbone):
    torch.manual_seed(0)
    config = ModelConfig(NAMES[kind], BackboneConfig(str(backbones[kind]), **backbone), DecoderConfig(channels=32))
    model = build_model(config, 3)
    apply_mode(model, "fp32", quantization, lora, CPU, trains)
    return model


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_what_it_says_and_nothing_else(backbones, kind, mode):
    model = build(backbones, kind, *MODES[mode])
    frames = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8)
    model(frames).square().mean().backward()
    names = trained(model)
    head = {n for n, _ in model.named_parameters() if n.startswith("head.")}
    assert head <= names
    inside = names - head
    if "lora" in mode:
        assert inside and all("lora_" in n for n in inside)
    elif mode == "default":
        assert all(p.requires_grad for n, p in model.named_parameters() if "mask_token" not in n)
    else:
        linear = {n for n, m in model.named_modules() if isinstance(m, (Int8Linear, Linear4bit))}
        assert inside and not any(n.removesuffix(".weight") in linear for n in inside)
    for name, parameter in model.named_parameters():
        if name in names and "layernorm" not in name and "layer_norm" not in name:
            assert parameter.grad is not None, name
        elif name not in names:
            assert parameter.grad is None


@pytest.mark.parametrize("kind", NAMES)
def test_quantisation_stays_close_and_leaves_the_decoder(backbones, kind):
    frames = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8)[0]
    with torch.no_grad():
        full, int8, nf4 = (build(backbones, kind, q).backbone(frames) for q in (None, INT8, NF4))
    for a, b, c in zip(full, int8, nf4):
        assert (a - b).norm() / a.norm() < 0.05
        assert (a - c).norm() / a.norm() < 0.3
    model = build(backbones, kind, NF4)
    assert not any(isinstance(m, (Int8Linear, Linear4bit)) for m in model.head.modules())
    assert all(isinstance(m, Linear4bit) for m in model.backbone.modules() if isinstance(m, nn.Linear))


def test_fresh_adapters_change_nothing(backbones):
    frames = torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8)
    assert torch.equal(
        build(backbones, "vit", NF4)(frames), build(backbones, "vit", NF4, LoraConfig(lora_dropout=0.0))(frames)
    )


@pytest.mark.parametrize("quantization", [INT8, NF4])
def test_skipped_modules_stay_as_they_are(backbones, quantization):
    from dataclasses import replace

    model = build(backbones, "vit", replace(quantization, llm_int8_skip_modules=["fc2", "encoder.layer.0.*"]))
    kinds = {n: type(m) for n, m in model.backbone.hf.named_modules() if isinstance(m, nn.Linear)}
    assert all((k is nn.Linear) == (n.endswith("fc2") or n.startswith("encoder.layer.0.")) for n, k in kinds.items())


def test_a_skip_pattern_that_matches_nothing_is_an_error(backbones):
    with pytest.raises(UserError, match=r"'fc9' matches no linear layer.*fc1"):
        build(backbones, "vit", QuantizationConfig(load_in_8bit=True, llm_int8_skip_modules=["fc9"]))


def test_no_targets_means_every_linear_layer_of_the_backbone(backbones):
    for kind in NAMES:
        model = build(backbones, kind, NF4, LoraConfig())
        adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
        assert len(adapted) == sum(isinstance(m, Linear4bit) for m in model.modules())
        assert all(n.startswith("backbone.") for n in adapted)


def test_the_guides_targets_work_through_aliases(backbones):
    model = build(backbones, "vit", NF4, LoraConfig(target_modules=["query", "value"]))
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert adapted == {"q_proj", "v_proj"}


def test_a_target_that_matches_nothing_lists_the_names(backbones):
    backbone = build(backbones, "vit").backbone.hf
    with pytest.raises(UserError, match=r"'q_prj' matches no linear layer.*k_proj.*did you mean 'q_proj'"):
        match_targets(backbone, ["q_prj"])


def test_lora_settings_reach_peft(backbones):
    model = build(backbones, "vit", None, LoraConfig(r=4, lora_alpha=12, lora_dropout=0.25, bias="all"))
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    assert layer.r["default"] == 4 and layer.scaling["default"] == 3 and layer.lora_A["default"].p == 0.25
    assert all(p.requires_grad for n, p in model.backbone.named_parameters() if n.endswith("bias"))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)


def test_a_frozen_backbone_keeps_no_graph(backbones):
    model = build(backbones, "vit", freeze=True)
    maps = model.backbone(torch.randint(0, 256, (1, 3, 72, 128), dtype=torch.uint8))
    assert not any(m.requires_grad for m in maps)


@pytest.mark.parametrize("section", ["quantization", "lora"])
def test_what_acts_on_a_backbone_is_refused_without_one(section):
    model = build_model(ModelConfig("tracknet_v2", None), 3)
    arguments = {"quantization": None, "lora": None, section: INT8 if section == "quantization" else LoraConfig()}
    with pytest.raises(UserError, match=rf"training\.{section} acts on the backbone"):
        apply_mode(model, "fp32", arguments["quantization"], arguments["lora"], CPU)


def test_the_table_counts_every_value_once(backbones):
    full = sum(p.num_parameters for p in describe_parts(build(backbones, "vit")))
    for quantization in (INT8, NF4):
        model = build(backbones, "vit", quantization)
        parts = describe_parts(model)
        assert sum(p.num_parameters for p in parts) == full
        stored = [
            *model.parameters(),
            *(b for n, b in model.named_buffers() if n not in ("backbone.mean", "backbone.std")),
        ]
        assert sum(p.num_bytes for p in parts) == sum(t.numel() * t.element_size() for t in stored)


def test_int8_is_refused_where_the_gpu_has_no_units_for_it(backbones, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    model = build(backbones, "vit")
    with pytest.raises(UserError, match=r"load_in_8bit=true and training\.device=cuda: V100 .*--training"):
        apply_mode(model, "fp16", INT8, None, torch.device("cuda"))


def test_what_trains_can_be_said(backbones):
    for quantization in (None, INT8, NF4):
        every, norms = (trained(build(backbones, "vit", quantization, trains=t)) for t in ("all", "norms"))
        assert norms < every and "backbone.hf.embeddings.position_embeddings" in every - norms
        assert all(p.numel() == max(p.shape) for n, p in build(backbones, "vit", quantization).named_parameters()
                   if n in norms and n.startswith("backbone"))  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_under_checkpointing_ours_keeps_less_than_stock_int8(backbones, kind):
    """bitsandbytes' layer holds on to its full-precision input in Python, where checkpointing cannot drop it."""
    import bitsandbytes as bnb

    from tracknet.memory.checkpointing import checkpoint_
    from tracknet.memory.meter import LiveBytes

    def stock(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0)
        layer.load_state_dict(linear.state_dict())
        layer.bias.requires_grad_(True)
        return Flat(layer.to("cpu"))

    class Flat(nn.Module):  # the stock layer takes no 4-D input
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    live = {}
    for name in ("plain", "ours", "stock"):
        model = build(
            backbones, kind, QuantizationConfig(load_in_8bit=True, llm_int8_threshold=0.0) if name == "ours" else None
        )
        if name == "stock":
            quantize(model.backbone.hf, stock, [])
        checkpoint_(model, "blocks")
        model.train()
        x = torch.randint(0, 256, (3, 3, 72, 128), dtype=torch.uint8)
        model.backbone(x)  # the stock layer quantises its weight in the first forward
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
            maps = model.backbone(x)
        live[name] = meter.live
        del maps
    assert live["ours"] <= 1.02 * live["plain"]
    assert live["stock"] > 1.5 * live["ours"]

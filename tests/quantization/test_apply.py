"""Build, quantize, adapt: what comes out, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModel, Dinov2WithRegistersConfig

from tracknet.errors import UserError
from tracknet.models.backbone import BackboneConfig
from tracknet.models.decoder import DecoderConfig
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.quantization import apply
from tracknet.quantization.adapters import LoraConfig, match_targets
from tracknet.quantization.apply import (
    ModeConfig,
    QuantizationConfig,
    active,
    apply_mode,
    choose_int8_kernel,
    quantize_backbone,
)
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.nf4 import Linear4bit
from tracknet.quantization.parts import describe_parts
from tracknet.quantization.trainable_int8 import TrainableInt8Linear

CPU = torch.device("cpu")
NAMES = {"vit": "vit_heatmap", "convnext": "convnext_fpn_heatmap"}
INT8 = QuantizationConfig(load_in_8bit=True)
NF4 = QuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="fp32")
MODES = {
    "default": (None, None),
    "int8": (INT8, None),
    "nf4": (NF4, None),
    "qlora": (NF4, LoraConfig(lora_dropout=0.0)),
    "int8+lora": (INT8, LoraConfig(lora_dropout=0.0)),
    "lora": (None, LoraConfig(lora_dropout=0.0)),
}


def build(backbones, kind="vit", quantization=None, lora=None, trains="auto", last_blocks=None, **backbone):
    torch.manual_seed(0)
    config = ModelConfig(NAMES[kind], BackboneConfig(str(backbones[kind]), **backbone), DecoderConfig(channels=32))
    model = build_model(config, 3)
    apply_mode(model, ModeConfig("fp32", quantization, lora, trains, last_blocks), CPU)
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
def test_quantization_stays_close_and_leaves_the_decoder(backbones, kind):
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
        apply_mode(model, ModeConfig("fp32", arguments["quantization"], arguments["lora"]), CPU)


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
        apply_mode(model, ModeConfig("fp16", INT8), torch.device("cuda"))


def test_what_trains_can_be_said(backbones):
    for quantization in (None, INT8, NF4):
        every, norms = (trained(build(backbones, "vit", quantization, trains=t)) for t in ("all", "norms"))
        assert norms < every and "backbone.hf.embeddings.position_embeddings" in every - norms
        assert all(
            p.numel() == max(p.shape)
            for n, p in build(backbones, "vit", quantization).named_parameters()
            if n in norms and n.startswith("backbone")
        )


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
            quantize_backbone(model.backbone.hf, stock, [])
        checkpoint_(model, "blocks")
        model.train()
        x = torch.randint(0, 256, (3, 3, 72, 128), dtype=torch.uint8)
        model.backbone(x)  # the stock layer quantizes its weight in the first forward
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
            maps = model.backbone(x)
        live[name] = meter.live
        del maps
    assert live["ours"] <= 1.02 * live["plain"]
    assert live["stock"] > 1.5 * live["ours"]


def test_tokens_train_with_the_norms_however_many_there_are(tmp_path):
    """Four register tokens are four vectors, and no matrix that would be left to adapters."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    AutoModel.from_config(Dinov2WithRegistersConfig(**size, num_register_tokens=4)).save_pretrained(tmp_path / "vit")
    names = trained(build({"vit": tmp_path / "vit"}, "vit", trains="norms"))
    embeddings = {n.removeprefix("backbone.hf.embeddings.") for n in names if ".embeddings." in n}
    assert embeddings == {"cls_token", "register_tokens", "patch_embeddings.projection.bias"}


@pytest.mark.parametrize("quantization", [None, INT8, NF4], ids=["plain", "int8", "nf4"])
def test_norms_are_every_vector_and_no_matrix(backbones, quantization):
    model = build(backbones, "vit", quantization, trains="norms")
    for name, p in model.backbone.hf.named_parameters():
        vector = p.numel() == max(p.shape) and p.is_floating_point() and "mask_token" not in name  # which is never used
        assert p.requires_grad == vector, name


@pytest.mark.parametrize("trains", ["auto", "all", "norms", "nothing"])
@pytest.mark.parametrize("bias", [None, "none", "all"])
def test_what_trains_of_the_backbone_itself(backbones, trains, bias):
    """Adapters and the biases that belong to them train whatever else does not."""
    lora = None if bias is None else LoraConfig(lora_dropout=0.0, bias=bias)
    model = build(backbones, "vit", NF4, lora, trains=trains)
    own = {n: p for n, p in model.backbone.hf.named_parameters() if "lora_" not in n and p.is_floating_point()}
    del own["embeddings.mask_token"]  # which is never used
    found = {n for n, p in own.items() if p.requires_grad}
    biases = {n for n in own if n.endswith("bias")}
    vectors = {n for n, p in own.items() if p.numel() == max(p.shape)}
    if trains == "all" or (trains == "auto" and lora is None):
        assert found == set(own)
    elif trains == "norms":
        assert found == vectors
    else:
        assert found == (biases if bias == "all" else set())


def test_a_frozen_backbone_stays_so_whatever_trains(backbones):
    for trains in ("auto", "nothing"):
        assert all(n.startswith("head.") for n in trained(build(backbones, "vit", trains=trains, freeze=True)))
    model = build(backbones, "vit", None, LoraConfig(lora_dropout=0.0), freeze=True)
    assert all(n.startswith("head.") or "lora_" in n for n in trained(model))
    with pytest.raises(UserError, match=r"freeze=true and training\.lora\.bias=all contradict"):
        build(backbones, "vit", None, LoraConfig(bias="all"), freeze=True)


@pytest.mark.parametrize("start", ["pissa", True])
def test_a_base_that_the_adapters_changed_is_no_longer_the_one_it_was(backbones, start):
    model = build(backbones, "vit", None, LoraConfig(lora_dropout=0.0, init_lora_weights=start))
    assert (model.backbone.base is None) == (start == "pissa")


def test_settings_of_quantization_reach_the_layers(backbones):
    def layers(kind, kernel="auto", **settings):
        model = build_model(ModelConfig(backbone=BackboneConfig(str(backbones["vit"]))), 3)
        apply_mode(model, ModeConfig(quantization=QuantizationConfig(**settings), int8_kernel=kernel), CPU)
        found = [m for m in model.modules() if type(m) is kind]
        assert len(found) == 12
        return found

    for layer in layers(Int8Linear, load_in_8bit=True, llm_int8_threshold=3.5, kernel="triton"):
        assert (layer.threshold, layer.kernel, layer.has_fp16_weight) == (3.5, "triton", False)
    for layer in layers(Int8Linear, load_in_8bit=True, llm_int8_has_fp16_weight=True):
        assert (layer.threshold, layer.kernel, layer.has_fp16_weight) == (6.0, "bitsandbytes", True)
    trained_codes = {"int8_trainable": True, "llm_int8_threshold": 2.5, "kernel": "triton"}
    for layer in layers(TrainableInt8Linear, load_in_8bit=True, **trained_codes):
        assert (layer.threshold, layer.kernel) == (2.5, "triton")
    four_bits = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "bf16"}
    for layer in layers(Linear4bit, load_in_4bit=True, bnb_4bit_compute_dtype="fp32", **four_bits):
        assert (layer.quant_type, layer.compute_dtype, layer.nested) == ("fp4", torch.float32, False)
        assert layer.weight.dtype == torch.bfloat16


def test_what_the_device_made_of_the_settings_is_said_once_for_each(backbones, monkeypatch, said):
    monkeypatch.setattr("tracknet.quantization.precision.cpu_has_bf16", lambda: False)
    model = build(backbones, "vit")
    apply_mode(model, ModeConfig("bf16", replace(NF4, bnb_4bit_compute_dtype="fp16")), CPU)
    assert [line.split(":")[0] for line in said] == [
        "training.precision=bf16",
        "training.quantization.bnb_4bit_compute_dtype=fp16",
    ]
    assert model.compute_dtype == torch.float32
    said.clear()
    apply_mode(build_model(ModelConfig("tracknet_v2", None), 3), ModeConfig(), CPU)
    assert not said
    apply_mode(build_model(ModelConfig("tracknet_v2", None), 3), ModeConfig("fp16"), CPU)
    assert len(said) == 1 and "training.precision=fp16" in said[0]


def test_a_model_goes_where_it_runs_or_where_it_is_placed(backbones):
    meta = torch.device("meta")
    for config in (ModelConfig("tracknet_v2", None), None):
        model = build(backbones, "vit") if config is None else build_model(config, 3)
        apply_mode(model, ModeConfig(), meta)
        assert {t.device for t in [*model.parameters(), *model.buffers()]} == {meta}
    placed, model = [], build(backbones, "vit")
    apply_mode(model, ModeConfig("fp32", INT8), meta, place=lambda m: placed.append({type(x) for x in m.modules()}))
    assert len(placed) == 1 and Int8Linear in placed[0] and next(model.parameters()).device == CPU


def test_without_a_backbone_nothing_can_be_said_of_it():
    model = build_model(ModelConfig("tracknet_v2", None), 3)
    with pytest.raises(UserError, match=r"trainable=norms acts on the backbone"):
        apply_mode(model, ModeConfig(trainable="norms"), CPU)
    off = replace(INT8, enabled=False), LoraConfig(enabled=False)
    apply_mode(model, ModeConfig("fp32", *off), CPU)


def test_a_section_counts_where_it_is_there_and_enabled():
    assert active(None) is None and active(INT8) is INT8 and active(replace(INT8, enabled=False)) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_8bit": False}, "neither load_in_8bit nor load_in_4bit"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "are both true"),
        ({"load_in_4bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=true trains"),
        ({"load_in_4bit": True, "int8_trainable": True}, "load_in_8bit=false stores none"),
        ({"load_in_8bit": True, "int8_trainable": True, "llm_int8_has_fp16_weight": True}, "fp16_weight=true"),
        ({"enabled": False, "int8_trainable": True}, "load_in_8bit=false stores none"),
        ({"load_in_8bit": True, "llm_int8_threshold": -0.5}, "threshold=-0.5"),
        ({"load_in_8bit": True, "llm_int8_threshold": math.inf}, "threshold=inf"),
        ({"load_in_8bit": True, "llm_int8_threshold": math.nan}, "threshold=nan"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        QuantizationConfig(**settings)


def test_settings_that_look_alike_are_taken():
    for settings in (
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        {"load_in_8bit": True, "int8_trainable": True},
        {"load_in_8bit": True, "llm_int8_threshold": 0.0},
        {"load_in_8bit": True, "llm_int8_threshold": 0.5},
        # Switched off, a section may say what it will.
        {"enabled": False},
        {"enabled": False, "load_in_8bit": True, "load_in_4bit": True},
        {"enabled": False, "llm_int8_has_fp16_weight": True},
    ):
        QuantizationConfig(**settings)


@pytest.mark.parametrize(
    ("capability", "kernel", "installed", "words"),
    [
        ((7, 4), "bitsandbytes", True, "X has no int8 matrix units"),
        ((7, 5), "bitsandbytes", False, None),
        ((7, 5), "triton", True, "Triton does not support int8 products on X"),
        ((7, 9), "triton", True, "Triton does not support int8 products on X"),
        ((8, 0), "triton", True, None),
        ((9, 0), "triton", False, "Triton is not installed"),
        ((9, 0), "bitsandbytes", False, None),
        ((7, 4), "auto", True, "X has no int8 matrix units"),
        ((7, 5), "auto", True, None),
        ((9, 0), "auto", False, None),
    ],
)
def test_a_gpu_multiplies_in_int8_from_its_generation_on(backbones, monkeypatch, capability, kernel, installed, words):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "X")
    monkeypatch.setattr(apply, "find_spec", lambda name: object() if installed or name != "triton" else None)
    device, model = torch.device("cuda", 1), build(backbones, "vit")
    arguments = (model, ModeConfig("fp16", INT8, int8_kernel=kernel), device, True, lambda model: None)
    if words is None:
        apply_mode(*arguments)
        assert sum(type(m) is Int8Linear for m in model.modules()) == 12
    else:
        with pytest.raises(UserError, match=words):
            apply_mode(*arguments)
        assert not any(isinstance(m, Int8Linear) for m in model.modules())
    assert set(asked) == {device}


@pytest.mark.parametrize(
    ("capability", "installed", "wanted"),
    [((7, 5), True, "bitsandbytes"), ((8, 0), True, "triton"), ((9, 0), False, "bitsandbytes")],
)
def test_the_fastest_kernel_that_runs_is_chosen(monkeypatch, capability, installed, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    monkeypatch.setattr(apply, "find_spec", lambda name: object() if installed else None)
    assert choose_int8_kernel("auto", torch.device("cuda")) == wanted
    assert choose_int8_kernel("auto", CPU) == "bitsandbytes" and choose_int8_kernel("triton", CPU) == "triton"


def test_patterns_name_layers_by_their_whole_name_or_its_end():
    def skipped(*patterns):
        inner = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
        module = nn.ModuleDict({"b": nn.ModuleDict({"a": inner}), "fc2": nn.Linear(8, 8)})
        quantize_backbone(module, lambda linear: Int8Linear(linear, 0.0, False), list(patterns))
        return {n for n, m in module.named_modules() if type(m) is nn.Linear}

    assert skipped() == set()
    assert skipped("fc2") == {"fc2", "b.a.fc2"} and skipped("fc1") == skipped("a.fc1") == {"b.a.fc1"}
    assert skipped("b.*") == {"b.a.fc1", "b.a.fc2"} and skipped("fc1", "a.fc2") == {"b.a.fc1", "b.a.fc2"}
    with pytest.raises(UserError, match=r"skips every linear layer"):
        skipped("fc?")
    said = r"'c1' matches no linear layer; .* like 'b\.a\.fc1', their last parts are fc1, fc2; did you mean 'fc1'"
    with pytest.raises(UserError, match=said):
        skipped("c1")

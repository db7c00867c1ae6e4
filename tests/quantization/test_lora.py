"""Every LoRA key reaches peft and does what it says, on plain and on quantized layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import INT8, NF4, build
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.meter import LiveBytes
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.adapters import LoraConfig, adapted_layers, add_adapters, match_targets
from tracknet.quantization.merge import merge_
from tracknet.quantization.recomputed_dropout import DropoutLinear

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
    """The length of each row is measured on the dequantized weight; on the raw codes it would be nonsense."""
    dora = build(backbones, "vit", NF4, replace(PLAIN, use_dora=True)).eval()
    with torch.no_grad():
        x = FRAMES[0]
        assert torch.allclose(dora.backbone(x)[-1], build(backbones, "vit", NF4).eval().backbone(x)[-1], atol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(backbones):
    model = build(backbones, "vit", None, replace(PLAIN, use_rslora=True))
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {8 / math.sqrt(4)}


def test_rank_and_alpha_patterns(backbones):
    model = build(backbones, "vit", NF4, replace(PLAIN, rank_pattern={"q_proj": 8}, alpha_pattern={"fc1": 32}))
    for name, layer in adapted_layers(model).items():
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
    base = next(iter(adapted_layers(model).values())).get_base_layer().weight
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lora.layers=4", "use training.train_last_blocks=<k>"),
        ("training.lora.init_lora_weights=gausian", "did you mean 'gaussian'"),
        ("training.lora.rank_pattern={q_proj: 0}", "at least 1"),
        ("training.lora.rank_pattern={'q(': 3}", "is not a valid regular expression"),
        ("training.lora.rank_pattern={'(.+)+x': 3}", "may take years to match"),
        ("training.lora.alpha_pattern={'(.|..){9}x': 3}", "may take years to match"),
        ("training.lora.alpha_pattern={'.*.*.*.*.*x': 3}", "may take years to match"),
        ("training.trainable=nothing training.lora=null training.train_last_blocks=2", "trainable=nothing trains none"),
        ("training.train_last_blocks=0", "must be a number of blocks"),
        ("model.backbone.freeze=true training.trainable=norms", "contradict each other"),
        ("training.trainable=nothing training.lora.bias=all", "trains biases of the backbone"),
        ("training.quantization.llm_int8_has_fp16_weight=true", "load_in_8bit is false"),
        ("training.lora.init_lora_weights='true'", "must be one of"),
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
    assert all(
        n.endswith(("norm1.weight", "norm2.weight", "layernorm.weight", "bias", "lambda1", "cls_token")) or "lora_" in n
        for n in names
    )


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
        from tracknet.quantization.adapters import add_adapters

        torch.manual_seed(0)
        module = Attention()
        if ours:
            module.norm.register_forward_hook(_cast_to_autocast)
            add_adapters(module, [module], PLAIN, WindowRng())
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


def named(*names, **settings):
    """A module with square linear layers of these names."""
    return nn.ModuleDict({name: nn.Linear(8, 8, **settings) for name in names})


@pytest.mark.parametrize(
    ("target", "elsewhere"),
    [
        ("query", "q_proj"),
        ("key", "k_proj"),
        ("value", "v_proj"),
        ("dense", "o_proj"),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("o_proj", "dense"),
        ("fc1", "up_proj"),
        ("fc1", "weights_in"),
        ("fc2", "down_proj"),
        ("fc2", "weights_out"),
        ("pwconv1", "pointwise_conv1"),
        ("pwconv2", "pointwise_conv2"),
    ],
)
def test_a_projection_is_found_by_what_other_families_call_it(target, elsewhere):
    assert match_targets(named("first", elsewhere), [target]) == [elsewhere]


def test_targets_are_whole_parts_of_names_each_once_and_in_the_order_of_the_model():
    module = nn.ModuleDict({"a": named("fc1", "fc2", "my_fc1"), "b": named("fc1"), "fc2": nn.Linear(8, 8)})
    assert match_targets(module, ["fc2", "fc1", "a.fc1"]) == ["a.fc1", "a.fc2", "b.fc1", "fc2"]
    assert match_targets(module, []) == ["a.fc1", "a.fc2", "a.my_fc1", "b.fc1", "fc2"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_a_16_bit_base_are_kept_in_32(dropout, dora):
    """An update of a thousandth of a weight is less than half a step of bf16."""
    module = named("q", "k", dtype=torch.bfloat16)
    add_adapters(module, [module], replace(PLAIN, lora_dropout=dropout, use_dora=dora), WindowRng())
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    adapters = {name for name in dtypes if "lora_" in name}
    assert len(adapters) == (6 if dora else 4) and {dtypes[n] for n in adapters} == {torch.float32}
    assert {dtypes[n] for n in dtypes.keys() - adapters} == {torch.bfloat16}
    for name in adapters:
        assert module.get_parameter(name).requires_grad, name
        module.get_parameter(name).data.fill_(1).add_(1e-3)
        assert module.get_parameter(name).flatten()[0] > 1


def test_every_adapter_drops_values_of_its_own():
    module, rng = named("q", "k", "v"), WindowRng()
    add_adapters(module, [module], replace(PLAIN, lora_dropout=0.5), rng)
    module.train()
    drops = [layer.lora_A["default"] for layer in adapted_layers(module).values()]
    assert all(isinstance(a, DropoutLinear) and a.rng is rng and a.p == 0.5 for a in drops)
    for a in drops:
        nn.init.eye_(a.weight)
    with rng.scope(seed=1, first=0, count=1):
        masks = [a(torch.ones(50, 8))[:, :4] != 0 for a in drops]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    # Once, and not by peft's own dropout besides.
    assert not any(isinstance(m, nn.Dropout) for m in module.modules())


def test_without_dropout_and_with_dora_the_first_half_stays_as_peft_made_it():
    for settings in ({"lora_dropout": 0.0}, {"lora_dropout": 0.25, "use_dora": True}):
        module = named("q", "k")
        add_adapters(module, [module], replace(PLAIN, **settings), WindowRng())
        for layer in adapted_layers(module).values():
            assert type(layer.lora_A["default"]) is nn.Linear
            assert getattr(layer.lora_dropout["default"], "p", 0.0) == settings["lora_dropout"]


def test_everything_but_adapters_is_frozen():
    module = named("q", "k")
    add_adapters(module, [module], replace(PLAIN, target_modules=["q"]), WindowRng())
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
    }


def test_where_a_checkpoint_brings_the_values_the_base_stays_as_it_is():
    for initialize in (True, False):
        torch.manual_seed(0)
        module = named("q")
        before = module["q"].weight.detach().clone()
        add_adapters(module, [module], replace(PLAIN, init_lora_weights="pissa"), WindowRng(), initialize)
        (layer,) = adapted_layers(module).values()
        assert torch.equal(layer.get_base_layer().weight, before) != initialize
        assert (layer.lora_B["default"].weight == 0).all() != initialize


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        (True, False),
        (False, False),
        ("gaussian", False),
        ("orthogonal", False),
        ("pissa", True),
        ("pissa_niter_12", True),
        ("olora", True),
    ],
)
def test_starts_that_take_from_the_base_are_known(start, changes):
    assert replace(PLAIN, init_lora_weights=start).changes_base is changes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, r"r=0 and lora_alpha=8"),
        ({"lora_alpha": 0}, r"r=4 and lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: q=0"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern: q=0"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights=pissa_niter_0"),
        ({"init_lora_weights": "my_gaussian"}, "did you mean 'gaussian'"),
    ],
)
def test_settings_just_outside_of_what_there_is_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        replace(PLAIN, **settings)


def test_settings_at_the_edge_of_what_there_is_are_taken():
    edge = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "rank_pattern": {"q": 1}, "alpha_pattern": {"q": 1}}
    assert LoraConfig(**edge).r == 1


def test_a_rank_may_be_all_that_a_layer_has_and_is_counted_where_a_pattern_sets_it():
    module = nn.ModuleDict({"wide": nn.Linear(16, 8), "tall": nn.Linear(8, 16), "big": nn.Linear(32, 32)})
    add_adapters(module, [module], replace(PLAIN, r=8, init_lora_weights="olora"), WindowRng())
    for name in ("wide", "tall"):
        module = nn.ModuleDict({"big": nn.Linear(32, 32), name: nn.Linear(*((16, 8) if name == "wide" else (8, 16)))})
        with pytest.raises(UserError, match=f"{name} has 8 of them, fewer than r=9"):
            add_adapters(module, [module], replace(PLAIN, r=9, init_lora_weights="olora"), WindowRng())
        config = replace(PLAIN, r=8, rank_pattern={"big": 16}, init_lora_weights="olora")
        add_adapters(module, [module], config, WindowRng())
    module = named("q", "k")
    with pytest.raises(UserError, match="even ranks, but k has r=3"):
        add_adapters(
            module, [module], replace(PLAIN, rank_pattern={"k": 3}, init_lora_weights="orthogonal"), WindowRng()
        )
    add_adapters(module, [module], replace(PLAIN, r=9), WindowRng())  # other starts take any rank


def test_a_pattern_is_the_end_of_a_name_from_a_dot_on():
    every = {"fc1": True, "a.fc1": True, r"\w+.fc1": True, "c1": False, "fc": False, "a": False}
    for pattern, fits in every.items():
        module = nn.ModuleDict({"a": named("fc1", "fc2")})
        config = replace(PLAIN, rank_pattern={pattern: 2})
        if not fits:
            with pytest.raises(UserError, match=rf"rank_pattern: '{pattern}' matches no layer .* fc1, fc2"):
                add_adapters(module, [module], config, WindowRng())
            continue
        add_adapters(module, [module], config, WindowRng())
        assert {n: layer.r["default"] for n, layer in adapted_layers(module).items()} == {"a.fc1": 2, "a.fc2": 4}


def test_the_last_blocks_are_counted_from_the_end():
    blocks = [named("q", "fc") for _ in range(3)]
    for last, adapted in ((1, {"2"}), (2, {"1", "2"}), (3, {"0", "1", "2"})):
        module = nn.Sequential(*(named("q", "fc") for _ in blocks), nn.Linear(8, 8))
        add_adapters(module, list(module)[3 - last : 3], PLAIN, WindowRng())
        assert {name.split(".")[0] for name in adapted_layers(module)} == adapted
    module = nn.Sequential(named("q"), named("fc"))
    with pytest.raises(UserError, match=r"none of training.lora.target_modules is in the last 1 blocks"):
        add_adapters(module, list(module)[-1:], replace(PLAIN, target_modules=["q"]), WindowRng())


def test_layers_that_have_only_numbers_are_not_listed_as_names():
    with pytest.raises(UserError, match=r"their names are fc$"):
        match_targets(named("0", "fc", "11"), ["x"])

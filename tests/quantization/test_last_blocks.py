"""``training.train_last_blocks``: what runs before the last blocks has no gradient and keeps nothing, in every mode."""

from dataclasses import replace

import pytest
import torch

from tests.quantization.test_apply import INT8, NF4, build
from tracknet.api.plan import planner_of
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.apply import count_last_blocks
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.trainable_int8 import TrainableInt8Linear

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
MODES = {
    "default": (None, None, "auto"),
    "norms": (None, None, "norms"),
    "lora": (None, LORA, "auto"),
    "lora and all biases": (None, replace(LORA, bias="all"), "auto"),
    "int8": (INT8, None, "norms"),
    "int8_full": (replace(INT8, int8_trainable=True), None, "auto"),
    "fp16 weights": (replace(INT8, llm_int8_has_fp16_weight=True), None, "auto"),
    "qlora": (NF4, LORA, "auto"),
}
X = torch.randint(0, 256, (2, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("mode", MODES)
def test_only_the_last_blocks_train_and_nothing_before_them_is_kept(backbones, kind, mode):
    outputs = []

    def measure(last_blocks):
        outputs.clear()
        model = build(backbones, kind, *MODES[mode], last_blocks)
        for block in model.blocks:
            block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        with LiveBytes([X, *model.parameters(), *model.buffers()]) as meter:
            maps = model.backbone(X)
        return model, meter.live, maps

    everything, all_bytes, _ = measure(None)
    model, last_bytes, maps = measure(1)
    blocks = model.blocks
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained and trained < {n for n, p in everything.backbone.named_parameters() if p.requires_grad}
    before = {id(p) for block in blocks[:-1] for p in block.parameters()}
    before |= {id(p) for n, p in model.backbone.named_parameters() if "embed" in n or "downsampling" in n}
    assert not any(p.requires_grad for p in model.backbone.parameters() if id(p) in before)
    assert [out.requires_grad for out in outputs] == [False] * (len(blocks) - 1) + [True]
    assert last_bytes < 0.65 * all_bytes
    # Every trained parameter takes part: it gets a gradient from the last map.
    maps[-1].float().sum().backward()
    unused = {"hf.layernorm.weight", "hf.layernorm.bias"} if kind == "convnext" else set()  # of the pooled features
    trained = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad and n not in unused}
    assert trained and all(p.grad is not None for p in trained.values())


def test_weights_before_the_last_blocks_are_plain_codes_where_int8_weights_train(backbones):
    model = build(backbones, "vit", replace(INT8, int8_trainable=True), None, "auto", 1)
    first, last = (
        [type(m) for m in block.modules() if isinstance(m, (Int8Linear, TrainableInt8Linear))] for block in model.blocks
    )
    assert set(first) == {Int8Linear} and set(last) == {TrainableInt8Linear} and len(first) == len(last) == 6


@pytest.mark.parametrize("level", ["blocks", "full"])
@pytest.mark.parametrize("mode", ["default", "qlora"])
def test_recomputation_steps_aside_before_the_last_blocks(backbones, mode, level):
    """The same gradients, and a block without gradient runs once instead of being checkpointed."""
    gradients = []
    for checkpointed in (False, True):
        model = build(backbones, "vit", *MODES[mode], 1).train()
        if checkpointed:
            checkpoint_(model, level)
        runs = []
        model.blocks[0].attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        maps = model.backbone(X.repeat(3, 1, 1, 1))
        maps[-1].float().square().mean().backward()
        assert len(runs) == 1
        gradients.append([p.grad for p in model.backbone.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_a_plan_knows_that_nothing_is_kept(tiny):
    peaks = []
    for last in ("null", "1"):
        config = compose("synthetic", "vit_tiny_heatmap", "lora", [*tiny("vit"), f"training.train_last_blocks={last}"])
        peaks.append(planner_of(config, "cpu").estimate.bytes_by_kind(2))
    assert peaks[1]["activations"] < peaks[0]["activations"] and peaks[1]["gradients"] < peaks[0]["gradients"]


@pytest.mark.parametrize("mode", ["default", "lora"])
def test_more_blocks_than_there_are_is_an_error(backbones, mode):
    with pytest.raises(UserError, match=r"training\.train_last_blocks=9: the backbone has 2 blocks"):
        build(backbones, "vit", *MODES[mode], 9)


def test_a_model_without_a_backbone_has_no_blocks_to_train(tiny):
    from tracknet.planning.planner import Planner

    overrides = [o for o in tiny("vit") if not o.startswith("model.backbone")]
    config = compose("synthetic", "tracknet_v2", "default", [*overrides, "training.train_last_blocks=1"])
    planner = Planner(config.model, config.training, 3, (128, 72), "cpu")
    with pytest.raises(UserError, match=r"train_last_blocks=1 acts on the backbone"):
        _ = planner.estimate


@pytest.mark.parametrize(
    ("setting", "blocks", "count"),
    [(None, 12, None), (4, 12, 4), ("50%", 12, 6), ("50%", 5, 3), ("1%", 12, 1), ("100 %", 18, 18)],
)
def test_a_share_of_the_blocks_is_rounded_up(setting, blocks, count):
    assert count_last_blocks(setting, blocks) == count


@pytest.mark.parametrize("setting", ["0", "-1", "0%", "101%", "half", "50%%", "0.5"])
def test_other_numbers_of_blocks_are_refused(tiny, setting):
    with pytest.raises(UserError, match=r"train_last_blocks=.*: must be a number of blocks, such as 4, a share"):
        compose("synthetic", "vit_tiny_heatmap", "int8", [*tiny("vit"), f"training.train_last_blocks={setting}"])


def test_a_share_trains_what_the_number_trains(backbones):
    def trained(last_blocks):
        model = build(backbones, "vit", NF4, LORA, "auto", last_blocks)
        return [name for name, p in model.named_parameters() if p.requires_grad]

    assert trained("50%") == trained(1) != trained(None) == trained("100%")

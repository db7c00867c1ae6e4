"""A batch that goes through blocks in parts draws, computes and learns what the whole batch does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import MODES, NAMES, NF4, build
from tracknet.errors import UserError
from tracknet.memory.checkpointing import _checkpointed_forward, checkpoint_
from tracknet.models.backbone import BackboneConfig
from tracknet.models.decoder import DecoderConfig
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.adapters import LoraConfig

WINDOWS = 5
FRAMES = torch.randint(0, 256, (WINDOWS, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def step(model, first=2, seed=7):
    """Logits and gradient of a batch that begins at this place of a larger one."""
    model.zero_grad(set_to_none=True)
    with model.rng.scope(seed, first, WINDOWS):
        logits = model(FRAMES)
        logits.square().mean().backward()
    assert (model.rng.seed, model.rng.first, model.rng.count) == (None, 0, 0)
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def adapted(backbones, kind):
    """With adapters that drop half of what they see, and do something from the start."""
    model = build(backbones, kind, NF4, LoraConfig(lora_dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def near(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()


def record(model):
    """Return, by block and for the decoder, the shapes of what its forward is given, call by call."""
    shapes = {}
    for module in [*model.backbone.family.blocks(model.backbone.hf), model.head]:
        shapes[module] = []

        def forward(x, *args, inner=module.forward, seen=shapes[module], **kwargs):
            seen.append(x.shape)
            return inner(x, *args, **kwargs)

        module.forward = forward
    return shapes


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("values", [1, 6000, 170_000, 1 << 22])
def test_parts_draw_the_masks_of_the_whole_batch_and_are_no_larger_than_they_may_be(
    backbones, kind, values, monkeypatch
):
    """In parts of one window, of a few and of all, in forward and in backward; 5 windows are no multiple of 2 or 3."""
    logits, gradient = step(adapted(backbones, kind))
    for other in ({"first": 1}, {"seed": 8}):
        assert not near(step(adapted(backbones, kind), **other)[1], gradient)
    monkeypatch.setattr("tracknet.memory.checkpointing.PART", values)
    model = adapted(backbones, kind)
    shapes = record(model)
    checkpoint_(model, "full")
    found = step(model)
    assert near(found[0], logits) and near(found[1], gradient)
    for module, seen in shapes.items():
        rows = 1 if module is model.head else 3
        window = rows * seen[0][1:].numel()
        fit = min(WINDOWS, max(1, values // window))
        parts = [min(fit, WINDOWS - start) for start in range(0, WINDOWS, fit)]
        assert sorted(shape[0] for shape in seen) == sorted(rows * part for part in parts * 2)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("level", "number"), [("blocks", 0), ("full", 1)])
def test_blocks_go_at_once_and_at_full_in_parts_and_the_decoder_too(backbones, kind, level, number, monkeypatch):
    monkeypatch.setattr("tracknet.memory.checkpointing.PART", 1)
    model = build(backbones, kind, *MODES["default"]).train()
    shapes = record(model)
    assert checkpoint_(model, level) == len(shapes) - 1 + number
    step(model)
    calls = {"blocks": 2, "full": 2 * WINDOWS}[level]
    decoder = shapes.pop(model.head)
    assert all(len(seen) == calls for seen in shapes.values())
    assert len(decoder) == (calls if level == "full" else 1)


@pytest.mark.parametrize("kind", NAMES)
def test_what_keeps_nothing_is_not_checkpointed(backbones, kind, monkeypatch):
    """In evaluation, and without gradients, a batch goes through at once and only once."""
    monkeypatch.setattr("tracknet.memory.checkpointing.PART", 1)
    model = build(backbones, kind, *MODES["default"]).train()
    plain = model(FRAMES).detach()
    shapes = record(model)
    checkpoint_(model, "full")
    with torch.no_grad():
        assert near(model(FRAMES), plain)
    model.eval()(FRAMES).sum().backward()
    assert all(len(seen) == 2 for seen in shapes.values())


def test_images_that_are_no_windows_go_at_once(backbones, monkeypatch):
    monkeypatch.setattr("tracknet.memory.checkpointing.PART", 1)
    images = FRAMES.flatten(0, 1)[:4]
    model = build(backbones, "vit", *MODES["default"]).train()
    wanted = model.backbone(images)
    shapes = record(model)
    checkpoint_(model, "full")
    for a, b in zip(model.backbone(images), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert all([shape[0] for shape in seen] == [4] for module, seen in shapes.items() if module is not model.head)


@pytest.mark.parametrize("kind", NAMES)
def test_hits_and_bounces_come_out_of_a_decoder_in_parts(backbones, kind, monkeypatch):
    monkeypatch.setattr("tracknet.memory.checkpointing.PART", 200_000)
    config = ModelConfig(NAMES[kind], BackboneConfig(str(backbones[kind])), DecoderConfig(channels=32), events=True)
    model = build_model(config, 3).train()
    wanted = model(FRAMES, events=True)
    checkpoint_(model, "full")
    for a, b in zip(model(FRAMES, events=True), wanted, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def test_a_model_without_a_backbone_has_nothing_to_checkpoint():
    model = build_model(ModelConfig("tracknet_v2", None), 3)
    with pytest.raises(UserError, match="gradient_checkpointing=blocks recomputes the blocks of a backbone"):
        checkpoint_(model, "blocks")


def test_what_is_no_tensor_goes_to_every_part_and_lists_go_in_parts_like_tensors(monkeypatch):
    class Block(nn.Module):
        def forward(self, x, factor, others, nothing, power=1):
            assert nothing is None and all(len(other) == len(x) // 3 for other in others)
            return x**power * factor, others[0] + others[1]

    monkeypatch.setattr("tracknet.memory.checkpointing.PART", 2 * 3 * 4)
    block, seen = Block().train(), WindowRng()
    x, others = torch.randn(5 * 3, 4, requires_grad=True), [torch.randn(5, 2), torch.randn(5, 2)]
    run = _checkpointed_forward(block, SimpleNamespace(rng=seen), rows_per_window=3)
    first, second = run(x, 2.5, others, None, power=3)
    assert torch.allclose(first, 2.5 * x**3) and torch.equal(second, others[0] + others[1])
    first.sum().backward()
    assert torch.allclose(x.grad, 7.5 * x**2)

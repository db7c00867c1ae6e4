"""Level ``selective`` keeps the results of products and of attention, and recomputes everything else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memory.test_checkpointing import FRAMES, WINDOWS, adapted, step
from tests.quantization.test_apply import MODES, NAMES, build
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory import checkpointing
from tracknet.memory.checkpointing import _is_dear, checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.quantization import int8_cpu, recomputed_dropout
from tracknet.quantization.operators import OPERATORS, as_operators, operator

aten = torch.ops.aten


def gradients(model):
    model.zero_grad(set_to_none=True)
    with model.rng.scope(7, 2, WINDOWS):
        model(FRAMES).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_without_checkpointing_bit_for_bit(backbones, kind, mode):
    """The meter looks into the products, and what it counts lies between the levels beside."""
    found, live = [], {}
    for level in ("none", "selective", "blocks"):
        model = build(backbones, kind, *MODES[mode]).train()
        if level != "none":
            checkpoint_(model, level)
        found.append(gradients(model))
        with LiveBytes([FRAMES, *model.parameters(), *model.buffers()]) as meter, model.rng.scope(7, 2, WINDOWS):
            loss = model(FRAMES).square().mean()
        live[level] = meter.live
        del loss
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]) and torch.equal(grad, found[2][name]), name
    assert live["blocks"] < live["selective"] < live["none"]


@pytest.mark.parametrize("kind", NAMES)
def test_dropout_draws_the_same_masks_and_draws_them_once_in_forward(backbones, kind, monkeypatch):
    logits, gradient = step(adapted(backbones, kind))
    draw, draws = recomputed_dropout._draw_keep, []
    monkeypatch.setattr(recomputed_dropout, "_draw_keep", lambda *args: draws.append(1) or draw(*args))
    counts = {}
    for level in ("none", "selective", "blocks"):
        model = adapted(backbones, kind)
        if level != "none":
            checkpoint_(model, level)
        draws.clear()
        found = step(model)
        counts[level] = len(draws)
        assert torch.equal(found[0], logits) and torch.equal(found[1], gradient)
    # In forward and in backward, and with recomputation once more.
    assert counts["selective"] == counts["none"] < counts["blocks"]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX512")
def test_an_int8_product_is_multiplied_once(backbones, monkeypatch):
    multiply, products = int8_cpu.multiply, []
    monkeypatch.setattr(int8_cpu, "multiply", lambda *args: products.append(1) or multiply(*args))
    counts = {}
    for level in ("none", "selective", "blocks"):
        model = build(backbones, "vit", *MODES["int8"]).train()
        if level != "none":
            checkpoint_(model, level)
        products.clear()
        gradients(model)
        counts[level] = len(products)
    assert counts["selective"] == counts["none"] > 0 and counts["blocks"] > 1.5 * counts["none"]


def test_matrix_products_and_attention_run_once_and_norms_twice(backbones, monkeypatch):
    monkeypatch.setattr(checkpointing, "LOW_RANK", 16)  # the backbone has 32 channels

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls[func] = self.calls.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    calls = {}
    for level in ("none", "selective", "blocks"):
        model = build(backbones, "vit", *MODES["default"]).train()
        if level != "none":
            checkpoint_(model, level)
        with Count() as count, model.rng.scope(7, 2, WINDOWS):
            loss = model(FRAMES).square().mean()
            loss.backward()
        calls[level] = count.calls
    attention = next(op for op in calls["none"] if "scaled_dot_product" in str(op) and "backward" not in str(op))
    for op in (aten.addmm.default, attention):
        assert calls["selective"][op] == calls["none"][op] < calls["blocks"][op]
    for op in (aten.native_layer_norm.default, aten.gelu.default):
        assert calls["none"][op] < calls["selective"][op] == calls["blocks"][op]


def test_low_rank_products_are_recomputed():
    a, b = torch.empty(99, 16), torch.empty(16, 512)
    assert not _is_dear(aten.mm.default, (a, b)) and _is_dear(aten.mm.default, (torch.empty(9, 65), b))
    assert not _is_dear(aten.addmm.default, (torch.empty(512), a, b)) and not _is_dear(aten.gelu.default, (a,))
    assert {op for op in OPERATORS if _is_dear(op, ())} == set(OPERATORS)


def test_operators_are_called_as_such_only_where_something_looks():
    @operator("test_double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    op = torch.ops.tracknet.test_double.default
    for wanted in (False, True, False):
        seen = []
        with Look():
            if wanted:
                with as_operators():
                    assert (double(torch.ones(3)) == 2).all()
            else:
                assert (double(torch.ones(3)) == 2).all()
        assert (op in seen) == wanted
    with as_operators(), LiveBytes() as meter:
        result = double(torch.ones(1000))
    assert meter.live >= result.nbytes and op in OPERATORS
    del OPERATORS[op]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.compile=true", "selective cannot tell apart: set compile=false"),
        ("training.memory_optimization.use_cpu_offload=true", "requires another level of gradient_checkpointing"),
        ("training.memory_optimization.use_disk_offload=true", "requires another level of gradient_checkpointing"),
    ],
)
def test_what_selective_cannot_be_combined_with_is_refused(override, message):
    level = "training.memory_optimization.gradient_checkpointing=selective"
    with pytest.raises(UserError, match=message):
        compose("synthetic", "vit_tiny_heatmap", "default", [override, level])

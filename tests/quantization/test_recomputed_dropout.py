"""Dropout whose mask is drawn again: the same numbers as with a mask that was kept."""

import pytest
import torch
from torch import nn

from tests.quantization.test_apply import build
from tests.quantization.test_lora import stir
from tracknet.memory import checkpointing
from tracknet.memory.checkpointing import checkpoint_
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.recomputed_dropout import DropoutLinear


def layer(p=0.25):
    torch.manual_seed(0)
    return DropoutLinear(nn.Linear(64, 8, bias=False), p, WindowRng(), 0).train()


def test_it_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(1)
    identity = nn.Linear(256, 256, bias=False)
    nn.init.eye_(identity.weight)
    out = DropoutLinear(identity, 0.25, WindowRng(), 0).train()(torch.ones(1000, 256))
    assert abs((out == 0).float().mean() - 0.25) < 0.005
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.75))


def test_every_value_is_dropped_alike_and_independently_of_its_neighbors():
    """A mask is drawn eight values at a time: none of the eight may be special, and none may follow another."""
    identity = nn.Linear(64, 64, bias=False)
    nn.init.eye_(identity.weight)
    dropped = (DropoutLinear(identity, 0.1, WindowRng(), 0).train()(torch.ones(40000, 64)) == 0).float()
    assert (dropped.mean(dim=0) - 26 / 256).abs().max() < 0.008  # five standard errors
    correlation = torch.corrcoef(dropped.T) - torch.eye(64)
    assert correlation.abs().max() < 0.027


def test_sizes_that_eight_does_not_divide_and_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lin = DropoutLinear(nn.Linear(5, 3, bias=False), 0.5, WindowRng(), 0).to(dtype).train()
        x = torch.randn(7, 5, dtype=dtype, requires_grad=True)
        lin(x).sum().backward()
        assert x.grad.shape == x.shape and lin.weight.grad.isfinite().all() and 0 < (x.grad == 0).sum() < 35


def test_gradients_are_those_of_the_mask_that_forward_used():
    """The function is linear in the input: so its value is the gradient times the input, to the last mask bit."""
    lin, x = layer(), torch.randn(5, 7, 64, requires_grad=True)
    out = lin(x)
    g = torch.randn_like(out)
    out.backward(g)
    assert torch.allclose((x.grad * x).sum(), (g * out).sum(), rtol=1e-4)
    assert torch.allclose((lin.weight.grad * lin.weight).sum(), (g * out).sum(), rtol=1e-4)
    dropped = x.grad == 0
    assert abs(dropped.float().mean() - 0.25) < 0.05


def test_it_repeats_with_the_seed_and_differs_without():
    lin, x = layer(), torch.randn(5, 64)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(lin(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    torch.manual_seed(3)
    assert torch.equal(lin(x), outs[0]) and not torch.equal(lin(x), outs[0])  # each call draws anew


def test_nothing_is_dropped_in_evaluation():
    lin, x = layer().eval(), torch.randn(5, 64)
    assert torch.equal(lin(x), x @ lin.weight.T)


def test_a_window_draws_the_same_in_any_part_of_its_batch():
    lin, x = layer(), torch.randn(12, 7, 64)  # four windows of three frames
    with lin.rng.scope(seed=5, first=0, count=4):
        whole = lin(x)
    with lin.rng.scope(seed=5, first=0, count=3):
        first = lin(x[:9])
    with lin.rng.scope(seed=5, first=3, count=1):
        last = lin(x[9:])
    assert torch.equal(whole, torch.cat([first, last]))
    for other in ({"seed": 6, "first": 0}, {"seed": 5, "first": 1}):
        with lin.rng.scope(**other, count=4):
            assert not torch.equal(lin(x), whole)
    lin.number = 1
    with lin.rng.scope(seed=5, first=0, count=4):
        assert not torch.equal(lin(x), whole)  # another layer, other masks


def identity(p, size=64):
    lin = DropoutLinear(nn.Linear(size, size, bias=False), p, WindowRng(), 0).train()
    nn.init.eye_(lin.weight)
    return lin


@pytest.mark.parametrize(("p", "steps"), [(0.001, 1), (0.25, 64), (0.1, 26), (0.5, 128), (0.999, 255)])
def test_the_share_is_rounded_to_256ths_and_never_to_none_or_all(p, steps):
    torch.manual_seed(0)
    out = identity(p)(torch.ones(20_000, 64))
    share = steps / 256
    assert abs((out == 0).float().mean() - share) < 5 * (share * (1 - share) / out.numel()) ** 0.5
    assert torch.allclose(out[out != 0], torch.tensor(256 / (256 - steps)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_kept_are_kept_to_the_bit(dtype):
    lin = identity(0.5).to(dtype)
    x = torch.randn(100, 64, dtype=dtype)
    out = lin(x)
    kept = out != 0
    assert out.dtype == dtype and 0.4 < kept.float().mean() < 0.6 and torch.equal(out[kept], 2 * x[kept])


def test_gradients_are_the_ones_of_a_mask_that_is_written_out():
    lin, x = layer(0.25), torch.randn(5, 7, 64, requires_grad=True)
    torch.manual_seed(2)
    out = lin(x)
    g = torch.randn_like(out)
    out.backward(g)
    seen = identity(0.25)
    torch.manual_seed(2)
    mask = seen(torch.ones(5, 7, 64))  # 0 or 1 / (1 - p)
    assert torch.allclose(out, (x * mask) @ lin.weight.T, atol=1e-5)
    assert torch.allclose(x.grad, (g @ lin.weight) * mask, atol=1e-5)
    assert torch.allclose(lin.weight.grad, torch.einsum("bto,bti->oi", g, x * mask), atol=1e-4)


def test_only_gradients_that_are_wanted_are_computed():
    for input_trains, weight_trains in ((True, False), (False, True)):
        lin, x = layer(), torch.randn(5, 64, requires_grad=input_trains)
        lin.weight.requires_grad_(weight_trains)
        lin(x).sum().backward()
        assert (x.grad is not None) is input_trains and (lin.weight.grad is not None) is weight_trains


def test_under_autocast_the_input_and_the_product_have_16_bits():
    lin, x = layer(), torch.randn(5, 64, requires_grad=True)
    saved = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t),
    ):
        out = lin(x)
    assert out.dtype == torch.bfloat16 and saved == [torch.bfloat16] * 2
    out.float().sum().backward()
    assert x.grad.dtype == lin.weight.grad.dtype == torch.float32
    assert layer()(torch.randn(5, 64)).dtype == torch.float32


def test_a_share_of_nothing_drops_nothing_and_draws_nothing():
    lin, x = layer(0.0), torch.randn(5, 64)
    state = torch.get_rng_state()
    assert torch.equal(lin(x), x @ lin.weight.T) and torch.equal(torch.get_rng_state(), state)


def test_it_takes_over_the_layer_that_it_replaces():
    linear, rng = nn.Linear(5, 3, bias=False), WindowRng()
    lin = DropoutLinear(linear, 0.5, rng, 7)
    assert lin.weight is linear.weight and lin.bias is None and lin.rng is rng
    assert (lin.in_features, lin.out_features, lin.p, lin.number) == (5, 3, 0.5, 7)


def test_windows_are_known_inside_of_their_context_only():
    rng = WindowRng()
    with rng.scope(seed=5, first=2, count=3):
        outer = rng.seeds(0)
        assert len(set(outer)) == 3 and outer == rng.seeds(0)
        with pytest.raises(RuntimeError), rng.scope(seed=5, first=3, count=2):
            assert rng.seeds(0) == outer[1:]
            raise RuntimeError
        assert rng.seeds(0) == outer and set(rng.seeds(1)).isdisjoint(outer)
    assert (rng.seed, rng.first, rng.count, rng.state) == (None, 0, 0, None)
    torch.manual_seed(0)
    (first,), (second,) = rng.seeds(0), rng.seeds(0)
    assert first != second


@pytest.mark.parametrize("windows_per_part", [1, 2, 3])
def test_parts_of_a_checkpointed_block_drop_what_the_whole_block_drops(backbones, monkeypatch, windows_per_part):
    """The masks of a window depend on its place in the batch, not in the part of it that a block is run in."""
    model = stir(build(backbones, "vit", None, LoraConfig(r=4, lora_dropout=0.5))).train()
    frames = torch.randint(0, 256, (12, 3, 72, 128), dtype=torch.uint8)  # four windows of three
    with torch.no_grad(), model.rng.scope(seed=3, first=5, count=4):
        whole = model.backbone(frames)[-1]
        assert not torch.allclose(model.eval().backbone(frames)[-1], whole, atol=0.1)
    rows, tokens = [], 1 + 6 * 10
    block = model.train().backbone.family.blocks(model.backbone.hf)[1]
    block.norm1.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    monkeypatch.setattr(checkpointing, "PART", windows_per_part * 3 * tokens * 32)
    checkpoint_(model, "full")
    with model.rng.scope(seed=3, first=5, count=4):
        in_parts = model.backbone(frames)[-1]
    assert sum(rows) == 12 and max(rows) == 3 * windows_per_part
    assert torch.allclose(in_parts, whole, atol=1e-5)

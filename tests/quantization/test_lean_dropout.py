"""Dropout whose mask is drawn again: the same numbers as with a mask that was kept."""

import torch
from torch import nn

from tracknet.models.windows import Windows
from tracknet.quantization.lean_dropout import DroppedLinear


def layer(p=0.25):
    torch.manual_seed(0)
    return DroppedLinear(nn.Linear(64, 8, bias=False), p, Windows(), 0).train()


def test_it_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(1)
    identity = nn.Linear(256, 256, bias=False)
    nn.init.eye_(identity.weight)
    out = DroppedLinear(identity, 0.25, Windows(), 0).train()(torch.ones(1000, 256))
    assert abs((out == 0).float().mean() - 0.25) < 0.005
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.75))


def test_every_value_is_dropped_alike_and_independently_of_its_neighbours():
    """A mask is drawn eight values at a time: none of the eight may be special, and none may follow another."""
    identity = nn.Linear(64, 64, bias=False)
    nn.init.eye_(identity.weight)
    dropped = (DroppedLinear(identity, 0.1, Windows(), 0).train()(torch.ones(40000, 64)) == 0).float()
    assert (dropped.mean(dim=0) - 26 / 256).abs().max() < 0.008  # five standard errors
    correlation = torch.corrcoef(dropped.T) - torch.eye(64)
    assert correlation.abs().max() < 0.027


def test_sizes_that_eight_does_not_divide_and_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lin = DroppedLinear(nn.Linear(5, 3, bias=False), 0.5, Windows(), 0).to(dtype).train()
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
    with lin.windows.at(seed=5, first=0, count=4):
        whole = lin(x)
    with lin.windows.at(seed=5, first=0, count=3):
        first = lin(x[:9])
    with lin.windows.at(seed=5, first=3, count=1):
        last = lin(x[9:])
    assert torch.equal(whole, torch.cat([first, last]))
    for other in ({"seed": 6, "first": 0}, {"seed": 5, "first": 1}):
        with lin.windows.at(**other, count=4):
            assert not torch.equal(lin(x), whole)
    lin.number = 1
    with lin.windows.at(seed=5, first=0, count=4):
        assert not torch.equal(lin(x), whole)  # another layer, other masks

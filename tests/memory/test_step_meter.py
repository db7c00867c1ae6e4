"""A step's bytes by kind add up, and the peak is where it is said to be."""

import torch
from torch import nn

from tracknet.memory.meter import LiveBytes
from tracknet.memory.step_meter import KINDS, StepMeter, storage_bytes


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 8))
    net[2].requires_grad_(False)
    return net


def state(optimizer):
    return [t for s in optimizer.state.values() for t in s.values()]


def test_the_kinds_add_up_to_a_count_of_all_tensors():
    net, x = model(), torch.randn(500, 64)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    for measured in (False, True):
        optimizer.zero_grad(set_to_none=True)
        if not measured:
            net(x).square().mean().backward()
            optimizer.step()
            continue
        with StepMeter(net, state(optimizer), [x]) as meter:
            net(x).square().mean().backward()
            optimizer.step()
        peak = meter.result()
    optimizer.zero_grad(set_to_none=True)
    with LiveBytes([x, *net.parameters(), *state(optimizer)]) as plain:
        net(x).square().mean().backward()
        optimizer.step()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert list(peak.by_kind) == list(KINDS) and sum(peak.by_kind.values()) == peak.num_bytes
    assert peak.num_bytes == plain.peak + storage_bytes([x, *net.parameters(), *state(optimizer)])
    assert peak.by_kind["weights"] == storage_bytes(net[2].parameters())
    assert peak.by_kind["trained_weights"] == storage_bytes(trained)
    assert peak.by_kind["optimizer"] == storage_bytes(state(optimizer))
    # At least the input, GELU's input and output; GELU's backward makes one more of that size in passing.
    hidden = 500 * 256 * 4
    assert peak.by_kind["activations"] >= x.numel() * 4 + 2 * hidden - hidden and peak.by_kind["temporary"] >= hidden
    assert peak.phase == "backward" and peak.place in ("1", "2")


def test_gradients_count_as_such_once_they_are_there():
    net, x = nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 1000)), torch.randn(2, 4)
    with StepMeter(net, [], [x]) as meter:
        net(x).sum().backward()
        torch.empty(5000, 1000)  # larger than anything before: the peak, when all gradients are there
    peak = meter.result()
    assert peak.by_kind["gradients"] == storage_bytes(p.grad for p in net.parameters())
    assert peak.by_kind["temporary"] == 5000 * 1000 * 4


def test_a_peak_in_the_optimizer_is_said_to_be_there():
    net, x = nn.Linear(1000, 1000), torch.randn(2, 1000)
    optimizer = torch.optim.AdamW(net.parameters(), foreach=True)  # which takes the roots of all second moments at once
    with StepMeter(net, [], [x]) as meter:
        net(x).sum().backward()
        optimizer.step()
    peak = meter.result()
    assert (peak.phase, peak.place) == ("update", "the optimizer") and "in update, at the optimizer" in str(peak)


def test_what_forward_frees_is_passing_and_what_it_leaves_is_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            kept = self.weight * x  # x is saved: it is the batch; the product by sin
            out = kept.sin()
            torch.empty(4000 * 1000)  # freed at once, and the largest
            return out

    x = torch.ones(1000, 1000)
    with StepMeter(Net(), [], [x]) as meter:
        net = Net()
        net(x).sum().backward()
    peak = meter.result()
    assert peak.phase == "forward" and peak.by_kind["temporary"] >= 4000 * 1000 * 4
    assert peak.by_kind["activations"] - x.numel() * 4 >= 1000 * 1000 * 4

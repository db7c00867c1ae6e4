"""A step's bytes by kind add up, and the peak is where it is said to be."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tracknet.memory.meter import LiveBytes
from tracknet.memory.step_meter import KINDS, StepMeter, StepPeak, split_trained_weights, storage_bytes
from tracknet.quantization.trainable_int8 import TrainableInt8Linear


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


def test_a_peak_is_told_in_megabytes_by_kind():
    sizes = dict(zip(KINDS, (1.4e6, 2e6, 3e6, 1234e6, 5e6, 0)))
    assert (
        str(StepPeak(1_245_400_000, sizes, "backward", "head.fuse")) == "1,245 MB in backward, at head.fuse "
        "(weights 1, trained weights 2, gradients 3, optimizer 1,234, activations 5, temporary 0)"
    )


def test_a_step_in_which_nothing_happens_takes_what_was_there():
    net, x = model(), torch.randn(5, 64)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with StepMeter(net, [torch.ones(7)], [x, x[:2]]) as meter:
        pass
    peak = meter.result()
    assert (peak.phase, peak.place) == ("forward", "")
    trained = storage_bytes([*net[0].parameters(), *net[3].parameters()])
    assert tuple(peak.by_kind.values()) == (
        storage_bytes(net[2].parameters()),
        trained,
        256 * 64 * 4,
        28,
        5 * 64 * 4,
        0,
    )


def test_what_the_optimizer_takes_in_passing_is_temporary():
    net, x = nn.Linear(1000, 1000, bias=False), torch.randn(2, 1000)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    with StepMeter(net, [], [x]) as meter:
        net(x).sum().backward()
        optimizer.step()  # which makes its state
    peak = meter.result()
    assert peak.phase == "update" and peak.by_kind["temporary"] == 4_000_000 == peak.by_kind["gradients"]


def test_a_peak_in_forward_is_at_the_innermost_module_that_is_at_work():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5000))
            self.broken = Broken()

        def forward(self, x):
            wide = self.inner(x)
            try:
                self.broken(x)
            except ValueError:
                return wide.sum(dim=1), wide.expand(3, *wide.shape).contiguous()

    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError

    x = torch.randn(50, 4)
    for largest, place in ((1, "the loss"), (0, "")):
        with StepMeter(Net(), [], [x]) as meter:
            net = meter._model
            _, tripled = net(x)
            if largest:
                tripled.repeat(2, 1, 1)
        assert (meter.result().phase, meter.result().place) == ("forward", place or "the loss")
    with StepMeter(Net(), [], [x]) as meter:
        meter._model.inner(x)
    assert meter.result().place == "inner.1"


def test_a_peak_in_backward_is_at_the_module_whose_nodes_are_run_or_at_the_loss():
    class Loss(nn.Module):  # no part of the model
        def forward(self, x):
            return torch.cat([x] * 400).sin().sum() if self.large else x.sum()

    x = torch.randn(100, 8)
    for large in (True, False):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2000), nn.Tanh(), nn.Linear(2000, 8))
        loss = Loss()
        loss.large = large
        with StepMeter(net, [], [x]) as meter:
            loss(net(x)).backward()
        peak = meter.result()
        assert (peak.phase, peak.place in ("the loss",)) == ("backward", large)
        assert large or peak.place in ("2", "3")


def test_the_first_node_of_a_loss_is_no_part_of_the_model_before_it():
    class Loss(nn.Module):
        def forward(self, x):
            return x.sin().sum()

    net, x = nn.Sequential(nn.Linear(8, 2000)), torch.randn(100, 8)
    with StepMeter(net, [], [x]) as meter:
        Loss()(net(x)).backward()
    assert (meter.result().phase, meter.result().place) == ("backward", "the loss")


def test_what_is_recomputed_in_backward_is_at_the_module_that_does_it():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 4000), nn.Linear(4000, 8)

        def forward(self, x):
            return self.down(self.up(x).sin())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Wide(), Wide()

        def forward(self, x):
            return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)

    with StepMeter(Net(), [], [x := torch.randn(100, 8, requires_grad=True)]) as meter:
        meter._model(x).sum().backward()
    peak = meter.result()
    assert peak.phase == "backward" and peak.place.split(".")[0] in ("first", "second")
    assert peak.by_kind["activations"] < 20_000 < 3_000_000 < peak.by_kind["temporary"]


def test_every_weight_is_in_one_of_two_lists_and_codes_that_train_are_in_the_first():
    layer = TrainableInt8Linear(nn.Linear(64, 48), 0.0)
    net = nn.Sequential(nn.Sequential(layer, nn.BatchNorm1d(48)), nn.Linear(48, 3))
    net[1].weight.requires_grad_(False)
    trained, frozen = split_trained_weights(net)
    names = {id(t): name for name, t in [*net.named_parameters(), *net.named_buffers()]}
    assert sorted(names[id(t)] for t in trained) == [
        "0.0.bias",
        "0.0.scale",
        "0.0.weight",
        "0.1.bias",
        "0.1.weight",
        "1.bias",
    ]
    assert sorted(names[id(t)] for t in frozen) == [
        "0.1.num_batches_tracked",
        "0.1.running_mean",
        "0.1.running_var",
        "1.weight",
    ]


def test_a_storage_counts_once_and_on_its_own_device_only():
    x = torch.ones(100)
    assert storage_bytes([x, x[:3], x.view(10, 10), torch.ones(2, dtype=torch.float64)]) == 416
    assert storage_bytes([x], "cpu") == 400 and storage_bytes([x], "cuda") == 0 == storage_bytes([])
    assert storage_bytes([torch.ones(3, device="meta")]) == 0

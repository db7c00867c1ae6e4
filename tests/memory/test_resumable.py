"""An optimizer's step that memory interrupts anywhere, taken up again, is the step that was not interrupted."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracknet.memory.resumable import ResumableAdamW
from tracknet.quantization.trainable_int8 import TrainableInt8Linear, int8_layers
from tracknet.training.bnb_optimizers import AdamW8bit


class _RunsOut(TorchDispatchMode):
    """Memory runs out once, at the n-th operator; counts them."""

    def __init__(self, index=None):
        super().__init__()
        self.index, self.count = index, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # which marks a timeline and allocates nothing
            self.count += 1
            if self.count - 1 == self.index:
                raise torch.OutOfMemoryError("CUDA out of memory")
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_add_.Scalar:
            torch.autograd.graph.increment_version(args[0])  # as without a mode, under which torch leaves it out
        return out


class _RunsOutInside:
    """The same among the operators of which bitsandbytes' updates are made on a CPU, and which a mode does not see."""

    METHODS = ("mul_", "add_", "addcmul_", "addcdiv_", "sqrt", "copy_")

    def __init__(self, index=None):
        self.index, self.count, self.patches = index, 0, ExitStack()

    def __enter__(self):
        for name in self.METHODS:
            self.patches.enter_context(
                mock.patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
            )
        return self

    def __exit__(self, *exception):
        self.patches.close()

    def _counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            if self.count - 1 == self.index:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return method(*args, **kwargs)

        return call


def adamw():
    """Three groups of which each has a rate of its own."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 4)) for _ in range(5)]
    groups = [
        {"params": weights[:2]},
        {"params": weights[2:3], "lr": 0.3},
        {"params": weights[3:], "weight_decay": 0.2},
    ]
    return weights, ResumableAdamW(groups, lr=0.1)


def adamw8bit():
    """Two groups: weights whose state is 8 bits and 32 bits, and int8 codes that train."""
    torch.manual_seed(0)
    layer = TrainableInt8Linear(nn.Linear(64, 64), 0.0)
    weights = [nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(8)), layer.bias, layer.weight_grad_proxy]
    optimizer = AdamW8bit([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02}], lr=0.01)
    optimizer.layers, optimizer.seed = int8_layers(layer), 0
    return [*weights, layer.weight, layer.scale], optimizer


def steps(build, *failures):
    """Take a step for each failure (or ``None``), and once more where it fails; return every tensor that they
    changed."""
    tensors, optimizer = build()
    for number, failure in enumerate(failures):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        with failure or _RunsOut():
            try:
                optimizer.step()
                continue
            except torch.OutOfMemoryError:
                pass
        optimizer.step()
    state = [t for p in optimizer.state.values() for t in p.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*tensors, *state)]


@pytest.mark.parametrize(("build", "kind"), [(adamw, _RunsOut), (adamw8bit, _RunsOut), (adamw8bit, _RunsOutInside)])
@pytest.mark.parametrize("step", [0, 1])
def test_no_parameter_is_updated_twice_or_left_out_wherever_memory_runs_out(build, kind, step):
    """In the first step, which makes the state, and in a later one; a third shows that nothing is kept too long."""
    counter = kind()
    steps(build, *[None] * step, counter)
    wanted = steps(build, None, None, None)
    assert counter.count > 5
    for index in range(counter.count):
        failures = [None, None, None]
        failures[step] = kind(index)
        found = steps(build, *failures)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), index


def test_a_step_that_fails_again_elsewhere_goes_on_from_there():
    wanted, optimizer = adamw()
    for p in wanted:
        p.grad = torch.ones_like(p)
    optimizer.step()
    found, optimizer = adamw()
    for p in found:
        p.grad = torch.ones_like(p)
    interruptions, index = 0, 0
    while True:
        try:
            with _RunsOut(index):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            interruptions, index = interruptions + 1, index + 1
    assert interruptions > 1 and all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_an_interrupted_step_leaves_the_groups_as_they_were():
    weights, optimizer = adamw()
    for p in weights:
        p.grad = torch.ones_like(p)
    groups = list(optimizer.param_groups)
    with pytest.raises(torch.OutOfMemoryError), _RunsOut(0):
        optimizer.step()
    assert [id(g) for g in optimizer.param_groups] == [id(g) for g in groups]


@pytest.mark.parametrize("kind", [ResumableAdamW, AdamW8bit])
def test_settings_are_those_that_are_given_and_hold_where_a_group_says_nothing(kind):
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}], lr=0.25, betas=(0.5, 0.75))
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.5]
    assert all(tuple(g["betas"]) == (0.5, 0.75) for g in optimizer.param_groups)
    # The first step of Adam has the size of the learning rate; weight decay, 1% of it, comes on top.
    assert [round(1 - p[0].item(), 2) for p in weights] == [0.25, 0.5]

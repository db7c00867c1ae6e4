"""What waits in files is what backward needs and nothing else, and comes back as it was."""

import os

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from tests.memory.conftest import GPU
from tracknet.memory.meter import LiveBytes
from tracknet.memory.offload import MIN_BYTES, offload_activations

CPU = torch.device("cpu")


@pytest.fixture
def written(monkeypatch):
    """Sizes of all tensors that go to files."""
    sizes, real = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: sizes.append(k["size"]) or real(*a, **k))
    return sizes


@pytest.mark.parametrize(("values", "goes"), [(MIN_BYTES // 4 - 1, False), (MIN_BYTES // 4, True)])
def test_what_is_small_stays(tmp_path, written, values, goes):
    assert MIN_BYTES == 256 * 1024
    x = torch.randn(values, requires_grad=True)
    with offload_activations(nn.Identity(), CPU, tmp_path):
        y = x.exp().sin()
    y.sum().backward()
    assert written == [values] * (2 if goes else 0) and torch.allclose(x.grad, x.exp().cos() * x.exp())


@pytest.fixture
def all_sizes(monkeypatch):
    monkeypatch.setattr("tracknet.memory.offload.MIN_BYTES", 0)


def test_weights_and_buffers_stay_and_so_do_views_of_them(tmp_path, written, all_sizes):
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7).eval())
    x = torch.randn(2, 5, requires_grad=True)
    with offload_activations(model, CPU, tmp_path):
        (model(x).sum() + linear(x, model[0].weight[:3]).sum()).backward()
    assert 10 in written and 14 in written and not {35, 15, 7} & set(written)


@pytest.mark.parametrize(
    "copy",
    [
        lambda w: w,
        lambda w: w.t(),
        lambda w: w.transpose(0, 1),
        lambda w: w.view(8, 3),
        lambda w: w.t().t().view(3, 8).t(),
    ],
)
def test_casts_of_weights_stay_however_they_are_turned(tmp_path, written, all_sizes, copy):
    weight = nn.Parameter(torch.randn(6, 4))
    with offload_activations(nn.ParameterList([weight]), CPU, tmp_path):
        cast = copy(weight.to(torch.bfloat16))
        x = torch.randn(5, cast.shape[0], dtype=torch.bfloat16, requires_grad=True)
        (x @ cast).sum().backward()
    assert written == [x.numel()]


def test_what_is_computed_from_weights_is_no_copy_of_them(tmp_path, written, all_sizes):
    weight = nn.Parameter(torch.randn(6, 4))
    with offload_activations(nn.ParameterList([weight]), CPU, tmp_path):
        weight.exp().sum().backward()
    assert written == [24]


def test_sparse_tensors_stay(tmp_path, written, all_sizes):
    sparse = torch.eye(5).to_sparse()
    x = torch.randn(5, 2, requires_grad=True)
    with offload_activations(nn.Identity(), CPU, tmp_path):
        torch.sparse.mm(sparse, x).sum().backward()
    assert written == [] and torch.equal(x.grad, torch.ones(5, 2))


def test_what_comes_back_may_be_changed_and_asked_for_again(tmp_path, all_sizes):
    """Backward twice over the same graph: what the first did in place must not reach the file."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return x.mul_(2) * grad

    x = torch.randn(10, requires_grad=True)
    with offload_activations(nn.Identity(), CPU, tmp_path):
        y = InPlace.apply(x * 1)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
        assert torch.equal(gradient, 2 * x)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", [None, "host"])
def test_on_a_cpu_nothing_moves_to_where_it_is(place, written, all_sizes):
    with LiveBytes() as meter, offload_activations(nn.Identity(), CPU, place):
        kept = torch.ones(1000, requires_grad=True).exp()
        assert meter.live == 8000 and kept.grad_fn._saved_result.data_ptr() == kept.data_ptr()
    assert written == []


def test_for_planning_nothing_is_kept_and_shapes_come_back(all_sizes):
    x = torch.randn(4, 250, dtype=torch.float64, requires_grad=True)
    with LiveBytes([x]) as meter:
        with offload_activations(nn.Identity(), CPU, "nowhere"):
            y = x.exp().sin().sum()
        assert meter.live == 8
        y.backward()
    assert x.grad.shape == x.shape and x.grad.device == CPU and x.grad.dtype == torch.float64


def test_a_gpu_copies_beside_its_computation_and_brings_back_one_ahead(played_gpu, all_sizes):
    """Stream 1 copies: after what stream 0 has computed, and before what it will compute from."""
    x = torch.randn(5, requires_grad=True)
    with offload_activations(nn.Identity(), GPU, "host"):
        a = x.exp()  # saves its result
        b = torch.cat([a, a]).sin()  # saves its argument
    save = [(1, "wait for stream", 0), (1, "to the host", 5), (1, "event", 0), (1, "used by", 5)]
    then = [(1, "wait for stream", 0), (1, "to the host", 10), (1, "event", 1), (1, "used by", 10)]
    assert played_gpu == save + then
    played_gpu.clear()
    b.sum().backward()
    assert played_gpu == [
        (1, "wait for event", 1),
        (1, "to the GPU", 10),
        (1, "event", 0),
        (1, "wait for event", 0),
        (1, "to the GPU", 5),
        (1, "event", 1),
        (0, "wait for event", 0),
        (0, "used by", 10),
        (0, "wait for event", 1),
        (0, "used by", 5),
    ]
    assert torch.allclose(x.grad, 2 * x.exp().cos() * x.exp())


def test_what_a_gpu_saved_can_be_asked_for_again_and_what_nobody_wants_is_not_brought(played_gpu, all_sizes):
    x = torch.randn(5, requires_grad=True)
    with offload_activations(nn.Identity(), GPU, "host"):
        unwanted = x.exp()
        del unwanted
        y = torch.cat([x, x]).sin().sum()
    wanted = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], wanted) and torch.allclose(wanted, 2 * x.cos())
    brought = [number for _, what, number in played_gpu if what == "to the GPU"]
    assert brought == [10, 10]


def test_small_things_and_weights_stay_on_a_gpu(played_gpu):
    model = nn.Linear(300, 300)
    x = torch.randn(400, 300, requires_grad=True)
    with offload_activations(model, GPU, "host"):
        y = model(x)[:2].exp()
    y.sum().backward()
    assert [number for _, what, number in played_gpu if what == "to the host"] == [400 * 300]


def test_files_bring_activations_to_the_device_that_they_came_from(tmp_path, all_sizes):
    """The meta device stands for a GPU on the way back; its content is of no interest."""
    asked = []
    x = torch.randn(7, requires_grad=True)
    hooks = offload_activations(nn.Identity(), CPU, tmp_path)
    home, mapped = hooks.pack_hook(x * 1)
    assert home == CPU and mapped.untyped_storage().filename is not None
    asked.append(hooks.unpack_hook((torch.device("meta"), mapped)))
    assert asked[0].is_meta and asked[0].shape == x.shape
    back = hooks.unpack_hook((home, mapped))
    assert torch.equal(back, x) and back.data_ptr() != mapped.data_ptr()

"""The int8 layer against its dequantised reference, on the real bitsandbytes operators."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tracknet.quantization import int8, int8_cpu
from tracknet.quantization.int8 import Int8Linear


def layer(threshold=0.0, has_fp16_weight=False, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    return linear, Int8Linear(linear, threshold, has_fp16_weight)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (2, 3, 4, 64), (64,)])
def test_any_rank_goes_in(shape):
    linear, quantised = layer()
    x = torch.randn(shape)
    assert quantised(x).shape == linear(x).shape
    assert relative(quantised(x), linear(x)) < 0.02


def test_the_weight_takes_a_quarter():
    _, quantised = layer(bias=False)
    size = sum(t.numel() * t.element_size() for t in [*quantised.parameters(), *quantised.buffers()])
    assert size == 48 * 64 + 48 * 4


def test_the_gradient_of_the_input_is_that_of_the_dequantised_weight():
    _, quantised = layer(threshold=6.0)
    x = torch.randn(10, 64, requires_grad=True)
    g = torch.randn(10, 48)
    quantised(x).backward(g)
    assert relative(x.grad, g @ quantised.dequantize()) < 1e-6
    assert quantised.weight.grad is None and torch.allclose(quantised.bias.grad, g.sum(dim=0))


def test_outlier_columns_are_multiplied_in_full_precision():
    linear, exact = layer(threshold=6.0)
    _, plain = layer(threshold=0.0)
    x = torch.randn(32, 64)
    x[:, 7] *= 600
    # Against the dequantised weight: what is left is the rounding of activations, which one outlier spoils for its row.
    wanted = x @ exact.dequantize().T + linear.bias
    assert relative(exact(x), wanted) < 0.05 * relative(plain(x), wanted)


def test_under_autocast_outliers_are_still_exact_and_the_output_has_its_dtype():
    linear, exact = layer(threshold=6.0)
    x = torch.randn(32, 64)
    x[:, 7] *= 600
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = exact(x)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), x @ exact.dequantize().T + linear.bias) < 2**-8  # what bf16 rounds


def test_a_transposed_input_gives_the_same():
    _, quantised = layer(threshold=6.0)
    x = torch.randn(64, 10).T
    assert not x.is_contiguous() and torch.equal(quantised(x), quantised(x.contiguous()))


def test_nothing_but_codes_and_scales_is_kept_for_backward():
    _, quantised = layer(threshold=6.0)
    x = torch.randn(4, 64, requires_grad=True)
    hidden = x * 2
    alive = weakref.ref(hidden)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = quantised(hidden)
    del hidden
    gc.collect()
    assert alive() is None
    assert set(saved) <= {quantised.weight.data_ptr(), quantised.scale.data_ptr()}
    out.sum().backward()


def test_state_loads_after_forwards_and_the_outputs_are_equal():
    _, one = layer(threshold=6.0)
    torch.manual_seed(5)
    two = Int8Linear(nn.Linear(64, 48), 6.0, False)
    x = torch.randn(3, 64)
    one(x), two(x)
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), two(x))


def test_a_trained_weight_is_never_stale():
    _, quantised = layer(has_fp16_weight=True)
    x = torch.randn(8, 64)
    before = quantised(x).detach()
    optimizer = torch.optim.SGD(quantised.parameters(), lr=0.1)
    quantised(x).square().mean().backward()
    # The gradient of the product in full precision, straight through the rounding.
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    after = quantised(x).detach()
    assert not torch.equal(before, after)
    fresh = Int8Linear(nn.Linear(64, 48), 0.0, True)
    fresh.load_state_dict(quantised.state_dict())
    assert torch.equal(after, fresh(x))


def test_the_gradient_of_a_trained_weight():
    linear, quantised = layer(has_fp16_weight=True)
    reference = nn.Linear(64, 48)
    reference.load_state_dict(linear.state_dict())
    x, g = torch.randn(6, 64), torch.randn(6, 48)
    quantised(x).backward(g)
    reference(x).backward(g)
    assert torch.allclose(quantised.weight.grad, reference.weight.grad, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_in_parts_is_the_one_of_bitsandbytes(rows, threshold, dtype):
    # What runs on this CPU, against the path of GPUs on whole matrices.
    _, quantised = layer(threshold=threshold)
    x = torch.randn(rows, 64)
    x[::3, 5], x[:, 9], x[0] = 9.0, x[:, 9] * 30, 0.0
    x[-1, 3] = 6.0  # exactly on the threshold counts as beyond
    x = x.to(dtype)
    wanted = int8._multiply(x, quantised.weight, quantised.scale, threshold) + quantised.bias
    out = torch.empty(rows, 48)
    with torch.no_grad():
        int8_cpu.multiply(x, quantised.weight, quantised.scale, quantised.bias, threshold, out)
    assert torch.allclose(out, wanted.float(), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_bias_under_autocast():
    _, quantised = layer(threshold=6.0)
    x = torch.randn(700, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised(x).float().sum().backward()
    assert quantised.bias.grad.dtype == torch.float32 and torch.equal(quantised.bias.grad, torch.full((48,), 700.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_cuda_the_weight_gradient_is_computed_in_16_bit(dtype):
    torch.manual_seed(0)
    grad, rows = torch.randn(5000, 48).to(dtype), torch.randn(5000, 64)
    got = int8._weight_gradient(grad.cuda(), rows.cuda())
    assert got.dtype == torch.float32
    assert relative(got.cpu(), grad.float().T @ rows.to(dtype).float()) < torch.finfo(dtype).eps


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    linear, quantised = layer(threshold=6.0)
    x = torch.randn(40, 64)
    x[:, 3] *= 30
    on_gpu = Int8Linear(copy.deepcopy(linear).cuda(), 6.0, False)
    assert relative(on_gpu(x.cuda()).cpu(), quantised(x)) < 5e-3

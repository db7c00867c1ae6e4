"""Gradients of int8 products in int8, against those in fp32."""

import pytest
import torch
from torch import nn

from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.quantization import int8, int8_backward, int8_cpu
from tracknet.quantization.apply import QuantizationConfig
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.trainable_int8 import TrainableInt8Linear


@pytest.fixture(params=["AVX2", "AVX512", "triton"])
def path(request, monkeypatch):
    """Implementation: the operators of bitsandbytes, the product of this CPU, or the kernels of a GPU, interpreted."""
    if request.param == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX512")
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(int8, "_is_of_gpu", lambda x: True)
    capability = "AVX512" if request.param == "AVX512" else "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    return request.param


def layer(int8_backward=True, kind=Int8Linear, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 1, 48)[:, None]  # rows of very different scale
    if kind is TrainableInt8Linear:
        return TrainableInt8Linear(linear, 0.0, int8_backward=int8_backward, **settings)
    return Int8Linear(linear, 6.0, False, int8_backward=int8_backward, **settings)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_is_within_the_rounding_of_int8(path, dtype):
    quantized = layer(kernel="triton" if path == "triton" else "bitsandbytes")
    x = torch.randn(3, 20, 64, dtype=dtype, requires_grad=True)
    grad = (torch.randn(3, 20, 48) * torch.logspace(-9, 2, 20)[None, :, None]).to(dtype)  # rows of very different size
    quantized.bias.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        quantized(x).backward(grad)
    wanted = grad.float() @ quantized.dequantize()
    assert x.grad.dtype == dtype and x.grad.shape == x.shape
    rows = [(a, b) for a, b in zip(x.grad.float().flatten(0, 1), wanted.flatten(0, 1))]
    assert all(relative(a, b) < 0.03 and cosine(a, b) > 0.9995 for a, b in rows)
    assert relative(x.grad.float(), wanted) > 1e-4, "it was multiplied in int8"


def test_without_the_setting_it_is_exact(path):
    quantized = layer(int8_backward=False)
    x, grad = torch.randn(9, 64, requires_grad=True), torch.randn(9, 48)
    quantized(x).backward(grad)
    assert relative(x.grad, grad @ quantized.dequantize()) < 1e-5


@pytest.mark.parametrize("kind", [TrainableInt8Linear, "fp16"])
@pytest.mark.parametrize("rows", [7, 300])
def test_the_gradient_of_a_weight_is_within_the_rounding_of_int8(monkeypatch, kind, rows):
    monkeypatch.setattr(int8_backward, "ROWS", 128)
    quantized = layer(kind=kind) if kind != "fp16" else Int8Linear(nn.Linear(64, 48), 0.0, True, int8_backward=True)
    x, grad = torch.randn(rows, 64) * torch.logspace(-2, 2, 64), torch.randn(rows, 48) * torch.logspace(-3, 1, 48)
    quantized(x).backward(grad)
    got = (quantized.weight if kind == "fp16" else quantized.weight_grad_proxy).grad
    wanted = grad.T @ x
    assert got.dtype == torch.float32 and relative(got, wanted) < 0.03 and cosine(got, wanted) > 0.9995
    # Every element on its own scale, since rows and columns have scales of their own.
    scaled = [(m / torch.logspace(-3, 1, 48)[:, None] / torch.logspace(-2, 2, 64)) for m in (got, wanted)]
    assert relative(*scaled) < 0.03


def test_the_int32_sums_of_a_weight_gradient_cannot_overflow():
    # 127 * 127 * ROWS, at the largest codes.
    assert 127**2 * int8_backward.ROWS < 2**31
    rows = 2 * int8_backward.ROWS + 5
    got = int8_backward.weight_gradient(torch.ones(rows, 2), torch.ones(rows, 3))
    assert torch.allclose(got, torch.full((2, 3), float(rows)))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_so(path, bad):
    quantized = layer(kernel="triton" if path == "triton" else "bitsandbytes")
    x, grad = torch.randn(9, 64, requires_grad=True), torch.randn(9, 48)
    grad[4, 7] = bad
    quantized(x).backward(grad)
    assert not x.grad[4].isfinite().all() and x.grad[:4].isfinite().all() and x.grad[5:].isfinite().all()
    weights = int8_backward.weight_gradient(grad, torch.randn(9, 64))
    assert not weights[7].isfinite().all() and weights[:7].isfinite().all()


def test_zeros_give_zeros(path):
    quantized = layer(kernel="triton" if path == "triton" else "bitsandbytes")
    x = torch.randn(9, 64, requires_grad=True)
    quantized(x).backward(torch.zeros(9, 48))
    assert (x.grad == 0).all()
    assert (int8_backward.weight_gradient(torch.zeros(9, 48), torch.randn(9, 64)) == 0).all()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX512")
@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
def test_parts_of_rows_are_multiplied_apart(rows):
    quantized = layer()
    grad = torch.randn(rows, 48)
    out = torch.empty(rows, 64)
    int8_cpu.multiply_gradient(grad, quantized.weight, quantized.scale, out)
    wanted = int8_backward.input_gradient(grad, quantized.weight, quantized.scale)
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_the_setting_reaches_every_int8_layer_and_only_those_have_it(tiny):
    with pytest.raises(UserError, match="int8_backward=true multiplies gradients with int8 weights"):
        QuantizationConfig(load_in_4bit=True, int8_backward=True)
    config = compose(
        "synthetic", "vit_tiny_heatmap", "int8", [*tiny("vit"), "training.quantization.int8_backward=true"]
    )
    assert config.training.quantization.int8_backward

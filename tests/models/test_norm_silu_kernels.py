"""GroupNorm and SiLU as Triton kernels: against float64, by Triton's interpreter on the CPU and compiled on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from tracknet.models.norm_silu import NormSilu

pytest.importorskip("triton", reason="Triton is made for Linux")
from tracknet.models import norm_silu_kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the process has a GPU, where kernels are compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def check(shape, dtype, device):
    """Compare result and gradients with float64, for an input whose mean is many times its deviation."""
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, device=device) * 3 + 50).to(dtype), torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.randn(shape[1], device=device), torch.randn(shape[1], device=device)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.silu(F.group_norm(exact[0], 8, *exact[1:]))
    wanted.backward(grad.double())
    out, means, deviations = norm_silu_kernels.forward(x, weight, bias, 8, 1e-5)
    gradients = norm_silu_kernels.backward(grad, x, weight, bias, means, deviations, 8)
    assert out.dtype == dtype and error(out, wanted.detach()) < 2 * torch.finfo(dtype).eps + 1e-6
    for gradient, t in zip(gradients, exact):
        assert error(gradient, t.grad) < 2 * torch.finfo(dtype).eps + 4e-6


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 64, 36, 64), (3, 32, 40, 300)])
def test_kernels_compute_what_float64_does(shape, dtype):
    check(shape, dtype, "cpu")


@interpreted
def test_only_the_sample_with_a_nan_becomes_nan():
    x = torch.randn(2, 16, 6, 6)
    x[1, 3, 2, 2] = float("nan")
    out, means, deviations = norm_silu_kernels.forward(x, torch.ones(16), torch.zeros(16), 8, 1e-5)
    assert out[0].isfinite().all() and out[1, 2:4].isnan().all() and out[1, :2].isfinite().all()
    grad = norm_silu_kernels.backward(torch.ones_like(x), x, torch.ones(16), torch.zeros(16), means, deviations, 8)[0]
    assert grad[0].isfinite().all() and grad[1, 2:4].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 32, 144, 256), (16, 64, 36, 64), (1, 48, 72, 128), (3, 64, 5, 7)])
def test_on_a_gpu_kernels_compute_what_float64_does(shape, dtype):
    check(shape, dtype, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_layer_uses_them_in_any_layout():
    layer = NormSilu(8, 32).cuda()
    x = torch.randn(4, 32, 24, 40, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    out = layer(x)
    assert type(out.grad_fn).__name__ == "_FusedNormSiluBackward"
    out.sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    assert error(out, F.silu(F.group_norm(x.double(), 8))) < 0.01 and x.grad.isfinite().all()

"""Dropout and product of an adapter as Triton kernels, by Triton's interpreter on the CPU and compiled on a GPU.

The interpreter multiplies no bf16, so on a CPU that is only compiled.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tracknet.models.window_rng import WindowRng
from tracknet.quantization.fused_dropout import MAX_RANK
from tracknet.quantization.recomputed_dropout import DropoutLinear

pytest.importorskip("triton", reason="Triton is made for Linux")
from tracknet.quantization import dropout_kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the process has a GPU, where kernels are compiled")
DROPPED = 64  # of 256 byte values
SCALE = 256 / (256 - DROPPED)


def state(seed=2**61 + 12345, first=7, device="cpu"):
    return torch.tensor([seed, first], device=device)


def read_mask(rows, width, *draw, device="cpu"):
    """Return the factors of the values, ``[rows, width]``: the products of ones with parts of the identity."""
    ones, parts = torch.ones(rows, width, device=device), torch.eye(width, device=device).split(MAX_RANK)
    return torch.cat([dropout_kernels.project(ones, part.contiguous(), *draw) for part in parts], dim=1)


def mask(rows, width, per_window, offset=0, layer=3, dropped=DROPPED, **draw):
    """Return the mask as bool ``[rows, width]``."""
    return read_mask(rows, width, state(**draw), offset, layer, per_window, dropped) != 0


def check(rows, width, rank, dtype, device, tolerance):
    """Compare result and gradients with float64 and the mask that a gradient shows."""
    torch.manual_seed(0)
    x, a = (torch.randn(n, width, device=device).to(dtype) for n in (rows, rank))
    grad = torch.randn(rows, rank, device=device).to(dtype)
    draw = (state(device=device), 1, 3, max(1, rows // 3), DROPPED)
    keep = read_mask(rows, width, *draw, device=device).double() / SCALE
    out = dropout_kernels.project(x, a, *draw)
    grad_x, grad_a = dropout_kernels.gradients(grad, x, a, *draw, True)
    exact_x, exact_a, exact_grad = x.double() * keep, a.double(), grad.double()
    for got, wanted in (
        (out, exact_x @ exact_a.T),
        (grad_x, exact_grad @ exact_a * keep),
        (grad_a, exact_grad.T @ exact_x),
    ):
        assert ((got.double() / SCALE - wanted).norm() / wanted.norm()).item() < tolerance
    assert out.dtype == grad_x.dtype == dtype and grad_a.dtype == torch.float32
    assert dropout_kernels.gradients(grad, x, a, *draw, False)[0].numel() == 0


@interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows, width, rank", [(1, 40, 3), (129, 200, 16), (64, 64, 20)])
def test_kernels_compute_what_float64_does(rows, width, rank, dtype, tolerance):
    check(rows, width, rank, dtype, "cpu", tolerance)


@interpreted
def test_every_value_is_dropped_alike_and_independently_of_its_neighbors():
    dropped = ~mask(2000, 64, 100)
    assert abs(dropped.float().mean() - 0.25) < 0.006  # five standard errors
    assert (dropped.float().mean(dim=0) - 0.25).abs().max() < 0.05
    flat = dropped.float() - 0.25
    for columns, rows in ((1, 0), (2, 0), (0, 1), (0, 100), (16, 1)):  # neighbors in a row, between rows and windows
        a, b = flat[: 2000 - rows, : 64 - columns], flat[rows:, columns:]
        assert abs((a * b).mean().item()) < 5 * 0.25 * 0.75 / a.numel() ** 0.5


@interpreted
def test_a_window_draws_the_same_in_any_part_and_others_draw_others():
    whole = mask(40, 64, 10)
    assert torch.equal(mask(20, 64, 10, offset=2), whole[20:])  # a part of a block, at level `full`
    assert torch.equal(mask(20, 64, 10, first=9), whole[20:])  # a micro-batch
    different = [mask(10, 64, 10), whole[10:20], mask(10, 64, 10, layer=4), mask(10, 64, 10, seed=2**61 + 12346)]
    different += [mask(10, 64, 10, seed=12345), mask(10, 64, 10, layer=1)]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert 0.25 < (one != other).float().mean() < 0.5  # 0.375 expected


@interpreted
def test_probabilities_are_those_of_the_setting():
    for dropped in (1, 26, 255):
        share = 1 - mask(1000, 64, 1000, dropped=dropped).float().mean()
        p = dropped / 256
        assert abs(share - p) < 5 * (p * (1 - p) / 64000) ** 0.5


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tracknet.models import norm_silu_kernels as norm
from tracknet.quantization import dropout_kernels as dropout
from tracknet.quantization.fused_dropout import MAX_RANK

def compiled(kernel, types, constants, capability, warps):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if str(types.get(n, "")).startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=warps, num_stages=3))

for capability in (80, 89, 90, 120):
    for x in ("*bf16", "*fp16", "*fp32"):
        types = {n: x for n in ("x", "weight", "grad", "grad_x", "out")}
        types |= dict(grad_weight="*fp32", state="*i64", scale="fp32")
        types |= {n: "i32" for n in "offset layer rows_per_window height width rank threshold".split()}
        for rank in (16, MAX_RANK) if capability == 89 else (16,):  # 8.9 has the least shared memory
            tile = dict(ROWS=dropout.ROWS, DEPTH=dropout.DEPTH, RANK=rank)
            for kernel, constants in ((dropout._project, tile), (dropout._gradients, {**tile, "NEEDS_X": True})):
                made = compiled(kernel, types, constants, capability, 4)
                print(capability, x, kernel.__name__, made.metadata.shared, "mma" in made.asm["ptx"])
        types = {n: x for n in ("x", "out", "grad", "grad_x")}
        types |= {n: "*fp32" for n in "weight bias means deviations grad_weight grad_bias".split()}
        types |= dict(channels="i32", pixels="i32", groups="i32", eps="fp32")
        for kernel in (norm._forward, norm._backward):
            made = compiled(kernel, types, dict(PER_GROUP=4, BLOCK=norm.BLOCK), capability, norm.WARPS)
            print(capability, x, kernel.__name__, made.metadata.shared, False)
"""
SHARED_BYTES = 101_376  # that a block may have on all of them


def test_kernels_compile_for_gpus_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 54 and all(int(shared) <= SHARED_BYTES for _, _, _, shared, _ in lines)
    # 16-bit products run on matrix units.
    assert all(mma == "True" for _, x, kernel, _, mma in lines if kernel in ("_project", "_gradients") and x != "*fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rows, width, rank", [(1, 384, 16), (129, 200, 4), (37344, 384, 16), (2048, 4096, MAX_RANK)])
def test_on_a_gpu_kernels_compute_what_float64_does(rows, width, rank, dtype, tolerance):
    check(rows, width, rank, dtype, "cuda", tolerance)


@pytest.mark.gpu
def test_on_a_gpu_the_layer_repeats_its_mask_in_backward_and_in_parts():
    torch.manual_seed(0)
    layer = DropoutLinear(nn.Linear(96, 16, bias=False), 0.25, WindowRng(), 3).cuda().train()
    x = torch.randn(12, 7, 96, device="cuda", requires_grad=True)  # four windows of three frames
    with layer.rng.scope(5, 0, 4, x.device):
        whole = layer(x)
    grad = torch.randn_like(whole)
    whole.backward(grad)
    # The function is linear: its value is the gradient times the input, to the last bit of the mask.
    assert torch.allclose((x.grad * x).sum(), (grad * whole).sum(), rtol=1e-4)
    assert torch.allclose((layer.weight.grad * layer.weight).sum(), (grad * whole).sum(), rtol=1e-4)
    assert abs((x.grad == 0).float().mean() - 0.25) < 0.03
    with torch.no_grad():
        with layer.rng.scope(5, 2, 2, x.device):
            assert torch.allclose(layer(x[6:]), whole[6:], atol=1e-5)
        with layer.rng.scope(5, 0, 4, x.device), layer.rng.scope(5, 3, 1):
            assert torch.allclose(layer(x[9:]), whole[9:], atol=1e-5)
        with layer.rng.scope(6, 0, 4, x.device):
            assert not torch.allclose(layer(x), whole, atol=1e-2)
        assert not torch.equal(layer(x), layer(x))  # outside of the training loop

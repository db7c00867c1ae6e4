"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for GPUs that need not be there, and measured on one that is."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.quantization import int8, int8_cpu, int8_fused
from tracknet.quantization.apply import QuantizationConfig
from tracknet.quantization.int8 import Int8Linear

pytest.importorskip("triton", reason="Triton is made for Linux")


# conftest.py has said so before Triton was imported.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the process has a GPU, where kernels are compiled")


def rows_with_outliers(height, width, dtype):
    torch.manual_seed(0)
    x = torch.randn(height, width)
    x[::3, 5], x[:, 9], x[0] = 9.0, x[:, 9] * 30, 0.0
    x[-1, width - 1] = 6.0  # exactly on the threshold counts as beyond
    return x.to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def quantised_layer(width, columns, **kwargs):
    torch.manual_seed(1)
    return Int8Linear(nn.Linear(width, columns), 6.0, False, **kwargs)


@interpreted
@pytest.mark.parametrize("height, width, columns", [(1, 64, 8), (129, 200, 130)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_product_is_the_one_of_the_cpu(height, width, columns, threshold, dtype):
    x, layer = rows_with_outliers(height, width, dtype), quantised_layer(width, columns)
    wanted = torch.empty(height, columns)
    with torch.no_grad():
        int8_cpu.multiply(x, layer.weight, layer.scale, layer.bias, threshold, wanted)
        out = int8_fused.multiply(x, layer.weight, layer.scale, layer.bias, threshold, torch.float32)
        without_bias = int8_fused.multiply(x, layer.weight, layer.scale, None, threshold, dtype)
    # 16-bit values often lie half way between two codes, where the order of two roundings decides.
    assert relative(out, wanted) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert without_bias.dtype == dtype
    assert relative(without_bias.float(), wanted - layer.bias) < max(1e-3, torch.finfo(dtype).eps)


@interpreted
def test_codes_are_those_of_bitsandbytes_and_tiles_with_outliers_are_marked():
    x = torch.randn(130, 200)
    x[129, 70] = 7.0
    codes, scale, marks = int8_fused.quantize(x, 6.0)
    wanted, wanted_scale = int8.quantize_rows(x.masked_fill(x.abs() >= 6, 0))
    assert (codes - wanted).abs().max() <= 1 and (codes != wanted).float().mean() < 1e-3  # ties
    assert torch.equal(scale, wanted_scale)
    assert marks.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


@interpreted
def test_what_a_row_gives_does_not_depend_on_its_batch():
    x, layer = rows_with_outliers(150, 96, torch.float32), quantised_layer(96, 64)
    whole = int8_fused.multiply(x, layer.weight, layer.scale, None, 6.0, torch.float32)
    parts = [int8_fused.multiply(p, layer.weight, layer.scale, None, 6.0, torch.float32) for p in x.split(37)]
    assert torch.equal(whole, torch.cat(parts))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(threshold, value):
    x, layer = torch.randn(5, 96), quantised_layer(96, 64)
    x[2, 3] = value
    out = int8_fused.multiply(x, layer.weight, layer.scale, layer.bias.detach(), threshold, torch.float32)
    assert not out[2].isfinite().any() and out[[0, 1, 3, 4]].isfinite().all()


@interpreted
def test_operators_keep_what_they_promise_to_torch():
    x, layer = rows_with_outliers(70, 96, torch.float32), quantised_layer(96, 64)
    codes, scale, marks = int8_fused.quantize(x, 6.0)
    torch.library.opcheck(int8_fused.quantize, (x, 6.0))
    torch.library.opcheck(
        int8_fused.multiply_quantized,
        (x, codes, scale, marks, layer.weight, layer.scale, layer.bias.detach(), 6.0, torch.bfloat16),
    )


def test_a_layer_is_planned_without_a_gpu():
    layer = quantised_layer(96, 64, kernel="triton")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.empty(2, 70, 96, requires_grad=True))
    assert out.shape == (2, 70, 64) and out.dtype == torch.bfloat16 and out.requires_grad


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tracknet.quantization import int8_kernels

POINTERS = dict(x="*bf16", codes="*i8", scale="*fp32", marks="*i32", weight="*i8", weight_scale="*fp32", bias="*fp32", out="*bf16")
SCALARS = dict(height="i32", columns="i32", width="i32", threshold="fp32")
for capability in (80, 89, 90, 120):
    for kernel, constants in (
        (int8_kernels._quantize, dict(TILE_ROWS=128, TILE_DEPTH=64, TILES=8, HAS_OUTLIERS=True)),
        (int8_kernels._multiply, dict(TILE_ROWS=128, TILE_COLUMNS=128, TILE_DEPTH=64, GROUP=8, HAS_OUTLIERS=True, HAS_BIAS=True)),
    ):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else {**POINTERS, **SCALARS}[n] for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
        made = triton.compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=8, num_stages=3, enable_fp_fusion=True))
        ptx = made.asm["ptx"]
        print(capability, kernel.__name__, len(made.asm["cubin"]) > 0, ".s8.s8" in ptx or "kind::i8" in ptx)
"""


def test_kernels_compile_for_gpus_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.split("\n")[:-1]
    assert len(lines) == 8 and all(line.split()[2] == "True" for line in lines)
    # The product itself runs on int8 matrix units.
    assert all(line.endswith("True") for line in lines if "_multiply" in line)


def test_the_choice_reaches_the_layers():
    config = compose("synthetic", "vit_tiny_heatmap", "int8", ["training.quantization.int8_kernel=triton"])
    assert config.training.quantization.int8_kernel == "triton"
    with pytest.raises(UserError, match="int8_kernel=triton multiplies in int8, and load_in_8bit is false"):
        QuantizationConfig(load_in_4bit=True, int8_kernel="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_agrees_with_bitsandbytes_and_waits_for_nothing(dtype):
    plain, fused = (quantised_layer(384, 520, kernel=kernel).cuda() for kernel in ("bitsandbytes", "triton"))
    x = rows_with_outliers(1000, 384, dtype).cuda()
    wanted = plain(x.float())
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        fused(x)  # compiled here
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = fused(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.dtype == dtype
    assert relative(out.float(), wanted) < 5e-3


@pytest.mark.gpu
def test_on_a_gpu_gradients_agree_with_bitsandbytes():
    x, g = rows_with_outliers(300, 384, torch.float32).cuda(), torch.randn(300, 520, device="cuda")
    gradients = []
    for kernel in ("bitsandbytes", "triton"):
        layer, own = quantised_layer(384, 520, kernel=kernel).cuda(), x.clone().requires_grad_()
        layer(own).backward(g)
        gradients.append((own.grad, layer.bias.grad))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)

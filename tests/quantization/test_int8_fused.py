"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for GPUs that need not be there, and measured on
one that is."""

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
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.trainable_int8 import TrainableInt8Linear

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


def quantized_layer(width, columns, **kwargs):
    torch.manual_seed(1)
    return Int8Linear(nn.Linear(width, columns), 6.0, False, **kwargs)


@interpreted
@pytest.mark.parametrize("height, width, columns", [(1, 64, 8), (129, 200, 130)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_product_is_the_one_of_the_cpu(height, width, columns, threshold, dtype):
    if dtype == torch.bfloat16 and threshold > 0:
        pytest.skip("Triton's interpreter multiplies no bf16")
    x, layer = rows_with_outliers(height, width, dtype), quantized_layer(width, columns)
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
    x, layer = rows_with_outliers(150, 96, torch.float32), quantized_layer(96, 64)
    whole = int8_fused.multiply(x, layer.weight, layer.scale, None, 6.0, torch.float32)
    parts = [int8_fused.multiply(p, layer.weight, layer.scale, None, 6.0, torch.float32) for p in x.split(37)]
    assert torch.equal(whole, torch.cat(parts))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(threshold, value):
    x, layer = torch.randn(5, 96), quantized_layer(96, 64)
    x[2, 3] = value
    out = int8_fused.multiply(x, layer.weight, layer.scale, layer.bias.detach(), threshold, torch.float32)
    assert not out[2].isfinite().any() and out[[0, 1, 3, 4]].isfinite().all()


@interpreted
def test_rows_may_lie_anyhow_in_memory():
    layer = quantized_layer(96, 64)
    for x in (rows_with_outliers(96, 10, torch.float32).T, torch.randn(1, 96).expand(4, 96)):
        out = int8_fused.multiply(x, layer.weight, layer.scale, None, 6.0, torch.float32)
        assert torch.equal(
            out,
            int8_fused.multiply(
                x.clone(memory_format=torch.contiguous_format), layer.weight, layer.scale, None, 6.0, torch.float32
            ),
        )
        assert relative(out, x @ layer.dequantize().T) < 0.02


@interpreted
def test_operators_keep_what_they_promise_to_torch():
    x, layer = rows_with_outliers(70, 96, torch.float32), quantized_layer(96, 64)
    codes, scale, marks = int8_fused.quantize(x, 6.0)
    torch.library.opcheck(int8_fused.quantize_op, (x, 6.0))
    torch.library.opcheck(int8_fused.quantize_op, (x.T, 6.0))
    torch.library.opcheck(
        int8_fused.multiply_op,
        (x, codes, scale, marks, layer.weight, layer.scale, layer.bias.detach(), 6.0, torch.bfloat16),
    )


def test_a_layer_is_planned_without_a_gpu():
    layer = quantized_layer(96, 64, kernel="triton")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.empty(2, 70, 96, requires_grad=True))
    assert out.shape == (2, 70, 64) and out.dtype == torch.bfloat16 and out.requires_grad


ELSEWHERE = """
import torch
from torch import nn
from tracknet.quantization.int8 import Int8Linear

layer = Int8Linear(nn.Linear(96, 64), 6.0, False, "triton")
x = torch.randn(3, 96)
assert torch.allclose(layer(x), torch.compile(layer.forward, backend="aot_eager")(x), atol=1e-3)
print(torch.backends.cpu.get_cpu_capability(), layer(x).shape)
"""


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_a_run_that_chose_triton_runs_on_any_cpu(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        env={**environment, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "[3, 64]" in done.stdout, done.stderr[-2000:]


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tracknet.quantization import int8_kernels

SCALARS = dict(height="i32", columns="i32", width="i32", threshold="fp32")
TYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
for capability, x in ((80, "*bf16"), (80, "*fp32"), (89, "*fp16"), (90, "*bf16"), (120, "*bf16")):
    pointers = dict(x=x, codes="*i8", scale="*fp32", marks="*i32", weight="*i8", weight_scale="*fp32", bias="*fp32")
    pointers["out"] = "*bf16"
    layout = int8_kernels.layout_of(TYPES[x], True)
    tile = {name: layout[name] for name in ("TILE_ROWS", "TILE_DEPTH")}
    for kernel, constants in (
        (int8_kernels._quantize, dict(tile, TILES=8, HAS_OUTLIERS=True)),
        (int8_kernels._multiply, dict(layout, HAS_BIAS=True)),
    ):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else {**pointers, **SCALARS}[n] for n in names}
        # As Triton specializes what it is called with: aligned tensors, and widths of backbones.
        widths = {*pointers, "columns", "width"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in widths}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
        options = dict(num_warps=8, num_stages=3, enable_fp_fusion=True)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        ptx = made.asm["ptx"]
        print(capability, kernel.__name__, made.metadata.shared, "cp.async" in ptx, ".s8.s8" in ptx)
"""
SHARED_BYTES = 101_376  # that a block may have on all of them


def test_kernels_compile_for_gpus_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 10 and all(int(shared) <= SHARED_BYTES for _, _, shared, _, _ in lines)
    # The product loads ahead of what it computes, and runs on int8 matrix units.
    assert all(rest == ["True", "True"] for _, kernel, _, *rest in lines if kernel == "_multiply")


def test_the_choice_reaches_the_layers():
    config = compose("synthetic", "vit_tiny_heatmap", "int8", ["training.int8_kernel=triton"])
    assert config.training.int8_kernel == "triton"
    with pytest.raises(UserError, match="int8_kernel=triton requires weights in int8, but none are"):
        compose("synthetic", "vit_tiny_heatmap", "qlora", ["training.int8_kernel=triton"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_agrees_with_bitsandbytes_and_waits_for_nothing(dtype):
    plain, fused = (quantized_layer(384, 520, kernel=kernel).cuda() for kernel in ("bitsandbytes", "triton"))
    x = rows_with_outliers(1000, 384, dtype).cuda()
    wanted = plain(x.float())
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        fused(x)  # compiled here
        try:
            torch.cuda.set_sync_debug_mode("error")
            out = fused(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.dtype == dtype
    assert relative(out.float(), wanted) < 5e-3


@pytest.mark.gpu
def test_on_a_gpu_outliers_are_as_good_as_in_fp32():
    layer = quantized_layer(384, 520, kernel="triton").cuda()
    x = torch.zeros(200, 384, device="cuda")
    x[:, ::7] = torch.randn(200, 55, device="cuda") * 3 + 100  # outliers alone: nothing is quantized
    assert relative(layer(x) - layer.bias, x @ layer.dequantize().T) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["bitsandbytes", "triton"])
def test_on_a_gpu_gradients_are_those_of_the_dequantized_weight(kernel):
    torch.manual_seed(1)
    layer = TrainableInt8Linear(nn.Linear(384, 520), 6.0, kernel).cuda()
    x, g = rows_with_outliers(300, 384, torch.float32).cuda().requires_grad_(), torch.randn(300, 520, device="cuda")
    layer(x).backward(g)
    assert relative(x.grad, g @ layer.dequantize()) < 1e-3
    assert relative(layer.weight_grad_proxy.grad, g.T @ x.detach()) < 1e-3

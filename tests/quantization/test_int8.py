"""The int8 layer against its dequantized reference, on the real bitsandbytes operators."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
    linear, quantized = layer()
    x = torch.randn(shape)
    assert quantized(x).shape == linear(x).shape
    assert relative(quantized(x), linear(x)) < 0.02


def test_the_weight_takes_a_quarter():
    _, quantized = layer(bias=False)
    size = sum(t.numel() * t.element_size() for t in [*quantized.parameters(), *quantized.buffers()])
    assert size == 48 * 64 + 48 * 4


def test_the_gradient_of_the_input_is_that_of_the_dequantized_weight():
    _, quantized = layer(threshold=6.0)
    x = torch.randn(10, 64, requires_grad=True)
    g = torch.randn(10, 48)
    quantized(x).backward(g)
    assert relative(x.grad, g @ quantized.dequantize()) < 1e-6
    assert quantized.weight.grad is None and torch.allclose(quantized.bias.grad, g.sum(dim=0))


def test_outlier_columns_are_multiplied_in_full_precision():
    linear, exact = layer(threshold=6.0)
    _, plain = layer(threshold=0.0)
    x = torch.randn(32, 64)
    x[:, 7] *= 600
    # Against the dequantized weight: what is left is the rounding of activations, which one outlier spoils for its row.
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
    _, quantized = layer(threshold=6.0)
    x = torch.randn(64, 10).T
    assert not x.is_contiguous() and torch.equal(quantized(x), quantized(x.contiguous()))


def test_nothing_but_codes_and_scales_is_kept_for_backward():
    _, quantized = layer(threshold=6.0)
    x = torch.randn(4, 64, requires_grad=True)
    hidden = x * 2
    alive = weakref.ref(hidden)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = quantized(hidden)
    del hidden
    gc.collect()
    assert alive() is None
    assert set(saved) <= {quantized.weight.data_ptr(), quantized.scale.data_ptr()}
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
    _, quantized = layer(has_fp16_weight=True)
    x = torch.randn(8, 64)
    before = quantized(x).detach()
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    quantized(x).square().mean().backward()
    # The gradient of the product in full precision, straight through the rounding.
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    after = quantized(x).detach()
    assert not torch.equal(before, after)
    fresh = Int8Linear(nn.Linear(64, 48), 0.0, True)
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(after, fresh(x))


def test_the_gradient_of_a_trained_weight():
    linear, quantized = layer(has_fp16_weight=True)
    reference = nn.Linear(64, 48)
    reference.load_state_dict(linear.state_dict())
    x, g = torch.randn(6, 64), torch.randn(6, 48)
    quantized(x).backward(g)
    reference(x).backward(g)
    assert torch.allclose(quantized.weight.grad, reference.weight.grad, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_in_parts_is_the_one_of_bitsandbytes(rows, threshold, dtype):
    # What runs on this CPU, against the path of GPUs on whole matrices.
    _, quantized = layer(threshold=threshold)
    x = torch.randn(rows, 64)
    x[::3, 5], x[:, 9], x[0] = 9.0, x[:, 9] * 30, 0.0
    x[-1, 3] = 6.0  # exactly on the threshold counts as beyond
    x = x.to(dtype)
    wanted = int8._multiply(x, quantized.weight, quantized.scale, threshold) + quantized.bias
    out = torch.empty(rows, 48)
    with torch.no_grad():
        int8_cpu.multiply(x, quantized.weight, quantized.scale, quantized.bias, threshold, out)
    assert torch.allclose(out, wanted.float(), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_bias_under_autocast():
    _, quantized = layer(threshold=6.0)
    x = torch.randn(700, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized(x).float().sum().backward()
    assert quantized.bias.grad.dtype == torch.float32 and torch.equal(quantized.bias.grad, torch.full((48,), 700.0))


def reference(x, quantized, threshold):
    """LLM.int8 of single values, in float64: outliers by themselves, the rest rounded by the largest of its row."""
    x, weight = x.double(), quantized.dequantize().double()
    large = (x.abs() >= threshold) & (threshold > 0)
    small = x.masked_fill(large, 0)
    step = small.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    out = ((small / step).round() * step + x.masked_fill(~large, 0)) @ weight.T
    return out if quantized.bias is None else out + quantized.bias.double()


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    """The product as this CPU takes it, and as one without AVX512 does (and a GPU, but for its operators)."""
    if request.param == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.mark.parametrize("threshold", [0.0, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_product_is_the_one_of_the_paper(capability, threshold, bias):
    _, quantized = layer(threshold=threshold, bias=bias)
    if bias:
        nn.init.normal_(quantized.bias)
    x = torch.randn(40, 64) * torch.linspace(0.1, 4, 40)[:, None]
    x[7] = 0.0
    x[9, 3] = threshold  # exactly on it counts as beyond
    out = quantized(x.view(4, 2, 5, 64))
    assert out.shape == (4, 2, 5, 48) and out.dtype == torch.float32
    # A value that lies between two codes may be rounded either way: one in a thousand is.
    off = (out.view(40, 48).double() - reference(x, quantized, threshold)).norm(dim=1)
    assert (off[x.abs().amax(dim=1) > 0] < 1e-2 * x.norm(dim=1)[x.abs().amax(dim=1) > 0]).all() and off.median() < 1e-5
    assert torch.allclose(out.view(40, 48)[7], quantized.bias if bias else torch.zeros(48))


@torch.no_grad()
def test_parts_of_rows_are_multiplied_apart(capability, monkeypatch):
    _, quantized = layer(threshold=3.0)
    x = torch.randn(23, 64) * 2
    whole = quantized(x)
    monkeypatch.setattr(int8, "ROWS", 5)
    monkeypatch.setattr(int8_cpu, "ROWS", 5)
    assert torch.allclose(quantized(x), whole, atol=1e-6)


@torch.no_grad()
def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it(capability):
    _, quantized = layer(threshold=3.0)
    x = torch.randn(30, 64) * 2
    assert torch.allclose(quantized(x[4:9]), quantized(x)[4:9], atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@torch.no_grad()
def test_under_autocast_the_product_is_that_of_fp32_but_for_the_last_rounding(capability, threshold):
    _, quantized = layer(threshold=threshold)
    x = torch.randn(30, 64) * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized(x)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), quantized(x)) < 2**-8


@pytest.mark.parametrize("has_fp16_weight", [False, True])
def test_all_gradients_are_those_of_the_linear_layer(capability, has_fp16_weight):
    _, quantized = layer(threshold=3.0, has_fp16_weight=has_fp16_weight)
    x, g = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 48)
    quantized(x).backward(g)
    assert x.grad.shape == x.shape and torch.allclose(x.grad, g @ quantized.dequantize(), atol=1e-5)
    assert torch.allclose(quantized.bias.grad, g.sum(dim=(0, 1)), atol=1e-5)
    if has_fp16_weight:
        wanted = torch.einsum("bto,bti->oi", g, x.detach())
        assert torch.allclose(quantized.weight.grad, wanted, atol=1e-5)
    else:
        assert quantized.weight.grad is None


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_only_the_gradient_that_is_wanted_is_computed(wanted):
    _, quantized = layer(has_fp16_weight=True)
    x = torch.randn(5, 64, requires_grad=wanted == "input")
    quantized.weight.requires_grad_(wanted == "weight")
    quantized.bias.requires_grad_(wanted == "bias")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        out = quantized(x)
    out.sum().backward()
    assert ((5, 64) in saved) == (wanted == "weight")  # which alone needs the input
    grads = {"input": x.grad, "weight": quantized.weight.grad, "bias": quantized.bias.grad}
    assert {name for name, grad in grads.items() if grad is not None} == {wanted}


def test_the_gradient_of_a_bias_is_more_exact_than_the_gradients_that_it_sums():
    _, quantized = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized(torch.randn(1001, 64)).backward(torch.ones(1001, 48, dtype=torch.bfloat16))
    assert (quantized.bias.grad == 1001).all()  # of which bf16 would make 1000


def test_a_16_bit_bias_has_a_gradient_of_its_own_dtype_that_is_summed_in_32():
    _, quantized = layer()
    quantized.bias = nn.Parameter(quantized.bias.detach().bfloat16())
    x = torch.randn(1000, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized(x).backward(torch.ones(1000, 48, dtype=torch.bfloat16))
    # One by one in bf16, ones add up to 256 and no further.
    assert quantized.bias.grad.dtype == torch.bfloat16 and (quantized.bias.grad == 1000).all()


def test_the_gradient_of_a_weight_is_summed_in_32_bits_on_a_cpu():
    grad, rows = torch.ones(3000, 2).bfloat16(), torch.ones(3000, 3).bfloat16()
    got = int8._weight_gradient(grad, rows)
    assert got.dtype == torch.float32 and got.shape == (2, 3) and (got == 3000).all()


def test_a_plan_for_a_gpu_multiplies_the_weight_gradient_in_16_bits():
    """Of tensors without content only the operators can be seen."""
    seen = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.extend(a.dtype for a in args)
            return func(*args, **(kwargs or {}))

    for grad_dtype, wanted in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        seen.clear()
        with FakeTensorMode(), Look():
            got = int8._weight_gradient(torch.empty(9, 2, dtype=grad_dtype), torch.empty(9, 3))
        assert seen == [wanted] * 2 and got.dtype == torch.float32 and got.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_plan_for_a_gpu_quantizes_in_fp16_within_its_range_and_scales_by_one_operator(dtype):
    """Its kernel takes no other dtype, and what lies beyond 65504 would be infinite; so is the product fp16."""
    seen = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket._qualified_op_name.split("::")[1], args))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Look():
        x = torch.empty(9, 64, dtype=dtype, device="cuda")
        codes, scale = torch.empty(48, 64, dtype=torch.int8, device="cuda"), torch.empty(48, device="cuda")
        product = int8.int8_matmul(x, codes, scale)
    assert product.shape == (9, 48) and product.dtype == torch.float16 and product.is_cuda
    called = dict(seen)
    assert called["int8_vectorwise_quant"][0].dtype == torch.float16
    assert ("clamp" in called) == (dtype != torch.float16) and called.get("clamp", (0, -65504, 65504))[1:] == (
        -65504,
        65504,
    )
    assert called["int8_linear_matmul"][1] is codes and called["int8_mm_dequant"][2] is scale


@torch.no_grad()
def test_the_bias_is_added_in_the_dtype_of_the_output(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # ours adds it in fp32
    _, quantized = layer()
    x = torch.randn(30, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized(x)
        bias, quantized.bias = quantized.bias, None
        assert torch.equal(out, quantized(x) + bias.bfloat16())


def test_the_cpus_own_product_is_for_a_cpu_that_has_it_and_computes_now(monkeypatch):
    x = torch.randn(2, 64)
    for name in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        assert int8._runs_on_cpu(x) == (name == "AVX512")
        assert not int8._runs_on_cpu(torch.empty(2, 64, device="meta"))
        with FakeTensorMode():
            assert not int8._runs_on_cpu(torch.empty(2, 64)) and int8._is_of_gpu(torch.empty(2, 64))
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert not int8._runs_on_cpu(x)
        assert not int8._is_of_gpu(x)


def test_rows_are_quantized_by_their_largest_value():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [127.0, 63.6, -0.4]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        codes, scale = int8.quantize_rows(x.to(dtype))
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [127, 64, 0]] and scale.tolist() == [2.0, 0.0, 127.0]


def test_the_dtype_of_the_output_is_autocasts_where_it_is_on():
    half = torch.zeros(1, dtype=torch.float16)
    assert int8.output_dtype(half) == torch.float16 and int8.output_dtype(half.float()) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert int8.output_dtype(half) == int8.output_dtype(half.float()) == torch.bfloat16


@pytest.mark.parametrize("has_fp16_weight", [False, True])
def test_the_dequantized_weight_is_within_half_a_code(has_fp16_weight):
    linear, quantized = layer(has_fp16_weight=has_fp16_weight)
    weight, step = linear.weight.detach(), linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    got = quantized.dequantize()
    assert got.dtype == torch.float32 and ((got - weight).abs() <= 0.501 * step).all() and not torch.equal(got, weight)
    assert (quantized.in_features, quantized.out_features, quantized.storage_dtype) == (64, 48, "int8")
    assert quantized.W_q is quantized.weight and quantized.bias is linear.bias
    assert (quantized.weight is linear.weight) == has_fp16_weight == quantized.weight.requires_grad


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [5, 512, 700])
@torch.no_grad()
def test_the_product_of_a_cpu_is_the_one_of_the_paper_in_every_part(rows, threshold):
    """Parts with and without outliers follow each other, and leave nothing in the memory that they share."""
    _, quantized = layer(threshold=threshold)
    nn.init.normal_(quantized.bias)
    x = torch.randn(rows, 64)
    x[rows // 2, 9] = -6.0  # exactly on the threshold counts as beyond
    x[-1] = 0.0
    if rows > 512:
        x[513, 40] = 500.0
    out = torch.full((rows, 48), torch.nan)
    int8_cpu.multiply(x, quantized.weight, quantized.scale, quantized.bias, threshold, out)
    off = (out.double() - reference(x, quantized, threshold)).norm(dim=1)
    assert (off < 2e-2 * x.norm(dim=1) + 1e-6).all() and off.median() < 1e-4
    assert torch.allclose(out[-1], quantized.bias)
    without = torch.empty(rows, 48, dtype=torch.bfloat16)
    int8_cpu.multiply(x, quantized.weight, quantized.scale, None, threshold, without)
    assert relative(without.float(), out - quantized.bias) < 2**-7


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
    linear, quantized = layer(threshold=6.0)
    x = torch.randn(40, 64)
    x[:, 3] *= 30
    on_gpu = Int8Linear(copy.deepcopy(linear).cuda(), 6.0, False)
    assert relative(on_gpu(x.cuda()).cpu(), quantized(x)) < 5e-3


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX512")
@torch.no_grad()
def test_outlier_products_have_few_shapes(monkeypatch):
    """oneDNN keeps a kernel for every shape of 16-bit operands, so that memory would grow with every new number."""
    shapes, multiply = set(), torch.mm
    monkeypatch.setattr(int8_cpu.torch, "mm", lambda a, b, out: shapes.add(a.shape[1]) or multiply(a, b, out=out))
    torch.manual_seed(0)
    quantized = Int8Linear(nn.Linear(200, 48), 6.0, False)
    for count in (1, 2, 7, 63, 64, 65, 130, 199, 200):
        x = torch.randn(600, 200).clamp(-4, 4)
        columns = torch.randperm(200)[:count]
        x[torch.randint(600, (count,)), columns] = 50.0
        x = x.bfloat16()
        out = torch.empty(600, 48, dtype=torch.bfloat16)
        int8_cpu.multiply(x, quantized.weight, quantized.scale, quantized.bias, 6.0, out)
        wanted = reference(x.float(), quantized, 6.0)
        assert relative(out.double(), wanted) < 2**-7
    assert shapes == {64, 128, 192, 200}

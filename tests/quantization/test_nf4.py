"""The 4-bit layer against bitsandbytes' own."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tracknet.quantization.nf4 import Linear4bit


def layer(quant_type="nf4", double=True, dtype=torch.float32, shape=(64, 48), storage="uint8"):
    torch.manual_seed(0)
    linear = nn.Linear(*shape)
    return linear, Linear4bit(linear, quant_type, dtype, double, storage)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_it_computes_what_bitsandbytes_computes(quant_type, double):
    linear, ours = layer(quant_type, double)
    theirs = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, compress_statistics=double, quant_type=quant_type)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    theirs.weight = theirs.weight._quantize("cpu") if theirs.weight.quant_state is None else theirs.weight
    theirs.train()
    x = torch.randn(5, 64, requires_grad=True)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert 0.02 < ((ours(x) - linear(x)).norm() / linear(x).norm()).item() < 0.2


@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (5, 3)])
def test_odd_shapes_and_any_rank(shape):
    _, quantized = layer(shape=shape)
    assert quantized(torch.randn(2, 3, 4, shape[0])).shape == (2, 3, 4, shape[1])
    assert quantized.dequantize().shape == (shape[1], shape[0])


@pytest.mark.parametrize("storage", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (5, 3)])
def test_the_storage_dtype_changes_no_value(storage, shape):
    """bitsandbytes' own packing drops the last weights where they do not fill an element."""
    _, plain = layer(shape=shape)
    _, stored = layer(shape=shape, storage=storage)
    assert stored.weight.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[storage]
    assert torch.equal(stored.dequantize(), plain.dequantize())
    assert stored.weight.numel() * stored.weight.element_size() - plain.weight.numel() in range(4)


def test_the_gradient_is_that_of_the_dequantized_weight():
    _, quantized = layer()
    x = torch.randn(10, 64, requires_grad=True)
    g = torch.randn(10, 48)
    quantized(x).backward(g)
    assert torch.allclose(x.grad, g @ quantized.dequantize(), atol=1e-5)


def test_double_quantization_saves_bytes():
    sizes = {}
    for double in (True, False):
        _, quantized = layer(double=double, shape=(256, 256))
        sizes[double] = sum(t.numel() * t.element_size() for n, t in quantized.state_dict().items() if n != "bias")
    assert sizes[False] == 256 * 256 // 2 + 4 * 256 * 256 // 64
    assert sizes[True] < 0.52 * 256 * 256 + 1100  # 0.516 bytes per weight, and the constants of the second level


def test_training_goes_on_after_evaluation_and_state_loads():
    """Stock layers repack their codes on some CPUs when they evaluate; ours must not."""
    _, one = layer()
    x = torch.randn(4, 64)
    one.eval()
    with torch.no_grad():
        evaluated = one(x)
    one.train()
    assert torch.equal(one(x.requires_grad_()), evaluated)
    torch.manual_seed(9)
    two = Linear4bit(nn.Linear(64, 48), "nf4", torch.float32, True)
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(two(x), evaluated)


def test_the_compute_dtype_is_used():
    _, full = layer()
    _, half = layer(dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    assert half(x).dtype == torch.float32
    assert not torch.equal(half(x), full(x)) and torch.allclose(half(x), full(x), atol=0.05)


def test_fp16_products_do_not_lose_small_gradients():
    """Without a scaler gradients come in fp32 or bf16, and may be smaller than fp16 can say."""
    _, quantized = layer(dtype=torch.float16)
    x = torch.randn(4, 64, requires_grad=True)
    quantized(x).backward(torch.full((4, 48), 1e-9))
    assert (x.grad != 0).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 48), (256, 130)])
def test_the_dequantized_weight_is_that_of_bitsandbytes(quant_type, double, shape):
    linear, ours = layer(quant_type, double, shape=shape)
    codes, state = bnb.functional.quantize_4bit(
        linear.weight.detach(), blocksize=64, compress_statistics=double, quant_type=quant_type
    )
    assert torch.equal(ours.weight.flatten(), codes.flatten())
    wanted = bnb.functional.dequantize_4bit(codes, state).reshape(shape[1], shape[0])
    assert torch.equal(ours.dequantize(), wanted) and ours.dequantize().dtype == torch.float32
    assert ours.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_a_weight_in_16_bits_or_transposed_is_quantized_like_any_other():
    torch.manual_seed(0)
    weight = torch.randn(48, 64).bfloat16().float()
    layers = []
    for given in (weight, weight.bfloat16(), weight.T.contiguous().T):
        linear = nn.Linear(64, 48)
        linear.weight = nn.Parameter(given)
        layers.append(Linear4bit(linear, "nf4", torch.float32, True))
    assert all(torch.equal(one.dequantize(), layers[0].dequantize()) for one in layers)
    assert (layers[0].dequantize() - weight).norm() < 0.15 * weight.norm()


def test_a_layer_is_frozen_but_for_its_bias_and_says_what_it_is():
    linear, quantized = layer("fp4", dtype=torch.bfloat16)
    assert (quantized.in_features, quantized.out_features, quantized.nested) == (64, 48, True)
    assert quantized.quant_type == quantized.storage_dtype == "fp4" and quantized.compute_dtype == torch.bfloat16
    assert quantized.bias is linear.bias and quantized.bias.requires_grad and not quantized.weight.requires_grad
    assert quantized.weight.dtype == torch.uint8 and quantized.weight.shape == (64 * 48 // 2, 1)
    assert quantized.W_q is quantized.weight  # by which peft knows that the weight is packed


@pytest.mark.parametrize("double", [True, False])
def test_what_is_saved_is_codes_and_scales_and_not_the_constants_of_the_format(double):
    _, quantized = layer(double=double)
    nested = ["nested_absmax", "offset"] if double else []
    assert sorted(quantized.state_dict()) == sorted(["absmax", "bias", "weight", *nested])
    with pytest.raises(RuntimeError, match="absmax"):
        quantized.load_state_dict({n: t for n, t in quantized.state_dict().items() if n != "absmax"}, strict=True)


def test_the_bias_is_added_in_the_dtype_of_the_product():
    _, quantized = layer()
    nn.init.normal_(quantized.bias)
    x = torch.randn(4, 64)
    assert torch.allclose(quantized(x), x @ quantized.dequantize().T + quantized.bias, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized(x)
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), quantized(x), atol=0.05)
    bias, quantized.bias = quantized.bias, None
    assert torch.allclose(quantized(x) + bias, x @ quantized.dequantize().T + bias, atol=1e-5)


def test_under_autocast_the_product_is_taken_in_the_layers_own_dtype():
    """In fp32, and rounded once at the end: the layer's setting, and not autocast's, says what is multiplied."""
    _, full = layer()
    _, half = layer(dtype=torch.bfloat16)
    full.bias = half.bias = None
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = full(x)
        assert half(x).dtype == torch.bfloat16
    assert torch.equal(out, full(x).bfloat16())
    assert not torch.equal(out, (x.bfloat16() @ full.dequantize().bfloat16().T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_multiplied_in_the_compute_dtype_but_unscaled_ones_not_in_fp16(dtype, grad_dtype):
    _, quantized = layer(dtype=dtype)
    quantized.bias = None
    x = torch.randn(6, 64, dtype=grad_dtype, requires_grad=True)
    g = torch.randn(6, 48).to(grad_dtype)
    out = quantized(x)
    assert out.dtype == grad_dtype
    out.backward(g)
    product = torch.float32 if dtype == torch.float16 and grad_dtype != torch.float16 else dtype
    wanted = (g.to(product) @ quantized.dequantize(product)).to(grad_dtype)
    assert x.grad.dtype == grad_dtype and torch.equal(x.grad, wanted)


def test_only_codes_and_scales_are_kept_for_backward():
    _, quantized = layer()
    x, saved = torch.randn(4, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        quantized(x).sum()
    kept = {t.data_ptr() for t in [quantized.weight, *quantized.buffers()]}
    assert set(saved) == kept and len(kept) == 6

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
    _, quantised = layer(shape=shape)
    assert quantised(torch.randn(2, 3, 4, shape[0])).shape == (2, 3, 4, shape[1])
    assert quantised.dequantize().shape == (shape[1], shape[0])


@pytest.mark.parametrize("storage", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (5, 3)])
def test_the_storage_dtype_changes_no_value(storage, shape):
    """bitsandbytes' own packing drops the last weights where they do not fill an element."""
    _, plain = layer(shape=shape)
    _, stored = layer(shape=shape, storage=storage)
    assert stored.weight.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[storage]
    assert torch.equal(stored.dequantize(), plain.dequantize())
    assert stored.weight.numel() * stored.weight.element_size() - plain.weight.numel() in range(4)


def test_the_gradient_is_that_of_the_dequantised_weight():
    _, quantised = layer()
    x = torch.randn(10, 64, requires_grad=True)
    g = torch.randn(10, 48)
    quantised(x).backward(g)
    assert torch.allclose(x.grad, g @ quantised.dequantize(), atol=1e-5)


def test_double_quantisation_saves_bytes():
    sizes = {}
    for double in (True, False):
        _, quantised = layer(double=double, shape=(256, 256))
        sizes[double] = sum(t.numel() * t.element_size() for n, t in quantised.state_dict().items() if n != "bias")
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
    _, quantised = layer(dtype=torch.float16)
    x = torch.randn(4, 64, requires_grad=True)
    quantised(x).backward(torch.full((4, 48), 1e-9))
    assert (x.grad != 0).all()

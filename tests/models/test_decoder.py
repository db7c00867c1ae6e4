"""The lean decoder computes what the plain operations do, and keeps less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracknet.memory.meter import LiveBytes
from tracknet.models.decoder import ConvBlock
from tracknet.models.norm_silu import NormSilu


def norm(channels=16):
    torch.manual_seed(0)
    layer = NormSilu(8, channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("chunk", [1, 1 << 20])  # sample by sample, and all at once
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_and_silu_in_one_have_the_same_values_and_gradients(monkeypatch, chunk, channels_last):
    monkeypatch.setattr("tracknet.models.norm_silu.CHUNK", chunk)
    layer, x, g = norm(), torch.randn(3, 16, 5, 7), torch.randn(3, 16, 5, 7)
    found = []
    for lean in (True, False):
        layer.zero_grad()
        own = x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
        out = layer(own) if lean else F.silu(F.group_norm(own, 8, layer.weight, layer.bias, layer.eps))
        out.backward(g)
        found.append([out.detach(), own.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(*found))
    with torch.no_grad():
        assert torch.allclose(layer(x), found[0][0], atol=1e-6)


def test_norm_and_silu_keep_their_input_only():
    layer = norm()
    x = torch.randn(2, 16, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes([x, *layer.parameters()]) as meter, torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and meter.live == out.numel() * 2


class _Convolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_what_a_convolution_reads_is_prepared_again_and_the_convolution_is_not():
    block = ConvBlock(6, 8)
    a, b = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(2, 3, 16, 16, requires_grad=True)
    prepared = []

    def prepare(a, b):
        prepared.append(1)
        return torch.cat([a * 2, b], dim=1)

    with _Convolutions() as seen:
        block(a, b, prepare=prepare).sum().backward()
    assert len(prepared) == 2 and seen.count == 1
    lean = (a.grad.clone(), b.grad.clone(), block[0].weight.grad.clone())
    a.grad = b.grad = None
    block.zero_grad()
    block[1](block[0](torch.cat([a * 2, b], dim=1))).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(lean, (a.grad, b.grad, block[0].weight.grad)))

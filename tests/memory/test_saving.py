"""Checkpointing and offload change what is kept, not what comes out."""

import os

import pytest
import torch

from tests.quantization.test_apply import MODES, NAMES, build
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.memory.offload import offload_activations

CPU = torch.device("cpu")
FRAMES = torch.randint(0, 256, (4, 3, 3, 72, 128), dtype=torch.uint8)


def step(model, context=None):
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    if context is None:
        loss = model(FRAMES).square().mean()
    else:
        with context:
            loss = model(FRAMES).square().mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_gives_the_same_gradients(backbones, kind, mode):
    quantization, lora = MODES[mode]
    plain = step(build(backbones, kind, quantization, lora).train())
    model = build(backbones, kind, quantization, lora).train()
    assert checkpoint_(model, "blocks") == (2 if kind == "vit" else 5)
    assert equal(plain, step(model))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
def test_checkpointing_keeps_far_less(backbones, kind, mode):
    live = {}
    for checkpointed in (False, True):
        model = build(backbones, kind, *MODES[mode]).train()
        if checkpointed:
            checkpoint_(model, "blocks")
        with LiveBytes() as meter:
            maps = model.backbone(FRAMES.flatten(0, 1))
            live[checkpointed] = meter.live
        del maps
    assert live[True] < 0.55 * live[False]


@pytest.mark.parametrize("mode", MODES)
def test_disk_offload_gives_the_same_gradients_and_leaves_no_file(backbones, tmp_path, mode):
    model = build(backbones, "vit", *MODES[mode]).train()
    plain = step(model)
    folder = tmp_path / "offload"
    assert equal(plain, step(model, offload_activations(model, CPU, folder)))
    assert os.listdir(folder) == []


def test_disk_offload_takes_activations_out_of_memory(backbones, tmp_path, monkeypatch):
    monkeypatch.setattr("tracknet.memory.offload.MIN_BYTES", 1024)
    model = build(backbones, "vit").train()
    live = {}
    for name, context in (("plain", None), ("disk", offload_activations(model, CPU, tmp_path))):
        with LiveBytes() as meter:
            if context is None:
                out = model(FRAMES)
            else:
                with context:
                    out = model(FRAMES)
            live[name] = meter.live
        del out
    assert live["disk"] < 0.5 * live["plain"]


def test_weights_are_never_offloaded(backbones, tmp_path, monkeypatch):
    monkeypatch.setattr("tracknet.memory.offload.MIN_BYTES", 0)
    model = build(backbones, "vit").train()
    written = []
    real = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: written.append(k["size"]) or real(*a, **k))
    with offload_activations(model, CPU, tmp_path):
        weight = model.backbone.hf.encoder.layer[0].mlp.fc1.weight
        torch.nn.functional.linear(torch.ones(2, 32, requires_grad=True), weight).sum().backward()
    assert weight.numel() not in written and 64 in written


def test_cpu_offload_on_a_cpu_has_nothing_to_do(backbones):
    model = build(backbones, "vit").train()
    assert equal(step(model), step(model, offload_activations(model, CPU, None)))


@pytest.mark.gpu
def test_cpu_offload_frees_the_gpu(backbones):
    model = build(backbones, "vit").train().cuda()
    frames = FRAMES.cuda()
    used = {}
    for name, disk in (("plain", False), ("offload", True)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        if disk:
            with offload_activations(model, torch.device("cuda"), None):
                out = model(frames)
        else:
            out = model(frames)
        used[name] = torch.cuda.memory_allocated() - before
        out.sum().backward()
        del out
    assert used["offload"] < 0.7 * used["plain"]

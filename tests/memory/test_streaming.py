"""Streamed weights come for their block, one ahead, and go; what trains is never touched."""

import os

import pytest
import torch
from torch import nn

from tests.memory.conftest import GPU
from tests.quantization.test_apply import MODES, NAMES, build
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.mmap import is_mapped
from tracknet.memory.step_meter import split_trained_weights
from tracknet.memory.streaming import place_, state_to_mmap_, stream_weights_

CPU, META = torch.device("cpu"), torch.device("meta")
FRAMES = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def blocks_of(model):
    return model.backbone.family.blocks(model.backbone.hf)


@pytest.mark.parametrize(("kind", "last"), [("vit", 1), ("convnext", 4)])
def test_weights_come_one_block_ahead_in_the_order_of_their_use(backbones, kind, last):
    """In forward from the first block to the last; in backward, which computes again, from the last to the first."""
    model = build(backbones, kind, *MODES["qlora"]).train()
    owner = {id(t): n for n, block in enumerate(blocks_of(model)) for t in split_trained_weights(block)[1]}
    events = []

    def bring(tensor):
        if events[-1:] != [owner[id(tensor)]]:
            events.append(owner[id(tensor)])
        return tensor.clone()

    for number, block in enumerate(blocks_of(model)):
        block.forward = noted(block.forward, lambda number=number: events.append(f"run {number}"))
    stream_weights_(model, CPU, None, bring)
    checkpoint_(model, "blocks")
    loss = model(FRAMES).sum()
    up = [0]
    for n in range(last + 1):
        up += [n + 1, f"run {n}"] if n < last else [f"run {n}"]
    assert events == up
    events.clear()
    loss.backward()
    down = []
    for n in range(last, -1, -1):  # the last is still there
        down += [n - 1, f"run {n}"] if n else [f"run {n}"]
    assert events == down
    events.clear()
    model(FRAMES)
    assert events == up[1:]  # and now the first is


def noted(forward, note):
    def run(*args, **kwargs):
        note()
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mode", ["int8", "qlora", "int8+lora"])
def test_a_block_sees_copies_and_afterwards_its_own_weights(backbones, kind, mode):
    model = build(backbones, kind, *MODES[mode]).train()
    own = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    frozen = [t for block in blocks_of(model) for t in split_trained_weights(block)[1]]
    copies, seen = set(), []

    def bring(tensor):
        copies.add(id(copy := tensor.clone()))
        kept.append(copy)
        return copy

    kept = []
    first = blocks_of(model)[0]
    first.forward = noted(first.forward, lambda: seen.append({id(t) for t in split_trained_weights(first)[1]}))
    waiting = stream_weights_(model, CPU, None, bring)
    assert waiting == sum(t.numel() * t.element_size() for t in {id(t): t for t in frozen}.values()) > 0
    with torch.no_grad():
        model(FRAMES)
    assert seen and seen[0] and seen[0] <= copies
    assert own == {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def test_weights_are_back_when_a_block_fails(backbones):
    model = build(backbones, "vit", *MODES["qlora"]).train()
    own = [id(t) for t in [*model.parameters(), *model.buffers()]]
    first = blocks_of(model)[0]

    def fail():
        raise torch.OutOfMemoryError("x")

    first.forward = noted(first.forward, fail)
    stream_weights_(model, CPU, None, torch.clone)
    with pytest.raises(torch.OutOfMemoryError):
        model(FRAMES)
    assert own == [id(t) for t in [*model.parameters(), *model.buffers()]]


def test_on_a_cpu_weights_are_computed_from_where_they_lie(backbones, tmp_path):
    """In files, once; without a folder nothing moves; either way no block is wrapped."""
    model = build(backbones, "vit", *MODES["qlora"]).train()
    forwards = [block.forward for block in blocks_of(model)]
    frozen = [t for block in blocks_of(model) for t in split_trained_weights(block)[1]]
    places = [t.data_ptr() for t in frozen]
    total = stream_weights_(model, CPU, None)
    assert places == [t.data_ptr() for t in frozen] and not any(map(is_mapped, frozen))
    assert stream_weights_(model, CPU, tmp_path) == total
    mapped = [t.data_ptr() for t in frozen]
    assert all(map(is_mapped, frozen))
    assert not any(is_mapped(t) for t in model.parameters() if t.requires_grad)
    assert stream_weights_(model, CPU, tmp_path) == total and mapped == [t.data_ptr() for t in frozen]
    assert forwards == [block.forward for block in blocks_of(model)] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["default", "int8", "qlora", "lora"])
@pytest.mark.parametrize("blocks_stay", [False, True])
def test_a_placed_model_is_the_same_model(backbones, mode, blocks_stay):
    """The meta device stands for a GPU: all is there, but for frozen weights of blocks that will come and go."""
    model = build(backbones, "vit", *MODES[mode])
    before = {name: (type(p), p.requires_grad, p.shape, p.dtype) for name, p in model.named_parameters()}
    stays = {id(t) for block in blocks_of(model) for t in split_trained_weights(block)[1]} if blocks_stay else set()
    buffers = [name for name, _ in model.named_buffers()]
    place_(model, META, blocks_stay)
    tensors = [*model.parameters(), *model.buffers()]
    assert all((t.device == CPU) == (id(t) in stays) for t in tensors) and stays <= {id(t) for t in tensors}
    after = {name: (type(p), p.requires_grad, p.shape, p.dtype) for name, p in model.named_parameters()}
    assert after == before and buffers == [name for name, _ in model.named_buffers()]
    assert all(t.is_leaf for t in tensors)


def test_state_goes_to_files_once_and_numbers_and_tables_stay(tmp_path):
    weight = nn.Parameter(torch.ones(40, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(40, 3)
    optimizer.step()
    state = optimizer.state[weight]
    state["qmap1"], state["note"], state["elsewhere"] = torch.ones(5), "text", torch.ones(5, device="meta")
    left = {name: state[name] for name in ("step", "qmap1", "note", "elsewhere")}
    moment = state["exp_avg"].clone()
    state_to_mmap_(optimizer, tmp_path)
    mapped = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    assert all(map(is_mapped, mapped.values())) and torch.equal(mapped["exp_avg"], moment)
    assert all(state[name] is value for name, value in left.items()) and not is_mapped(state["step"])
    state_to_mmap_(optimizer, tmp_path)
    assert all(state[name] is value for name, value in mapped.items())


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_copies_come_to_the_device_of_the_model(backbones, tmp_path, kind, folder):
    """The meta device stands for a GPU, on which nothing is computed here."""
    model = build(backbones, kind, freeze=True).train()
    first, second = blocks_of(model)[:2]
    frozen = [t for block in blocks_of(model) for t in split_trained_weights(block)[1]]
    first.forward = second.forward = lambda block: {t.device for t in split_trained_weights(block)[1]}
    place_(model, META, blocks_stay=True)
    assert stream_weights_(model, META, tmp_path if folder else None) > 0
    assert first(first) == {META} and first(second) == {CPU} == second(first)
    assert all(t.device == CPU and is_mapped(t) == folder for t in frozen)


@pytest.mark.parametrize("level", ["blocks", "full"])
def test_a_gpu_brings_weights_beside_its_computation_and_waits_for_them(backbones, played_gpu, level):
    """Stream 1 copies, stream 0 computes: each copy is used after it arrived, and its memory kept until then."""
    plain = build(backbones, "vit", *MODES["qlora"]).train()
    checkpoint_(plain, level)
    plain(FRAMES).square().mean().backward()
    model = build(backbones, "vit", *MODES["qlora"]).train()
    sizes = [[t.numel() for t in tensors_of(block)] for block in blocks_of(model)]
    played_gpu.clear()
    stream_weights_(model, GPU, None)
    assert sorted(played_gpu) == sorted((0, "pinned", size) for block in sizes for size in block)
    checkpoint_(model, level)
    played_gpu.clear()
    loss = model(FRAMES).square().mean()
    copies = [[(1, "to the GPU", size) for size in block] for block in sizes]
    used = [[(0, "used by", size) for size in block] for block in sizes]
    assert played_gpu == [
        *copies[0],
        (1, "event", 0),
        (0, "wait for event", 0),
        *used[0],
        *copies[1],
        (1, "event", 1),
        (0, "wait for event", 1),
        *used[1],
    ]
    loss.backward()
    gradients = [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()) if q.grad is not None]
    assert gradients and all(torch.equal(a, b) for a, b in gradients)


def tensors_of(block):
    """Frozen tensors of a block in the order of its modules."""
    return [t for module in block.modules() for t in frozen_of(module)]


def frozen_of(module):
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [t for t in own if any(t is other for other in split_trained_weights(module)[1])]

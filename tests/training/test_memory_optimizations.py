"""Compiled blocks give the same results as uncompiled ones."""

import warnings
from dataclasses import replace

import pytest
import torch

from tracknet.config import compose
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.training.memory_optimizations import apply_memory_optimizations_


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
@pytest.mark.parametrize("level", ["none", "full"])
def test_compiled_blocks_give_the_same_gradients(tiny, mode, level):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        config = compose(
            "synthetic",
            "vit_tiny_heatmap",
            mode,
            [*tiny("vit"), "training.precision=fp32", f"training.memory_optimization.gradient_checkpointing={level}"],
        )
        torch.manual_seed(0)
        model = build_model(config.model, 3)
        apply_mode(model, config.training.mode, torch.device("cpu"), True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # internal warnings of the compiler
            apply_memory_optimizations_(
                model.train(), replace(config.training, compile=compiled), torch.device("cpu"), None
            )
            frames = torch.randint(
                0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
            )
            with model.rng.scope(7, 0, 2):
                logits = model(frames)
                logits.square().mean().backward()
        found.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (a, grad_a), (b, grad_b) = found
    assert torch.allclose(a, b, atol=5e-2 if mode != "default" else 1e-4)
    assert (grad_a - grad_b).norm() < (0.05 if mode != "default" else 1e-3) * grad_a.norm()

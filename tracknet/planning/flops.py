"""Arithmetic of a training step, counted on tensors without content, beside the rate of a device's matrix products."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tracknet.memory.meter import synchronize
from tracknet.models.heatmap_model import ModelConfig
from tracknet.planning.estimate import build_on_meta, clear_tensor_caches, fake_batch
from tracknet.training.config import MemoryConfig, TrainingConfig
from tracknet.training.losses import heatmap_loss

GPU_SIDE, CPU_SIDE = 8192, 2048  # side of the square matrices whose product is timed
REPEATS = 5


def count_flops(model: ModelConfig, training: TrainingConfig, num_frames: int, input_wh: tuple[int, int]) -> int:
    """Count the floating-point or integer operations of forward and backward of one window.

    Only what a step needs is counted: matrix products, convolutions and attention, without recomputation.

    Args:
        model: model configuration; only the architecture is read, never the weights.
        training: training configuration, with the mode.
        num_frames: frames per window.
        input_wh: width and height of the frames in pixels.
    """
    built, _ = build_on_meta(model, replace(training, memory_optimization=MemoryConfig()), num_frames, False, "cpu")
    clear_tensor_caches(built)
    with FakeTensorMode(), torch.device("cpu"):
        batch = fake_batch(built, 1, input_wh)
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            heatmap_loss(built(batch["frames"]), batch, training.loss).backward()
    clear_tensor_caches(built)
    return counter.get_total_flops()


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return functions from the shapes of an operator's arguments to its operations, for those unknown to torch."""
    # Imported here, because only then are the operators registered.
    import bitsandbytes  # noqa: F401

    from tracknet.quantization import int8_fused  # noqa: F401

    aten = torch.ops.aten
    return {
        torch.ops.tracknet.multiply_int8: lambda x, codes, scale, marks, weight, *_, **__: _product(x, weight),
        torch.ops.bitsandbytes.int8_linear_matmul: lambda codes, weight, *_, **__: _product(codes, weight),
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v),
        # Two products for each of forward; the scores are computed again, which is not counted.
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            2 * _attention(q, k, v)
        ),
    }


def _product(x: Sequence[int], weight: Sequence[int]) -> int:
    """Return the operations of ``x @ weight.T``: a multiplication and an addition per pair of values."""
    return 2 * math.prod(x) * weight[0]


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Return the operations of ``softmax(q @ k.T) @ v`` for ``[batch, head, token, channel]``, without the softmax."""
    return 2 * math.prod(q) * k[2] + 2 * math.prod(q[:3]) * math.prod(v[2:])


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of the product of two large matrices, the median of several."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(2 + REPEATS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[2:])

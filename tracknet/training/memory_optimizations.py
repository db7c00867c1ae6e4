"""What of a step is compiled, recomputed, streamed and offloaded, in the one order that works."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.offload import offload_activations
from tracknet.memory.streaming import stream_weights_
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.training.config import TrainingConfig


def apply_memory_optimizations_(
    model: HeatmapModel, config: TrainingConfig, device: torch.device, files: Path | None
) -> tuple[AbstractContextManager, int]:
    """Change how a model's step is run, not what it computes.

    Args:
        model: with its mode applied, on its device; changed in place.
        config: how.
        device: where it is.
        files: folder for what is offloaded to disk, or ``None``.

    Returns:
        What is to be entered around every forward, and how many bytes of frozen weights wait until their block runs.
    """
    memory = config.memory_optimization
    if config.compile and model.backbone is not None:
        # Inside of what is recomputed and streamed: neither is for a compiler to look into.
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    offloaded_bytes = (
        stream_weights_(model, device, files) if memory.streams_weights and model.backbone is not None else 0
    )
    if memory.checkpointing != "none":
        checkpoint_(model, memory.checkpointing)
    return offload_activations(model, device, "host" if memory.use_cpu_offload else files), offloaded_bytes

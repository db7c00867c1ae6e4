"""Application of compilation, weight streaming, checkpointing and activation offload to a model, in this order."""

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
    """Apply the memory optimizations of a configuration to a model.

    They change how a step runs; its results stay the same except for rounding. The order matters: each optimization
    wraps the forward of the blocks, with compilation innermost and checkpointing outermost.

    Args:
        model: model with its mode applied, on its device; changed in place.
        config: training section of the configuration.
        device: device of the model.
        files: folder for tensors that are offloaded to disk, or ``None`` for no disk offload.

    Returns:
        Context to enter around every forward, and bytes of the frozen weights that are streamed to the device.
    """
    memory = config.memory_optimization
    if config.compile and model.backbone is not None:
        # Innermost, so that the compiler does not trace through weight streaming and checkpointing.
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    # Before checkpointing, so that recomputation in backward streams the weights again.
    offloaded_bytes = (
        stream_weights_(model, device, files) if config.streams_weights and model.backbone is not None else 0
    )
    if memory.level != "none":
        checkpoint_(model, memory.level)
    # With both kinds of offload, activations go to host memory and weights to files.
    return offload_activations(model, device, "host" if memory.use_cpu_offload else files), offloaded_bytes

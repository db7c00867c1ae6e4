"""Gradient checkpointing (Chen et al., 2016): keep a block's input only, and compute the rest again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel


def checkpoint_(model: HeatmapModel, level: Literal["blocks", "full"]) -> int:
    """Make every block of the backbone forget its activations, and at ``full`` every stage of the decoder; return how many.

    ConvNeXt has no checkpointing of its own in transformers, and a ViT's knows nothing of ours: both are wrapped alike.
    Where no gradient flows nothing is kept anyway, and the wrapper steps aside.
    """
    if model.backbone is None:
        raise UserError(f"training.memory_optimization.gradient_checkpointing={level} recomputes the blocks of a backbone, and this "
                        "model has none: set it to false.")  # fmt: skip
    blocks = model.backbone.family.blocks(model.backbone.hf)
    if level == "full":
        blocks += model.head.stages()
    for block in blocks:
        block.forward = _recomputed(block, block.forward)
    return len(blocks)


def _recomputed(block: nn.Module, forward: Callable) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled() or not block.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run

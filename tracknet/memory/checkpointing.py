"""Gradient checkpointing (Chen et al., 2016): keep a block's input only, and compute the rest again in backward.

Windows do not see each other, so at ``full`` a large batch goes through a block in parts: what is computed again is
never more than one part, where a whole batch of a block at high resolution takes more than all the inputs that are
kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel

PART = 1 << 22  # values of its input that a block takes at a time, at `full`


def checkpoint_(model: HeatmapModel, level: Literal["blocks", "full"]) -> int:
    """Make every block of the backbone forget its activations, and at ``full`` the decoder too, in parts; return how
    many do.

    ConvNeXt has no checkpointing of its own in transformers, and a ViT's knows nothing of ours: both are wrapped alike.
    Where no gradient flows nothing is kept anyway, and the wrapper steps aside.
    """
    if model.backbone is None:
        raise UserError(
            f"training.memory_optimization.gradient_checkpointing={level} recomputes the blocks of a backbone, and this"
            " model has none: set it to false."
        )
    blocks = model.blocks
    for block in blocks:
        block.forward = _recomputed(block, model, model.num_frames if level == "full" else None)
    if level == "full":
        model.head.forward = _recomputed(model.head, model, rows_per_window=1)
    return len(blocks) + (level == "full")


def _recomputed(block: nn.Module, model: HeatmapModel, rows_per_window: int | None) -> Callable:
    """Return the block's forward, checkpointed.

    Args:
        block: takes a tensor of all windows, perhaps lists of such, and whatever else all parts share.
        model: says which windows a forward sees.
        rows_per_window: of the first argument, to go in parts; ``None`` = all at once.
    """
    forward = block.forward

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        if not torch.is_grad_enabled() or not block.training:
            return forward(x, *args, **kwargs)
        if rows_per_window is None or len(x) % rows_per_window:  # or images that are no windows
            return checkpoint(forward, x, *args, use_reentrant=False, **kwargs)
        windows = len(x) // rows_per_window
        seed, first = model.rng.seed, model.rng.first
        size = max(1, PART // x[:rows_per_window].numel())
        outputs = []
        for start, own in zip(range(0, windows, size), zip(*(_parts(arg, windows, size) for arg in (x, *args)))):

            def run_part(*args: Any, start: int = start, **kwargs: Any) -> Tensor | tuple:
                with model.rng.scope(seed, first + start, min(size, windows - start)):
                    return forward(*args, **kwargs)

            outputs.append(checkpoint(run_part, *own, use_reentrant=False, **kwargs))
        if len(outputs) == 1:
            return outputs[0]
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outputs))
        return torch.cat(outputs)

    return run


def _parts(arg: object, windows: int, size: int) -> Iterable:
    """Cut a tensor, or each tensor of a list, into parts of so many windows; anything else goes to every part."""
    if isinstance(arg, list):
        return (list(parts) for parts in zip(*(_parts(item, windows, size) for item in arg)))
    # Split at once: the gradients of slices taken one by one would each have the size of the whole.
    return arg.split(size * (len(arg) // windows)) if isinstance(arg, Tensor) else itertools.repeat(arg)

"""Gradient checkpointing (Chen et al., 2016): store only the input of a block and recompute the rest in backward.

Some activations are dear to recompute and others nearly free: a matrix product takes a thousand operations per byte of
its result, a norm or an activation function a few. Level ``selective`` keeps the results of products and of attention,
and recomputes the rest.

The windows of a batch are independent of each other, so at level ``full`` a large batch passes through a block in
parts. Only one part is recomputed at a time. Recomputing the whole batch of a high-resolution block would take more
memory than all stored inputs together.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.operators import OPERATORS, as_operators

Level = Literal["none", "selective", "blocks", "full"]
LOW_RANK = 64  # largest inner dimension of a matrix product that is recomputed at level `selective`
aten = torch.ops.aten
_MATMULS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}  # index of the left operand
_DEAR = {
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
PART = 1 << 22  # largest number of input values that a block processes at once, at level `full`


def checkpoint_(model: HeatmapModel, level: Level) -> int:
    """Checkpoint every block of the backbone and, at level ``full``, the decoder.

    At ``full``, blocks and decoder process a batch in parts. Both backbone families use the same wrapper: transformers
    has no checkpointing for ConvNeXt, and its checkpointing for ViT does not know these levels and parts. In evaluation
    mode and without gradients the wrapper calls the original forward.

    Args:
        model: model with a backbone; the ``forward`` of its modules is replaced in place.
        level: ``selective`` and ``blocks`` for the backbone's blocks, each with the whole batch; ``full`` for blocks
            and decoder, in parts. Not ``none``.

    Returns:
        Number of checkpointed modules.

    Raises:
        UserError: if the model has no backbone.
    """
    if model.backbone is None:
        raise UserError(
            f"training.memory_optimization.gradient_checkpointing={level} recomputes the blocks of a backbone, but this"
            " model has none: set it to false."
        )
    blocks = model.blocks
    context_fn = _selective_contexts if level == "selective" else noop_context_fn
    for block in blocks:
        # A backbone sees single images: the frames of a window are consecutive rows of its input.
        rows_per_window = model.num_frames if level == "full" else None
        block.forward = _checkpointed_forward(block, model, rows_per_window, context_fn)
    if level == "full":
        # The decoder sees windows: one row of its first argument each.
        model.head.forward = _checkpointed_forward(model.head, model, rows_per_window=1)
    return len(blocks) + (level == "full")


@contextlib.contextmanager
def checkpointed(model: HeatmapModel, level: Level) -> Iterator[None]:
    """Checkpoint a model within a context only, for example to time a level.

    Args:
        model: model as for ``checkpoint_``.
        level: level of checkpointing; ``none`` leaves the model as it is.
    """
    modules = [*model.blocks, model.head]
    # The forward that a module has as an attribute of its own, as after compilation; None for that of its class.
    forwards = [module.__dict__.get("forward") for module in modules]
    if level != "none":
        checkpoint_(model, level)
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of forward and recomputation that keep the results of ``_is_dear`` operators."""
    contexts = create_selective_checkpoint_contexts(
        lambda _ctx, op, *args, **_: (
            CheckpointPolicy.MUST_SAVE if _is_dear(op, args) else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )
    forward, recomputation = (_with_operators(context) for context in contexts)
    return forward, recomputation


@contextlib.contextmanager
def _with_operators(context: AbstractContextManager) -> Iterator[None]:
    """Enter a context in which quantized products are single operators."""
    with as_operators(), context:
        yield


def _is_dear(op: Any, args: tuple) -> bool:
    """Return whether an operator takes so much time that its result is kept for backward."""
    if op in _MATMULS:
        # A low-rank product, such as the second half of an adapter, costs no more than an activation function.
        return args[_MATMULS[op]].shape[-1] > LOW_RANK
    return op in OPERATORS or op in _DEAR


def _checkpointed_forward(
    block: nn.Module, model: HeatmapModel, rows_per_window: int | None, context_fn: Callable = noop_context_fn
) -> Callable:
    """Return the forward of a block with gradient checkpointing.

    Args:
        block: module that takes a tensor of all windows, and optionally further tensors, lists of tensors, and
            arguments shared by all parts.
        model: model whose ``rng`` knows the windows of the current forward.
        rows_per_window: rows of the first argument that belong to one window, to process the batch in parts; ``None``
            to process it at once.
        context_fn: function that returns the contexts of forward and recomputation.
    """
    forward = block.forward

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        if not torch.is_grad_enabled() or not block.training:
            return forward(x, *args, **kwargs)
        # Before the first block that trains there is no gradient, and so nothing to recompute.
        if not _requires_grad(x, *args) and not any(p.requires_grad for p in block.parameters()):
            run_block: Callable = _call
        else:
            # The non-reentrant variant supports keyword arguments. It also trains weights in a block whose input
            # requires no gradient, such as adapters in the first block.
            run_block = partial(checkpoint, use_reentrant=False, context_fn=context_fn)
        if rows_per_window is None or len(x) % rows_per_window:  # no parts, or images that form no windows
            return run_block(forward, x, *args, **kwargs)
        windows = len(x) // rows_per_window
        # Read now: recomputation in backward must draw for the same windows as this forward.
        seed, first = model.rng.seed, model.rng.first
        size = max(1, PART // x[:rows_per_window].numel())  # windows per part
        outputs = []
        for start, part_args in zip(
            range(0, windows, size), zip(*(_split_windows(arg, windows, size) for arg in (x, *args)))
        ):
            # `start` is a default argument because backward calls this function again after the loop has moved on. The
            # scope tells layers that draw by window which windows the part contains, so that every window gets the
            # dropout mask that it gets in a whole batch, in forward and in recomputation.
            def run_part(*args: Any, start: int = start, **kwargs: Any) -> Tensor | tuple:
                with model.rng.scope(seed, first + start, min(size, windows - start)):
                    return forward(*args, **kwargs)

            outputs.append(run_block(run_part, *part_args, **kwargs))
        # Put the parts together again: a tensor, or a tuple of tensors for a block with several outputs.
        if len(outputs) == 1:
            return outputs[0]
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outputs))
        return torch.cat(outputs)

    return run


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function without checkpointing."""
    return function(*args, **kwargs)


def _requires_grad(*args: object) -> bool:
    """Return whether a tensor, or a tensor in a list, requires a gradient."""
    return any(_requires_grad(*arg) if isinstance(arg, list) else getattr(arg, "requires_grad", False) for arg in args)


def _split_windows(arg: object, windows: int, size: int) -> Iterable:
    """Split a tensor, or each tensor of a list, into parts of ``size`` windows; repeat any other argument."""
    if isinstance(arg, list):
        return (list(parts) for parts in zip(*(_split_windows(item, windows, size) for item in arg)))
    # A single split: backward of a slice allocates a gradient of the size of the whole tensor, once for every slice.
    return arg.split(size * (len(arg) // windows)) if isinstance(arg, Tensor) else itertools.repeat(arg)

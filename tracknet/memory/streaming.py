"""Streaming of the frozen weights of backbone blocks from host memory or files to the device.

A block's weights are copied to the device for its forward only, so a backbone may be larger than the GPU. Streaming
requires gradient checkpointing: without it, autograd would keep every copy until backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracknet.memory.mmap import is_mapped, to_mmap
from tracknet.memory.step_meter import split_trained_weights
from tracknet.models.heatmap_model import HeatmapModel


def place_(model: HeatmapModel, device: torch.device, blocks_stay: bool) -> None:
    """Move a model to its device, except the frozen weights of its blocks if those will be streamed.

    Args:
        model: model to move in place.
        device: device on which the model runs.
        blocks_stay: whether the frozen weights of blocks stay in host memory.
    """
    if not blocks_stay:
        model.to(device)
        return
    streamed_ids = {id(t) for block in model.blocks for t in split_trained_weights(block)[1]}
    for module in model.modules():
        direct_tensors = [*module._parameters.values(), *module._buffers.values()]
        if not any(id(t) in streamed_ids for t in direct_tensors if t is not None):
            # Not `.to`, which would also move the submodules.
            module._apply(lambda t: t.to(device), recurse=False)
            continue
        # A module with streamed tensors: move the others one by one.
        stores: list[Any] = [module._parameters, module._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in streamed_ids:
                    moved = tensor.detach().to(device)
                    parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if parameter else moved


def stream_weights_(
    model: HeatmapModel, device: torch.device, folder: Path | None, bring: Callable | None = None
) -> int:
    """Move the frozen weights of the backbone's blocks to host memory or files, and stream them for each forward.

    Call this before ``checkpoint_``, so that recomputation in backward streams the weights again. On a CPU no copies
    are made: weights in files are used where they are mapped.

    Args:
        model: model with its frozen block weights in host memory (see ``place_``).
        device: device on which the model runs.
        folder: folder for memory-mapped files; ``None`` for pinned host memory.
        bring: function that copies a tensor to the device, for planning; ``None`` for a real copy.

    Returns:
        Bytes of the streamed weights.
    """
    total = 0
    streamed: list[_StreamedWeights] = []
    # All blocks share one copy stream. The caching allocator has separate free memory for each stream, so this lets
    # the memory that one block releases be reused for the next block but one.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    seen: set[tuple[int, int]] = set()
    for block in model.blocks:
        slots = []
        for module in block.modules():
            frozen = {id(t) for t in split_trained_weights(module)[1]}
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or id(tensor) not in frozen or (id(tensor), id(tensors)) in seen:
                        continue
                    seen.add((id(tensor), id(tensors)))
                    total += tensor.numel() * tensor.element_size()
                    # Replace the content but keep the tensor object, to which others may refer.
                    tensor.data = _offload(tensor.data, device, folder)
                    slots.append((tensors, name))
        streamed.append(_StreamedWeights(slots, device, stream, bring))
    if device.type != "cpu" or bring is not None:
        for index, block in enumerate(model.blocks):
            block.forward = _forward_with_weights(block.forward, streamed, index)
    return total


def _offload(tensor: Tensor, device: torch.device, folder: Path | None) -> Tensor:
    """Return a copy of a tensor in a file or, for a GPU, in pinned memory; the tensor itself if that is not needed."""
    if folder is not None:
        return tensor if is_mapped(tensor) else to_mmap(tensor.contiguous(), folder)
    # Only from pinned memory can a copy run beside the computation.
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor


class _StreamedWeights:
    """Frozen weights of one block, and their copies on the device while they are needed.

    Args:
        slots: positions of the weights: a module's dict of parameters or buffers, and the name in it.
        device: device on which the model runs.
        stream: CUDA stream for copies; ``None`` on other devices.
        bring: function that copies a tensor to the device; ``None`` for an asynchronous copy.
    """

    def __init__(
        self,
        slots: list[tuple[dict, str]],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        bring: Callable | None,
    ):
        self.slots, self.device, self._stream = slots, device, stream
        self._bring = bring or (lambda tensor: tensor.to(device, non_blocking=True))
        self._copies: list[Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None

    def prefetch(self) -> None:
        """Start to copy the weights to the device, concurrent with its computation, unless they are on it already."""
        if self._copies is not None:
            return
        if self._stream is None:
            self._copies = [self._bring(tensors[name]) for tensors, name in self.slots]
            return
        with torch.cuda.stream(self._stream):
            self._copies = [self._bring(tensors[name]) for tensors, name in self.slots]
            self._arrived = self._stream.record_event()

    def release(self) -> None:
        """Drop the references to the copies; autograd may still hold some."""
        self._copies = None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Replace the block's weights by their copies on the device within the context."""
        self.prefetch()
        copies = self._copies or []
        if self._stream is not None and self._arrived is not None:
            # The computation waits for the copies on the GPU; the host does not block.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._arrived)
            for copy in copies:
                # Allocated on the copy stream: without this, the allocator could give the memory of a released copy to
                # the next one while kernels that read it are still queued.
                copy.record_stream(current)
        originals = [tensors[name] for tensors, name in self.slots]
        # Assigned in the modules' dicts: as attributes, plain tensors could not take the place of parameters.
        try:
            for (tensors, name), copy in zip(self.slots, copies):
                tensors[name] = copy
            yield
        finally:  # also when memory runs out in the block
            for (tensors, name), original in zip(self.slots, originals):
                tensors[name] = original


def _forward_with_weights(forward: Callable, streamed: list[_StreamedWeights], index: int) -> Callable:
    """Return the forward of block ``index``, which streams its weights and prefetches those of the block after it."""

    def run(*args: object, **kwargs: object) -> object:
        # In backward (where autograd has a current graph task) checkpointing recomputes the blocks from the last to the
        # first, so the block before this one comes next.
        following = index - 1 if torch._C._current_graph_task_id() != -1 else index + 1
        # Copies of this block are not released after its forward: a block that processes a batch in parts runs once
        # for each of them.
        for other, weights in enumerate(streamed):
            if other not in (index, following):
                weights.release()
        with streamed[index].on_device():
            if 0 <= following < len(streamed):
                streamed[following].prefetch()
            return forward(*args, **kwargs)

    return run


def state_to_mmap_(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Move the state tensors of an optimizer from CPU memory to files, where the optimizer updates them in place.

    Args:
        optimizer: optimizer that has taken a step, which creates its state.
        folder: folder for memory-mapped files.
    """
    for state in optimizer.state.values():
        for key, tensor in state.items():
            shared = key.startswith("qmap")  # table of 8-bit codes, one tensor for all parameters
            if (
                isinstance(tensor, Tensor)
                and tensor.device.type == "cpu"
                and tensor.ndim
                and not shared
                and not is_mapped(tensor)
                # Managed memory of bitsandbytes looks like a CPU tensor, but its kernels need it where it is.
                and not getattr(tensor, "is_paged", False)
            ):
                state[key] = to_mmap(tensor, folder)

"""Frozen weights of backbone blocks that wait off the device and come when their block runs.

With them away, a backbone may be larger than the GPU. It takes checkpointing: without, autograd would keep every copy
until backward.
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
    """Move a model to its device, but for the frozen weights of its blocks where those will be streamed."""
    if not blocks_stay:
        model.to(device)
        return
    stays = {id(t) for block in model.blocks for t in split_trained_weights(block)[1]}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if not any(id(t) in stays for t in own if t is not None):
            module._apply(lambda t: t.to(device), recurse=False)
            continue
        stores: list[Any] = [module._parameters, module._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in stays:
                    moved = tensor.detach().to(device)
                    parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if parameter else moved


def stream_weights_(
    model: HeatmapModel, device: torch.device, folder: Path | None, bring: Callable | None = None
) -> int:
    """Put the frozen weights of the backbone's blocks into host memory, or files, and bring them for their block's
    forward only.

    Call it before ``checkpoint_``, whose recomputation brings them again. On a CPU, files are computed from as they
    are.

    Args:
        model: with its frozen block weights in host memory (``place_``).
        device: where the model runs.
        folder: for memory-mapped files; ``None`` = pinned host memory.
        bring: copies a tensor to the device; for planning.

    Returns:
        Bytes that wait.
    """
    total = 0
    streamed: list[_Streamed] = []
    # One for all: the allocator keeps memory apart by stream, and what one block leaves is for the next but one.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    seen: set[tuple[int, int]] = set()
    for block in model.blocks:
        places = []
        for module in block.modules():
            frozen = {id(t) for t in split_trained_weights(module)[1]}
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or id(tensor) not in frozen or (id(tensor), id(tensors)) in seen:
                        continue
                    seen.add((id(tensor), id(tensors)))
                    total += tensor.numel() * tensor.element_size()
                    tensor.data = _away(tensor.data, device, folder)
                    places.append((tensors, name))
        streamed.append(_Streamed(places, device, stream, bring))
    if device.type != "cpu" or bring is not None:
        for index, block in enumerate(model.blocks):
            block.forward = _with_weights(block.forward, streamed, index)
    return total


def _away(tensor: Tensor, device: torch.device, folder: Path | None) -> Tensor:
    if folder is not None:
        return tensor if is_mapped(tensor) else to_mmap(tensor.contiguous(), folder)
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor


class _Streamed:
    """The frozen weights of a block: where they belong, and their copies on the device while they are there."""

    def __init__(
        self,
        places: list[tuple[dict, str]],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        bring: Callable | None,
    ):
        self.places, self.device, self._stream = places, device, stream
        self._bring = bring or (lambda tensor: tensor.to(device, non_blocking=True))
        self._copies: list[Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Begin to bring the weights, beside what the device is doing."""
        if self._copies is not None:
            return
        if self._stream is None:
            self._copies = [self._bring(tensors[name]) for tensors, name in self.places]
            return
        with torch.cuda.stream(self._stream):
            self._copies = [self._bring(tensors[name]) for tensors, name in self.places]
            self._arrived = self._stream.record_event()

    def release(self) -> None:
        """Let go of the copies; autograd may still hold on to them."""
        self._copies = None

    @contextmanager
    def here(self) -> Iterator[None]:
        """Let the block see the copies in place of its weights."""
        self.begin()
        copies = self._copies or []
        if self._stream is not None and self._arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._arrived)
            for copy in copies:
                copy.record_stream(current)
        originals = [tensors[name] for tensors, name in self.places]
        try:
            for (tensors, name), copy in zip(self.places, copies):
                tensors[name] = copy
            yield
        finally:
            for (tensors, name), original in zip(self.places, originals):
                tensors[name] = original


def _with_weights(forward: Callable, streamed: list[_Streamed], index: int) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        # Backward recomputes the blocks from the last to the first. A block that goes in parts keeps its weights for
        # all of them.
        following = index - 1 if torch._C._current_graph_task_id() != -1 else index + 1
        for other, weights in enumerate(streamed):
            if other not in (index, following):
                weights.release()
        with streamed[index].here():
            if 0 <= following < len(streamed):
                streamed[following].begin()
            return forward(*args, **kwargs)

    return run


def state_to_mmap_(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Move an optimizer's state into files, where it is in plain memory of the CPU; the optimizer goes on in place."""
    for state in optimizer.state.values():
        for key, tensor in state.items():
            shared = key.startswith("qmap")  # a table that all parameters point to
            if (
                isinstance(tensor, Tensor)
                and tensor.device.type == "cpu"
                and tensor.ndim
                and not shared
                and not is_mapped(tensor)
                and not getattr(tensor, "is_paged", False)  # bitsandbytes's managed memory, which its kernels ask for
            ):
                state[key] = to_mmap(tensor, folder)

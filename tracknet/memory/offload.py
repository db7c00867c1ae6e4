"""Offloading of activations between forward and backward, to pinned host memory or to files."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tracknet.memory.mmap import to_mmap

MIN_BYTES = 1 << 18  # smallest tensor that is moved, in bytes; moving a smaller one costs more than it frees


def offload_activations(model: nn.Module, device: torch.device, place: Path | str | None) -> AbstractContextManager:
    """Return a context in which forward stores the tensors that autograd saves for backward off the device.

    Weights stay on the device, and so do the 16-bit copies of them that autocast makes.

    Args:
        model: model whose parameters and buffers are never moved.
        device: device of the model.
        place: folder for memory-mapped files; ``"host"`` for pinned host memory (no effect on a CPU, whose tensors are
            in host memory already); ``"nowhere"`` to keep shapes without content, for planning; ``None`` to move
            nothing.
    """
    if place is None or (place == "host" and device.type == "cpu"):
        return nullcontext()
    # Compared by storage, so that views of parameters and buffers are recognized too.
    model_storages = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    host = _HostMemory(device) if place == "host" else None

    def pack(tensor: Tensor) -> Any:
        """Move a tensor that autograd saves; return what ``unpack`` needs to bring it back."""
        size = tensor.numel() * tensor.element_size()
        if (
            tensor.layout != torch.strided
            or size < MIN_BYTES
            or tensor.untyped_storage()._cdata in model_storages
            or _is_copy_of_weight(tensor)
        ):
            return tensor
        tensor = tensor.detach()  # what is stored must not hold a part of the graph
        if host is not None:
            return host.store(tensor)
        return (tensor.device, to_mmap(tensor, place) if isinstance(place, Path) else tensor.to("meta"))

    def unpack(packed: Any) -> Tensor:
        """Return the tensor that ``pack`` was given, on its device; may be called several times."""
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _SavedActivation) and host is not None:
            return host.load(packed)
        origin, tensor = packed
        if tensor.device.type == "meta":
            return torch.empty_like(tensor, device=origin)
        # On a CPU a mapped tensor is copied too: an in-place operation in backward must not change the file, which a
        # second backward over the same graph reads again.
        return tensor.clone() if origin.type == "cpu" else tensor.to(origin, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _is_copy_of_weight(tensor: Tensor) -> bool:
    """Return whether a tensor is made of a leaf of the graph, such as a weight, by casts, transposes and views only."""
    node = tensor.grad_fn
    while node is not None and node.name() in ("TBackward0", "TransposeBackward0", "ViewBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    # AccumulateGrad is the node of a leaf that requires a gradient.
    return type(node).__name__ == "AccumulateGrad" and tensor.grad_fn is not None


class _SavedActivation:
    """Activation in host memory.

    Attributes:
        host: pinned copy.
        written: event at which that copy is complete.
        previous: weak reference to the activation that was saved before this one, dead once no backward needs it.
        back: copy on the device, once its transfer has started, else ``None``.
        arrived: event at which ``back`` is complete.
    """

    def __init__(self, host: Tensor, written: torch.cuda.Event, previous: weakref.ref[_SavedActivation] | None):
        self.host, self.written, self.previous = host, written, previous
        self.back: Any = None
        self.arrived: Any = None


class _HostMemory:
    """Transfers to and from pinned host memory on a separate CUDA stream, concurrent with the computation.

    Backward uses activations in the reverse order of forward. So each one that is used starts the transfer of the one
    saved before it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.last: weakref.ref[_SavedActivation] | None = None

    def store(self, tensor: Tensor) -> _SavedActivation:
        """Start the copy of a tensor to host memory."""
        # The kernels that compute the tensor are queued on the current stream and may not have run yet.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            # Copies are asynchronous only to and from pinned memory. `empty_like` keeps the strides, so that kernels in
            # backward sum in the same order.
            host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            written = self.stream.record_event()
        # The caching allocator tracks only the stream that a tensor was allocated on. Without this, it could reuse the
        # memory before the copy has read it.
        tensor.record_stream(self.stream)
        saved = _SavedActivation(host, written, self.last)
        self.last = weakref.ref(saved)
        return saved

    def load(self, saved: _SavedActivation) -> Tensor:
        """Return an activation on the device, and start the transfer of the one saved before it."""
        self._start_transfer(saved)
        previous = saved.previous() if saved.previous is not None else None
        if previous is not None:
            self._start_transfer(previous)
        # The wait is queued on the GPU; the host does not block.
        current = torch.cuda.current_stream(self.device)
        current.wait_event(saved.arrived)
        # Give up the reference, so that the memory is free as soon as backward has used the tensor.
        tensor, saved.back = saved.back, None
        # Likewise: this tensor was allocated on the copy stream, and is used on the current one.
        tensor.record_stream(current)
        return tensor

    def _start_transfer(self, saved: _SavedActivation) -> None:
        """Start the copy of an activation to the device, unless it has been started."""
        if saved.back is None:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(saved.written)
                saved.back = saved.host.to(self.device, non_blocking=True)
                saved.arrived = self.stream.record_event()

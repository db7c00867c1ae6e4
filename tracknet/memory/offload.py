"""Where activations wait for backward: on the device, in pinned host memory, or in a file."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tracknet.memory.mmap import to_mmap

MIN_BYTES = 1 << 18  # smaller ones cost more to move than they free


def offload_activations(model: nn.Module, device: torch.device, place: Path | str | None) -> AbstractContextManager:
    """Return a context in which forward puts what backward needs off the device.

    Weights, and the 16-bit copies of them that autocast makes, stay where they are.

    Args:
        model: its parameters and buffers are never moved.
        device: where the model runs.
        place: a folder for memory-mapped files; ``"host"`` for pinned host memory, which on a CPU is where they are
            already; ``"nowhere"`` to leave no content at all, for planning; ``None`` to keep them.
    """
    if place is None or (place == "host" and device.type == "cpu"):
        return nullcontext()
    stays = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    host = _HostMemory(device) if place == "host" else None

    def pack(tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if (
            tensor.layout != torch.strided
            or size < MIN_BYTES
            or tensor.untyped_storage()._cdata in stays
            or _is_copy_of_weight(tensor)
        ):
            return tensor
        tensor = tensor.detach()
        if host is not None:
            return host.take(tensor)
        return (tensor.device, to_mmap(tensor, place) if isinstance(place, Path) else tensor.to("meta"))

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Saved) and host is not None:
            return host.give(packed)
        home, tensor = packed
        if tensor.device.type == "meta":
            return torch.empty_like(tensor, device=home)
        # A mapped tensor is copied too: what backward does in place must not reach the file.
        return tensor.clone() if home.type == "cpu" else tensor.to(home, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _is_copy_of_weight(tensor: Tensor) -> bool:
    node = tensor.grad_fn
    while node is not None and node.name() in ("TBackward0", "TransposeBackward0", "ViewBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    return type(node).__name__ == "AccumulateGrad" and tensor.grad_fn is not None


class _Saved:
    """An activation in host memory; ``back`` once its way back has begun. ``before`` is the one that was saved before
    it, if it is still wanted."""

    def __init__(self, host: Tensor, written: torch.cuda.Event, before: weakref.ref[_Saved] | None):
        self.host, self.written, self.before = host, written, before
        self.back: Any = None
        self.arrived: Any = None


class _HostMemory:
    """Copies to and from pinned host memory beside the computation, on a stream of its own.

    Backward wants last what forward saved first: while one activation is used, the one saved before it is already on
    its way.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.last: weakref.ref[_Saved] | None = None

    def take(self, tensor: Tensor) -> _Saved:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            # Laid out alike, so that kernels sum in the same order.
            host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            written = self.stream.record_event()
        tensor.record_stream(self.stream)  # its memory is not used again before it was read
        saved = _Saved(host, written, self.last)
        self.last = weakref.ref(saved)
        return saved

    def give(self, saved: _Saved) -> Tensor:
        self._begin(saved)
        before = saved.before() if saved.before is not None else None
        if before is not None:
            self._begin(before)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(saved.arrived)
        tensor, saved.back = saved.back, None
        tensor.record_stream(current)
        return tensor

    def _begin(self, saved: _Saved) -> None:
        if saved.back is None:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(saved.written)
                saved.back = saved.host.to(self.device, non_blocking=True)
                saved.arrived = self.stream.record_event()

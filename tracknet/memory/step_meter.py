"""Measurement of the memory of one training step by kind of tensor, to the byte and on any device."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tracknet.memory.meter import LiveBytes, counts

KINDS = ("weights", "trained_weights", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True)
class StepPeak:
    """Moment of a training step at which its tensors occupied the most memory.

    Attributes:
        num_bytes: sum of ``by_kind``, in bytes.
        by_kind: bytes by ``KINDS``: frozen weights and buffers; trained weights; their gradients; state of the
            optimizer; the batch and the tensors that forward leaves for backward; temporary tensors of operators.
        phase: ``forward``, ``backward`` or ``update``.
        place: name of the module that was running.
    """

    num_bytes: int
    by_kind: dict[str, int]
    phase: str
    place: str

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:,.0f}" for kind, size in self.by_kind.items())
        return f"{self.num_bytes / 1e6:,.0f} MB in {self.phase}, at {self.place} ({kinds})"


class StepMeter(LiveBytes):
    """Meter of one training step: forward, backward and the optimizer's step run in its context.

    It detects the phases from autograd and the optimizer, so the code of the step needs no marks. A storage that the
    step creates is booked under the phase that creates it, and a gradient under ``gradients`` once it is complete.

    Args:
        model: model in training mode; gradients that it has already count from the start.
        state: tensors of the optimizer's state.
        batch: tensors of the input batch.
    """

    def __init__(self, model: nn.Module, state: Sequence[Tensor], batch: Sequence[Tensor]):
        trained, frozen = split_trained_weights(model)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        super().__init__([*trained, *frozen, *gradients, *state, *batch], device_type=batch[0].device.type)
        self._model = model
        initial = {
            "weights": frozen,
            "trained_weights": trained,
            "gradients": gradients,
            "optimizer": state,
            "activations": batch,
        }
        self._initial = {kind: storage_bytes(tensors, self.device_type) for kind, tensors in initial.items()}
        self._phase = "forward"
        # Live storages by key: the phase that created them, their number in the order of creation, and their bytes.
        self._origins: dict[int, tuple[str, int]] = {}
        self._sizes: dict[int, int] = {}
        self._by_phase = dict.fromkeys(("forward", "backward", "update", "gradients"), 0)  # live bytes
        self._number = 0  # storages created so far
        # Phase, module, live bytes by phase and number of storages at the peak.
        self._at_peak = ("forward", "", dict(self._by_phase), 0)
        self._modules = _ModuleTracker(model)
        self._handles: list = []

    def __enter__(self) -> StepMeter:
        self._handles += self._modules.register()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._book_gradient))
        self._handles.append(register_optimizer_step_pre_hook(lambda *_: self._enter_phase("update")))
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        # What outlives the step is not followed any further, and so does not keep the meter and its model alive.
        for finalizer in list(self._tracked.values()):
            finalizer.detach()

    def result(self) -> StepPeak:
        """Return the peak with its bytes by kind."""
        self._split_forward_peak()
        phase, place, live, _ = self._at_peak
        kinds = dict(self._initial)
        kinds["gradients"] += live["gradients"]
        kinds["activations"] += live["forward"]
        kinds["temporary"] = live["backward"] + live["update"] + live.get("temporary", 0)
        return StepPeak(sum(kinds.values()), {kind: kinds[kind] for kind in KINDS}, phase, place)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The id of the graph task is -1 unless the engine is running backward. So operators that checkpointing
        # recomputes count as backward, and the forward of the next micro-batch counts as forward again.
        if self._phase != "update":
            self._enter_phase("backward" if torch._C._current_graph_task_id() != -1 else "forward")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _enter_phase(self, phase: str) -> None:
        if phase != self._phase:
            if self._phase == "forward":
                self._split_forward_peak()
            self._phase = phase

    def _split_forward_peak(self) -> None:
        """Split the bytes of a peak in forward into activations and temporary tensors.

        Called at the end of the forward: storages that are still alive are kept for backward, and the others that were
        alive at the peak were temporary.
        """
        phase, _, live, number = self._at_peak
        if phase == "forward" and "temporary" not in live:
            # Storages with a higher number were created after the peak.
            kept = sum(self._sizes[k] for k, (p, n) in self._origins.items() if p == "forward" and n <= number)
            live["temporary"], live["forward"] = live["forward"] - kept, kept

    def _book_gradient(self, parameter: nn.Parameter) -> None:
        """Move the bytes of a parameter's complete gradient from the phase that created them to ``gradients``."""
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self._origins and self._origins[key][0] != "gradients":
            phase, number = self._origins[key]
            self._by_phase[phase] -= self._sizes[key]
            self._by_phase["gradients"] += self._sizes[key]
            self._origins[key] = ("gradients", number)

    def _on_allocation(self, key: int, size: int) -> None:
        self._number += 1
        self._origins[key], self._sizes[key] = (self._phase, self._number), size
        self._by_phase[self._phase] += size

    def _on_free(self, key: int, size: int) -> None:
        self._by_phase[self._origins.pop(key)[0]] -= size
        del self._sizes[key]

    def _on_peak(self) -> None:
        place = "the optimizer" if self._phase == "update" else self._modules.current()
        self._at_peak = (self._phase, place, dict(self._by_phase), self._number)


class _ModuleTracker:
    """Tracker of the running module, by hooks in forward and by the sequence numbers of autograd's nodes in backward.

    autograd numbers its nodes in the order of their creation. Forward notes the next number whenever the innermost
    module changes, so the number of a node that runs in backward leads to the module that created it.
    """

    def __init__(self, model: nn.Module):
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []  # names of the modules in forward, the innermost last
        self._timeline: list[tuple[int, str]] = []  # sequence number, and innermost module from that number on

    def register(self) -> list:
        """Register the hooks and return their handles."""
        return [
            register_module_forward_pre_hook(self._on_forward_start),
            # Called after an error in forward too, or the stack would keep the module.
            register_module_forward_hook(self._on_forward_end, always_call=True),
        ]

    def current(self) -> str:
        """Return the name of the running module; ``the loss`` outside of all named modules."""
        place, node = self._stack[-1] if self._stack else "", torch._C._current_autograd_node()
        if not self._stack and node is not None:  # in backward, and not in a forward that is recomputed
            # The highest code point sorts after every name, so entries with the same number come before it.
            at = bisect.bisect(self._timeline, (node._sequence_nr(), chr(0x10FFFF)))
            place = self._timeline[at - 1][1] if at else ""
        return place or "the loss"

    def _on_forward_start(self, module: nn.Module, _args: tuple) -> None:
        self._stack.append(self._names.get(id(module), ""))
        self._mark()

    def _on_forward_end(self, *_: object) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        """Note the innermost module at the next sequence number, except in recomputation.

        Recomputation in backward creates further nodes, which are never run.
        """
        if torch._C._current_graph_task_id() == -1:
            self._timeline.append((torch._C._autograd._get_sequence_nr(), self._stack[-1] if self._stack else ""))


def split_trained_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Split the parameters and buffers of a model into trained tensors (with trained int8 codes) and all others."""
    trained: list[Tensor] = []
    frozen: list[Tensor] = []
    for module in model.modules():
        trains_codes = hasattr(module, "weight_grad_proxy")
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name != "weight_grad_proxy":  # a single zero, expanded to a matrix
                # Codes and scales of an int8 layer that trains do not require a gradient themselves.
                (trained if tensor.requires_grad or (trains_codes and name in ("weight", "scale")) else frozen).append(
                    tensor
                )
    return trained, frozen


def storage_bytes(tensors: Iterable[Tensor], device_type: str | None = None) -> int:
    """Return the bytes that tensors occupy together on a type of device; a shared storage counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if counts(t, device_type)}
    return sum(storages.values())

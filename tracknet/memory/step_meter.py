"""One training step measured by kind of tensor, on any device, to the byte."""

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
class Peak:
    """The moment of a training step at which its tensors took most.

    Attributes:
        num_bytes: sum of ``by_kind``.
        by_kind: by ``KINDS``: frozen weights and buffers; weights that train; their gradients; the optimizer's state;
            the batch and what forward leaves for backward; what operators need in passing.
        phase: ``forward``, ``backward`` or ``update``.
        place: the module that was at work.
    """

    num_bytes: int
    by_kind: dict[str, int]
    phase: str
    place: str

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:,.0f}" for kind, size in self.by_kind.items())
        return f"{self.num_bytes / 1e6:,.0f} MB in {self.phase}, at {self.place} ({kinds})"


class StepMeter(LiveBytes):
    """Measures one training step by kind: forward, backward and the optimizer's step run while it is entered.

    Phases are read off autograd and the optimizer, so the step needs no marks.

    Args:
        model: in training; gradients that it has already count from the start.
        state: tensors of the optimizer's state.
        batch: what the step is fed with.
    """

    def __init__(self, model: nn.Module, state: Sequence[Tensor], batch: Sequence[Tensor]):
        trained, frozen = split_trained_weights(model)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        super().__init__([*trained, *frozen, *gradients, *state, *batch], device_type=batch[0].device.type)
        self._model = model
        before = {
            "weights": frozen,
            "trained_weights": trained,
            "gradients": gradients,
            "optimizer": state,
            "activations": batch,
        }
        self._before = {kind: storage_bytes(tensors, self.device_type) for kind, tensors in before.items()}
        self._phase = "forward"
        self._phases: dict[int, tuple[str, int]] = {}  # of each storage: where it was created, as what number
        self._sizes: dict[int, int] = {}
        self._by_phase = dict.fromkeys(("forward", "backward", "update", "gradients"), 0)
        self._number = 0
        self._top = ("forward", "", dict(self._by_phase), 0)
        self._places = _Places(model)
        self._handles: list = []

    def __enter__(self) -> StepMeter:
        self._handles += self._places.watch()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient))
        self._handles.append(register_optimizer_step_pre_hook(lambda *_: self._enter("update")))
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def result(self) -> Peak:
        """What the peak was made of."""
        self._settle()
        phase, place, live, _ = self._top
        kinds = dict(self._before)
        kinds["gradients"] += live["gradients"]
        kinds["activations"] += live["forward"]
        kinds["temporary"] = live["backward"] + live["update"] + live.get("passing", 0)
        return Peak(sum(kinds.values()), {kind: kinds[kind] for kind in KINDS}, phase, place)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._phase != "update":
            self._enter("backward" if torch._C._current_graph_task_id() != -1 else "forward")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            if self._phase == "forward":
                self._settle()
            self._phase = phase

    def _settle(self) -> None:
        """At the end of a forward in which the peak was: what is alive still was there for backward, the rest was
        passing."""
        phase, _, live, number = self._top
        if phase == "forward" and "passing" not in live:
            stayed = sum(self._sizes[k] for k, (p, n) in self._phases.items() if p == "forward" and n <= number)
            live["passing"], live["forward"] = live["forward"] - stayed, stayed

    def _gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self._phases and self._phases[key][0] != "gradients":
            phase, number = self._phases[key]
            self._by_phase[phase] -= self._sizes[key]
            self._by_phase["gradients"] += self._sizes[key]
            self._phases[key] = ("gradients", number)

    def _born(self, key: int, size: int) -> None:
        self._number += 1
        self._phases[key], self._sizes[key] = (self._phase, self._number), size
        self._by_phase[self._phase] += size

    def _died(self, key: int, size: int) -> None:
        self._by_phase[self._phases.pop(key)[0]] -= size
        del self._sizes[key]

    def _peaked(self) -> None:
        place = "the optimizer" if self._phase == "update" else self._places.now()
        self._top = (self._phase, place, dict(self._by_phase), self._number)


class _Places:
    """Follows which module is at work: in forward by hooks, in backward by the numbers that autograd gave its nodes in
    forward."""

    def __init__(self, model: nn.Module):
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._timeline: list[tuple[int, str]] = []  # from which node on, which module

    def watch(self) -> list:
        return [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]

    def now(self) -> str:
        place, node = self._stack[-1] if self._stack else "", torch._C._current_autograd_node()
        if not self._stack and node is not None:  # in backward, and not recomputing
            at = bisect.bisect(self._timeline, (node._sequence_nr(), chr(0x10FFFF)))
            place = self._timeline[at - 1][1] if at else ""
        return place or "the loss"

    def _begin(self, module: nn.Module, _args: tuple) -> None:
        self._stack.append(self._names.get(id(module), ""))
        self._mark()

    def _end(self, *_: object) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        # What is recomputed in backward makes nodes of its own, which are never run.
        if torch._C._current_graph_task_id() == -1:
            self._timeline.append((torch._C._autograd._get_sequence_nr(), self._stack[-1] if self._stack else ""))


def split_trained_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of a model that train (int8 codes that do among them), and the others, buffers included."""
    trained: list[Tensor] = []
    frozen: list[Tensor] = []
    for module in model.modules():
        trains_codes = hasattr(module, "weight_grad_proxy")
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name != "weight_grad_proxy":  # one zero, seen as a matrix
                (trained if tensor.requires_grad or (trains_codes and name in ("weight", "scale")) else frozen).append(
                    tensor
                )
    return trained, frozen


def storage_bytes(tensors: Iterable[Tensor], device_type: str | None = None) -> int:
    """Bytes that tensors take together of a type of device; what shares a storage counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if counts(t, device_type)}
    return sum(storages.values())

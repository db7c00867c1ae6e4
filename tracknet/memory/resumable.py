"""Optimizers with a step that can be resumed after it ran out of memory.

Smaller micro-batches do not reduce the memory of an optimizer step. What helps is to free cached memory and call
``step`` again: it continues where it stopped, and the update is the same. No weight may be updated twice, and no moment
may advance without its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tracknet.quantization.bnb_types import BitsandbytesOptimizer


class ResumableAdamW(torch.optim.AdamW):
    """Fused AdamW of torch that updates one parameter group at a time.

    The fused implementation needs no temporary copies and changes a whole group in one operator.
    """

    def __init__(self, parameters: list, **settings: Any):
        super().__init__(parameters, fused=True, **settings)
        self._updated: set[int] = set()  # indices of the groups that the current step has updated

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every group that an interrupted step has not updated."""
        groups = self.param_groups
        try:
            for index, group in enumerate(groups):
                if index not in self._updated:
                    self.param_groups = [group]  # torch's step updates all groups that it finds here
                    self._step_group(group)
                    self._updated.add(index)
        finally:
            self.param_groups = groups
        self._updated.clear()

    def _step_group(self, group: dict) -> None:
        """Update one group completely or, if memory runs out, not at all."""
        # torch increments the step counters before it runs the fused operator. A tensor's version increases with every
        # in-place change, so it shows whether that has happened.
        counters = {
            p: (self.state[p]["step"], self.state[p]["step"]._version) for p in group["params"] if p in self.state
        }
        try:
            super().step()
        except BaseException:
            for parameter in group["params"]:
                if parameter not in counters:
                    self.state.pop(parameter, None)  # created in this step, possibly incomplete
                elif counters[parameter][0]._version != counters[parameter][1]:
                    counters[parameter][0].sub_(1)  # incremented, but the fused operator did not run
            raise


class Resumable(BitsandbytesOptimizer):
    """Mixin for an optimizer of bitsandbytes, which updates one parameter at a time.

    Attributes:
        layers: layers by parameter, for parameters that stand for weights in another storage (int8 codes). Their update
            takes several operators.
    """

    layers: Mapping[Any, Any] = {}

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._updated: set[Tensor] = set()  # parameters that the current step has updated

    def step(self, closure: Any = None) -> None:
        """Update every parameter that an interrupted step has not updated."""
        super().step(closure)
        self._updated.clear()

    def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Create the state of a parameter completely or not at all (called by bitsandbytes)."""
        try:
            super().init_state(group, p, gindex, pindex)
        except BaseException:
            # bitsandbytes initializes a state only if it is empty, so it would never complete a partial one.
            self.state[p].clear()
            raise

    def update_step(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Update one parameter completely or not at all (called by bitsandbytes)."""
        if p in self._updated:
            return
        state = self.state[p]
        step = state["step"]
        # On CUDA one kernel makes the whole update, so an error leaves nothing half-done. On a CPU, and for int8 codes,
        # the update takes several operators: copy what they change in place, to restore it after an error. The codes
        # themselves are not copied; they are replaced by the last operators of the update, or not at all.
        changed = [t for t in state.values() if isinstance(t, Tensor)] + ([] if p in self.layers else [p.data])
        backups = [(t, t.clone()) for t in changed] if p in self.layers or p.device.type == "cpu" else []
        try:
            super().update_step(group, p, gindex, pindex)
        except BaseException:
            state["step"] = step
            for tensor, backup in backups:
                tensor.copy_(backup)
            raise
        self._updated.add(p)

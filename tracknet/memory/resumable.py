"""Optimizers whose step may run out of memory: called again, it goes on where it stopped, and the update is the same.

Splitting a batch does not help there. What helps is to give cached memory back and go on; weights that were updated
must not be updated twice, and moments not be advanced without their weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tracknet.quantization.bnb_types import BitsandbytesOptimizer


class ResumableAdamW(torch.optim.AdamW):
    """torch's AdamW, one group at a time; fused, which needs no temporary copies and changes a group in one
    operator."""

    def __init__(self, parameters: list, **settings: Any):
        super().__init__(parameters, fused=True, **settings)
        self._done: set[int] = set()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every group that an interrupted step has not updated."""
        groups = self.param_groups
        try:
            for index, group in enumerate(groups):
                if index not in self._done:
                    self.param_groups = [group]
                    self._step_group(group)
                    self._done.add(index)
        finally:
            self.param_groups = groups
        self._done.clear()

    def _step_group(self, group: dict) -> None:
        counters = {
            p: (self.state[p]["step"], self.state[p]["step"]._version) for p in group["params"] if p in self.state
        }
        try:
            super().step()
        except BaseException:
            for parameter in group["params"]:
                if parameter not in counters:
                    self.state.pop(parameter, None)  # made in this step, perhaps in part
                elif counters[parameter][0]._version != counters[parameter][1]:
                    counters[parameter][0].sub_(1)  # counted, but the operator that updates did not run
            raise


class Resumable(BitsandbytesOptimizer):
    """Over an optimizer of bitsandbytes, which updates one parameter at a time.

    Attributes:
        layers: by parameter, what holds weights that are stored otherwise, and whose update takes several operators.
    """

    layers: Mapping[Any, Any] = {}

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._done: set[Tensor] = set()

    def step(self, closure: Any = None) -> None:
        """Update every parameter that an interrupted step has not updated."""
        super().step(closure)
        self._done.clear()

    def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Make a parameter's state whole or not at all (called by bitsandbytes)."""
        try:
            super().init_state(group, p, gindex, pindex)
        except BaseException:
            self.state[p].clear()
            raise

    def update_step(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Update one parameter wholly or not at all (called by bitsandbytes)."""
        if p in self._done:
            return
        state = self.state[p]
        step = state["step"]
        changed = [t for t in state.values() if isinstance(t, Tensor)] + ([] if p in self.layers else [p.data])
        # One kernel on CUDA; several operators on a CPU.
        kept = [(t, t.clone()) for t in changed] if p in self.layers or p.device.type == "cpu" else []
        try:
            super().update_step(group, p, gindex, pindex)
        except BaseException:
            state["step"] = step
            for tensor, before in kept:
                tensor.copy_(before)
            raise
        self._done.add(p)

"""Random seeds by window, which make random draws independent of how a batch is split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@dataclass
class WindowRng:
    """Source of random seeds for the windows of the current forward.

    A model and those of its layers that draw random numbers share one object.

    Attributes:
        seed: seed of the step; ``None`` outside the training loop, where seeds come from torch's generator.
        first: index in the batch of the first window.
        count: number of windows.
        state: seed of the step and index of the first window of the micro-batch, int64 ``[2]`` on a GPU, where kernels
            read them. A CUDA graph is replayed with other values at the same address.
    """

    seed: int | None = None
    first: int = 0
    count: int = 0
    state: Tensor | None = None
    _origin: int = 0  # index of the window that `state` contains

    @contextmanager
    def scope(self, seed: int | None, first: int, count: int, device: torch.device | None = None) -> Iterator[None]:
        """Set the windows that forwards in this context process, and restore the previous ones at its end.

        Args:
            seed: seed of the step.
            first: index in the batch of the first window.
            count: number of windows.
            device: device of the model for the windows of a micro-batch; ``None`` for a part of them.
        """
        if device is not None and device.type == "cuda" and seed is not None:
            self._origin = first
            if self.state is None or (device.index is not None and self.state.device != device):
                self.state = torch.empty(2, dtype=torch.int64, device=device)
            for value, number in zip(self.state, (seed, first)):
                value.fill_(number)
        previous = self.seed, self.first, self.count  # contexts are nested if a block processes its windows in parts
        self.seed, self.first, self.count = seed, first, count
        try:
            yield
        finally:
            self.seed, self.first, self.count = previous

    def device_state(self, device: torch.device) -> tuple[Tensor, int]:
        """Return what a kernel derives the seeds of the current windows from.

        Returns:
            ``state``, and the number of windows between the one that it contains and the first current one. Outside the
            training loop, a new random state for the whole input.
        """
        if self.seed is None:
            return torch.randint(2**62, (2,), device=device), 0
        assert self.state is not None, "the scope of a micro-batch on a GPU requires its device"
        return self.state, self.first - self._origin

    def seeds(self, layer: int) -> list[int]:
        """Return the seeds of a layer.

        Args:
            layer: number of the layer, which gives every layer its own seeds.

        Returns:
            One seed per window, or a single seed for the whole input outside the training loop.
        """
        if self.seed is None:
            # Under fake tensors, with which memory is planned, randint would return a tensor without a value.
            with _disable_current_modes():
                return [int(torch.randint(2**62, ()))]
        # The hash of a tuple of integers is the same in every process, so a repeated step draws the same masks.
        return [hash((self.seed, layer, self.first + i)) % 2**63 for i in range(self.count)]

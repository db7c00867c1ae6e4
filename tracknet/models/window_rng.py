"""Random seeds by window, which make random draws independent of how a batch is split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes


@dataclass
class WindowRng:
    """Source of random seeds for the windows of the current forward.

    A model and those of its layers that draw random numbers share one object.

    Attributes:
        seed: seed of the step; ``None`` outside the training loop, where seeds come from torch's generator.
        first: index in the batch of the first window.
        count: number of windows.
    """

    seed: int | None = None
    first: int = 0
    count: int = 0

    @contextmanager
    def scope(self, seed: int | None, first: int, count: int) -> Iterator[None]:
        """Set the windows that forwards in this context process, and restore the previous ones at its end.

        Args:
            seed: seed of the step.
            first: index in the batch of the first window.
            count: number of windows.
        """
        previous = vars(self).copy()  # contexts are nested when a block processes its windows in parts
        self.seed, self.first, self.count = seed, first, count
        try:
            yield
        finally:
            vars(self).update(previous)

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

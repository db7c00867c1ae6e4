"""Which windows of a batch a forward sees, for what is drawn at random in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes


@dataclass
class WindowRng:
    """Which windows of a batch a forward sees; one object for a model and those of its layers that draw.

    Attributes:
        seed: of the step; ``None`` outside of the training loop, where masks come from torch's generator.
        first: place in the batch of the first window.
        count: windows.
    """

    seed: int | None = None
    first: int = 0
    count: int = 0

    @contextmanager
    def scope(self, seed: int | None, first: int, count: int) -> Iterator[None]:
        """Say which windows the forwards in this context see."""
        before = vars(self).copy()
        self.seed, self.first, self.count = seed, first, count
        try:
            yield
        finally:
            vars(self).update(before)

    def seeds(self, layer: int) -> list[int]:
        """Return one seed for each window, or a single one where nobody said what they are."""
        if self.seed is None:
            with _disable_current_modes():  # a number is wanted even where tensors have no content (memory.plan)
                return [int(torch.randint(2**62, ()))]
        return [hash((self.seed, layer, self.first + i)) % 2**63 for i in range(self.count)]

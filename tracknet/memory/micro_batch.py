"""A batch in parts: the same update in less memory, found by trying.

The loss of a batch is a sum over its frames divided by one normaliser, which is known before the first forward; so the sum of
the parts' gradients is the batch's gradient, whatever the parts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tracknet.errors import UserError

_OOM_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)


@dataclass
class MicroBatchConfig:
    """The micro-batching keys of the training section."""

    batch_size: int
    adaptive: bool
    start_size: int | None
    min_size: int
    backoff_factor: int
    retries: int
    grow_after: int | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and any(m in str(seen) for m in _OOM_MESSAGES):
            return True
        seen = seen.__cause__
    return False


class MicroBatcher:
    """Runs a batch in parts of a size that fits.

    Attributes:
        size: windows per part; it shrinks when memory runs out, and grows back carefully when it has not for a while.
        failed: smallest size that ran out of memory; never tried again.
        clean: steps since the last change without running out.
    """

    def __init__(self, config: MicroBatchConfig, say: Callable[[str], None]):
        self.config = config
        self.size = min(config.start_size or config.batch_size, config.batch_size)
        self.failed: int | None = None
        self.clean = 0
        self._good: int | None = None  # the size of the last step that fitted
        self._say = say

    def parts(self, batch: int) -> Iterator[slice]:
        """Slices that cover a batch of this many windows."""
        return (slice(i, min(i + self.size, batch)) for i in range(0, batch, self.size))

    def run(self, attempt: Callable[[], float], reset: Callable[[], None]) -> float:
        """Run one attempt at a step, with smaller parts each time that memory runs out.

        Args:
            attempt: goes through ``parts()`` and accumulates gradients.
            reset: drops what a failed attempt left: gradients, random state.

        Raises:
            UserError: it does not fit at the smallest size, or after all retries.
        """
        self._probe()
        retries = 0
        while True:
            failure = None
            try:
                result = attempt()
                self.clean += 1
                self._good = self.size
                return result
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = (str(error) or type(error).__name__).splitlines()[0]
            # Here the traceback, which holds on to the failed attempt's tensors, is gone.
            reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.failed = min(self.failed or self.size, self.size)
            self.clean = 0
            if self._good is not None and self._good < self.size:
                self._say(f"Micro-batches of {self.size} windows do not fit: back to {self._good}.")
                self.size = self._good
            else:
                self._shrink(failure, last=retries == self.config.retries)
                retries += 1

    def _probe(self) -> None:
        """After enough clean steps, try the size half-way to the one that failed."""
        if self.failed is None or self.config.grow_after is None or self.clean < self.config.grow_after:
            return
        larger, clean, self.clean = (self.size + self.failed) // 2, self.clean, 0
        if larger > self.size:
            self._say(f"{clean} steps without running out of memory: trying micro-batches of {larger} windows.")
            self.size = larger

    def _shrink(self, failure: str, last: bool) -> None:
        smaller = min(self.size, max(self.config.min_size, self.size // self.config.backoff_factor))
        if not self.config.adaptive or last or smaller == self.size:
            why = ("training.adaptive_micro_batch is false" if not self.config.adaptive
                   else f"all {self.config.retries} retries (training.oom_retries) are used" if last
                   else f"training.min_micro_batch_size={self.config.min_size} is reached")  # fmt: skip
            raise UserError(
                f"Out of memory with micro-batches of {self.size} windows, and {why}: {failure}\n"
                "To start smaller or try longer: training.micro_batch_size, training.oom_retries. To save more: training.memory_optimization.gradient_checkpointing=full, --training qlora, training.optimizer.name=adamw8bit, "
                "or a smaller data.preprocess.resize."
            )
        self._say(f"Out of memory with micro-batches of {self.size} windows: going on with {smaller}.")
        self.size = smaller

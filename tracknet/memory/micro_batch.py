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
        size: windows per part; it shrinks when memory runs out, and stays small.
    """

    def __init__(self, config: MicroBatchConfig, say: Callable[[str], None]):
        self.config = config
        self.size = min(config.start_size or config.batch_size, config.batch_size)
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
        for retry in range(self.config.retries + 1):
            failure = None
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = (str(error) or type(error).__name__).splitlines()[0]
            # Here the traceback, which holds on to the failed attempt's tensors, is gone.
            reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._shrink(failure, last=retry == self.config.retries)
        raise AssertionError("unreachable: the last retry raises")

    def _shrink(self, failure: str, last: bool) -> None:
        smaller = min(self.size, max(self.config.min_size, self.size // self.config.backoff_factor))
        if not self.config.adaptive or last or smaller == self.size:
            why = ("training.adaptive_micro_batch is false" if not self.config.adaptive
                   else f"all {self.config.retries} retries (training.oom_retries) are used" if last
                   else f"training.min_micro_batch_size={self.config.min_size} is reached")  # fmt: skip
            raise UserError(
                f"Out of memory with micro-batches of {self.size} windows, and {why}: {failure}\n"
                "To start smaller or try longer: training.micro_batch_size, training.oom_retries. To save more: training.memory_optimization.gradient_checkpointing=true, --training qlora, "
                "or a smaller data.preprocess.resize."
            )
        self._say(f"Out of memory with micro-batches of {self.size} windows: going on with {smaller}.")
        self.size = smaller

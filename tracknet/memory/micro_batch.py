"""A batch in parts: the same update in less memory, found by planning and by trying.

The loss of a batch is a sum over its frames divided by one normalizer, which is known before the first forward; so the
sum of the parts' gradients is the batch's gradient, whatever the parts.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tracknet.errors import UserError, first_line

logger = logging.getLogger(__name__)

_OOM_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)
# What libraries say when their workspace does not fit, and also when something else is wrong.
_SUSPECTED_MESSAGES = (
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine",
    "could not create a primitive",
    "could not create a memory",
)
THRASHING_STEPS = 3  # in a row in which the allocator had to give its cache back to go on

Result = TypeVar("Result")


@dataclass
class MicroBatchConfig:
    """The micro-batching keys of the training section.

    ``setting`` names what besides the size decides whether a part fits; what was learned under another does not count.
    """

    batch_size: int
    adaptive: bool
    start_size: int | None
    min_size: int
    backoff_factor: int
    retries: int
    grow_after: int | None = None
    setting: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory ran out."""
    return _says(error, _OOM_MESSAGES + _SUSPECTED_MESSAGES)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and any(m in str(seen) for m in messages):
            return True
        seen = seen.__cause__
    return False


def free_cached_memory() -> None:
    """Give back what Python and the allocator hold on to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def retry_on_oom(action: Callable[[], Result], where: str) -> Result:
    """Run what changes nothing until it succeeds, and once more in freed memory where memory runs out.

    Raises:
        UserError: memory runs out again.
    """
    for last in (False, True):
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        free_cached_memory()
        if last:
            raise UserError(
                f"Out of memory {where}, where smaller micro-batches do not help: {failure}\nThe optimizer's state"
                " takes 2 bytes a weight instead of 8 with training.optimizer.name=adamw8bit, and can leave the GPU"
                " with paged_adamw8bit; --training qlora trains fewer weights."
            )
        logger.warning(f"Out of memory {where}: giving cached memory back and going on.")
    raise AssertionError


class MicroBatcher:
    """Runs a batch in parts of a size that fits.

    Args:
        config: the keys.
        all_reduce_any: whether a flag is set in any of the processes that train together; they decide alike.
        suggest_settings: says what a step of this micro-batch takes, and what would make it smaller.
        count_flushes: how often the allocator has had to give its cache back to go on.

    Attributes:
        size: windows per part; it shrinks when memory runs out, and grows back carefully when it has not for a while.
        failed: smallest size that ran out of memory; never tried again.
        clean: steps since the last change without running out.
    """

    def __init__(
        self,
        config: MicroBatchConfig,
        all_reduce_any: Callable[[bool], bool] = lambda flag: flag,
        suggest_settings: Callable[[int], str] | None = None,
        count_flushes: Callable[[], int] = lambda: 0,
    ):
        self.config = config
        self.size = self.start_size = min(config.start_size or config.batch_size, config.batch_size)
        self.failed: int | None = None
        self.clean = 0
        self._good: int | None = None  # the size of the last step that fitted
        self._any_process, self._suggest_settings = all_reduce_any, suggest_settings
        self._count_flushes, self._flushes, self._thrashing = count_flushes, count_flushes(), 0

    def state(self) -> dict | None:
        """What was learned, for a checkpoint; ``None`` where nothing was."""
        if self.size >= self.start_size:
            return None
        return {"size": self.size, "failed": self.failed, "clean": self.clean, "setting": self.config.setting}

    def restore(self, state: dict | None) -> None:
        """Take up what was learned under the same setting. What was configured may have changed, so a larger size is
        not taken up."""
        if state and state["setting"] == self.config.setting and state["size"] < self.size:
            self.size, self.failed, self.clean = state["size"], state["failed"], state["clean"]

    def micro_batches(self, batch: int) -> Iterator[slice]:
        """Slices that cover a batch of this many windows."""
        return (slice(i, min(i + self.size, batch)) for i in range(0, batch, self.size))

    def run(self, attempt: Callable[[], Result], reset: Callable[[], None]) -> Result:
        """Run one attempt at a step, with smaller parts each time that memory runs out.

        Args:
            attempt: goes through ``micro_batches()`` and accumulates gradients; it speaks to no other process.
            reset: drops what a failed attempt left: gradients, random state.

        Raises:
            UserError: it does not fit at the smallest size, or after all retries.
        """
        self._probe()
        retries = 0
        while True:
            suspected: BaseException | None = None
            failure = ""
            result: Any = None
            try:
                result = attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
                if not _says(error, _OOM_MESSAGES):
                    suspected = error.with_traceback(None)
            # Here the traceback, which holds on to the failed attempt's tensors, is gone.
            if not self._any_process(bool(failure)):
                self.clean += 1
                self._good = self.size
                self._watch_allocator()
                return result
            failure = failure or "in another process"
            result = None
            reset()
            free_cached_memory()
            self.failed = min(self.failed or self.size, self.size)
            self.clean = 0
            if self._good is not None and self._good < self.size:
                logger.warning(f"Micro-batches of {self.size} windows do not fit: back to {self._good}.")
                self.size = self._good
            else:
                self._shrink(failure, retries == self.config.retries, suspected)
                retries += 1

    def _probe(self) -> None:
        """After enough clean steps, try the size half-way to the one that failed."""
        if self.failed is None or self.config.grow_after is None or self.clean < self.config.grow_after:
            return
        larger, clean, self.clean = (self.size + self.failed) // 2, self.clean, 0
        if larger > self.size:
            logger.info(f"{clean} steps without running out of memory: trying micro-batches of {larger} windows.")
            self.size = larger

    def _watch_allocator(self) -> None:
        """An allocator that gives its cache back in every step is slower than smaller parts."""
        flushes = self._count_flushes()
        self._thrashing = self._thrashing + 1 if flushes > self._flushes else 0
        self._flushes = flushes
        smaller = self._smaller()
        if self._any_process(self._thrashing >= THRASHING_STEPS) and self.config.adaptive and smaller < self.size:
            logger.warning(
                f"Memory is so short at micro-batches of {self.size} windows that the allocator empties its cache in"
                f" every step: going on with {smaller}."
            )
            self.failed, self.clean, self._thrashing = min(self.failed or self.size, self.size), 0, 0
            self.size = self._good = smaller

    def _smaller(self) -> int:
        return min(self.size, max(self.config.min_size, self.size // self.config.backoff_factor))

    def _shrink(self, failure: str, last: bool, suspected: BaseException | None) -> None:
        smaller = self._smaller()
        if not self.config.adaptive or last or smaller == self.size:
            if suspected is not None:
                raise suspected
            why = (
                "training.adaptive_micro_batch is false"
                if not self.config.adaptive
                else (
                    f"all {self.config.retries} retries (training.oom_retries) are used"
                    if last
                    else f"training.min_micro_batch_size={self.config.min_size} is reached"
                )
            )
            # The planner takes seconds, so it is asked only here.
            advice = self._suggest_settings(self.size) if self._suggest_settings is not None else ""
            raise UserError(
                f"Out of memory with micro-batches of {self.size} windows, and {why}: {failure}\n{advice}".rstrip()
            )
        logger.warning(f"Out of memory with micro-batches of {self.size} windows: going on with {smaller}.")
        self.size = smaller

"""Micro-batches: the update of a whole batch in less memory, at a size found by planning and by trying.

The loss of a batch is a sum over its frames divided by one normalizer, which is computed from the whole batch before
the first forward. Backward adds the gradient of each part to ``.grad``, and the gradient of a sum is the sum of the
gradients. So the parts accumulate the gradient of the batch, however it is split.
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

# Texts of a RuntimeError that always mean that memory ran out.
_OOM_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)
# Texts that libraries report when their workspace does not fit, but for other failures as well.
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
THRASHING_STEPS = 3  # consecutive steps with a flush of the allocator's cache that count as short memory

Result = TypeVar("Result")


@dataclass
class MicroBatchConfig:
    """Micro-batching settings of the training section.

    Attributes:
        batch_size: windows per batch of this process.
        adaptive: whether the size may shrink when memory runs out.
        start_size: windows per part to start with; ``None`` for the whole batch.
        min_size: smallest number of windows per part.
        backoff_factor: divisor of the size when memory runs out.
        retries: largest number of retries per step with smaller parts.
        grow_after: steps without running out of memory before a larger size is tried; ``None`` for never.
        setting: name of everything besides the size that decides whether a part fits. A size that was learned under
            another setting is ignored.
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
    """Return whether an error, or one of its causes, reports that memory ran out, for certain or possibly."""
    return _matches(error, _OOM_MESSAGES + _SUSPECTED_MESSAGES)


def _matches(error: BaseException, messages: tuple[str, ...]) -> bool:
    """Return whether an error or one of its causes is an out-of-memory error or contains one of the messages."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, RuntimeError) and any(m in str(cause) for m in messages):
            return True
        cause = cause.__cause__
    return False


def free_cached_memory() -> None:
    """Free memory that Python's garbage and CUDA's allocator hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def retry_on_oom(action: Callable[[], Result], where: str, free: Callable[[], None] = free_cached_memory) -> Result:
    """Run an action and, if memory runs out, free cached memory and run it once more.

    Args:
        action: function that changes nothing unless it succeeds, so that it can be repeated.
        where: position in the program for messages, such as ``around step 3``.
        free: function that frees memory.

    Returns:
        Result of the action.

    Raises:
        UserError: if memory runs out again.
    """
    for last in (False, True):
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        # Outside of the except block: the error's traceback, which keeps the frames and tensors of the failed call
        # alive, has been dropped.
        free()
        if last:
            raise UserError(
                f"Out of memory {where}, where smaller micro-batches do not help: {failure}\nSet"
                " training.optimizer.name=adamw8bit to store 2 bytes of optimizer state per weight instead of 8, or"
                " paged_adamw8bit to let the state leave the GPU; use --training qlora to train fewer weights."
            )
        logger.warning(f"Out of memory {where}: retrying after freeing cached memory.")
    raise AssertionError


class MicroBatcher:
    """Runner of a batch in parts that fit into memory.

    Args:
        config: micro-batching settings.
        all_reduce_any: function that returns whether a flag is set in any of the processes that train together. All of
            them get the same answer, and so take the same decision.
        suggest_settings: function that takes a micro-batch size and describes the memory of its step and the settings
            that would reduce it.
        count_flushes: function that returns how often the allocator has had to free its cache so far.

    Attributes:
        size: windows per part. It shrinks when memory runs out, and grows back carefully after steps without that.
        failed: smallest size that ran out of memory, or ``None``; it is never tried again.
        clean: steps without running out of memory since the size last changed.
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
        self._good: int | None = None  # size of the last step that fitted
        self._any_process, self._suggest_settings = all_reduce_any, suggest_settings
        # Flushes counted at the end of the last step, and consecutive steps with at least one.
        self._count_flushes, self._flushes, self._thrashing = count_flushes, count_flushes(), 0

    def state(self) -> dict | None:
        """Return the learned size for a checkpoint, or ``None`` if the size has not shrunk."""
        if self.size >= self.start_size:
            return None
        return {"size": self.size, "failed": self.failed, "clean": self.clean, "setting": self.config.setting}

    def restore(self, state: dict | None) -> None:
        """Restore a size that was learned under the same setting.

        A size that is not below the current one is ignored, because the configured size may have changed since.

        Args:
            state: value returned by ``state``, or ``None``.
        """
        if state and state["setting"] == self.config.setting and state["size"] < self.size:
            self.size, self.failed, self.clean = state["size"], state["failed"], state["clean"]

    def micro_batches(self, batch: int) -> Iterator[slice]:
        """Return the slices that cover a batch of ``batch`` windows in parts of the current size."""
        return (slice(i, min(i + self.size, batch)) for i in range(0, batch, self.size))

    def run(self, attempt: Callable[[], Result], reset: Callable[[], None]) -> Result:
        """Run a step, and repeat it with smaller parts each time that memory runs out.

        Args:
            attempt: function that goes through ``micro_batches()`` and accumulates gradients. It must not communicate
                with other processes, which would wait forever for one that ran out of memory.
            reset: function that discards what a failed attempt left: gradients, random state.

        Returns:
            Result of the successful attempt.

        Raises:
            UserError: if the step does not fit at the smallest size, or after all retries.
        """
        self._try_larger_size()
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
                if not _matches(error, _OOM_MESSAGES):
                    # Kept to be raised if smaller parts do not help; without its traceback, see below.
                    suspected = error.with_traceback(None)
            # Recovery starts outside of the except block: inside, the error's traceback would keep the frames of the
            # failed attempt alive, and their tensors would be in memory during the next one.
            # A step counts only if it fitted in every process. Each process must make this collective call.
            if not self._any_process(bool(failure)):
                self.clean += 1
                self._good = self.size
                self._check_allocator()
                return result
            # Discard this attempt, here and in the processes in which it succeeded.
            failure = failure or "in another process"
            result = None
            reset()
            free_cached_memory()
            self.failed = min(self.failed or self.size, self.size)
            self.clean = 0
            # A larger size that was only tried goes back to the size that fitted, without using up a retry.
            if self._good is not None and self._good < self.size:
                logger.warning(f"Micro-batches of {self.size} windows do not fit: going back to {self._good}.")
                self.size = self._good
            else:
                self._shrink(failure, retries == self.config.retries, suspected)
                retries += 1

    def _try_larger_size(self) -> None:
        """Increase the size half-way to the one that failed, after ``grow_after`` clean steps."""
        if self.failed is None or self.config.grow_after is None or self.clean < self.config.grow_after:
            return
        larger, clean, self.clean = (self.size + self.failed) // 2, self.clean, 0
        if larger > self.size:
            logger.info(f"{clean} steps without running out of memory: trying micro-batches of {larger} windows.")
            self.size = larger

    def _check_allocator(self) -> None:
        """Reduce the size if the allocator has freed its cache in several consecutive steps.

        Freeing and allocating again in every step is slower than running smaller parts.
        """
        flushes = self._count_flushes()
        self._thrashing = self._thrashing + 1 if flushes > self._flushes else 0
        self._flushes = flushes
        smaller = self._smaller_size()
        # The collective call comes first, so that no process skips it.
        if self._any_process(self._thrashing >= THRASHING_STEPS) and self.config.adaptive and smaller < self.size:
            logger.warning(
                f"Memory is short: the allocator empties its cache in every step with micro-batches of {self.size}"
                f" windows; going on with {smaller}."
            )
            # Counts as a failed size, so that it is not tried again.
            self.failed, self.clean, self._thrashing = min(self.failed or self.size, self.size), 0, 0
            self.size = self._good = smaller

    def _smaller_size(self) -> int:
        return min(self.size, max(self.config.min_size, self.size // self.config.backoff_factor))

    def _shrink(self, failure: str, last: bool, suspected: BaseException | None) -> None:
        """Reduce the size after a failed attempt.

        Args:
            failure: first line of the error, for messages.
            last: whether all retries are used.
            suspected: error that may have another cause than memory, or ``None``.

        Raises:
            UserError: if the size cannot be reduced. A ``suspected`` error is raised instead, as it is.
        """
        smaller = self._smaller_size()
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
            # The planner takes seconds, so it runs only when its advice is shown.
            advice = self._suggest_settings(self.size) if self._suggest_settings is not None else ""
            raise UserError(
                f"Out of memory with micro-batches of {self.size} windows, and {why}: {failure}\n{advice}".rstrip()
            )
        logger.warning(f"Out of memory with micro-batches of {self.size} windows: going on with {smaller}.")
        self.size = smaller

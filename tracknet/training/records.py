"""Records and interfaces of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tracknet.memory.step_meter import StepPeak
from tracknet.training.collapse import PeakCounts


class Estimate(Protocol):
    """Memory estimate of a training step."""

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the peak memory of a step with micro-batches of ``micro_batch`` windows, in bytes."""


class Planner(Protocol):
    """Source of memory estimates; implemented by ``planning.planner.Planner``."""

    @property
    def estimate(self) -> Estimate:
        """Estimate of the configured step."""

    def suggest_settings(self, micro_batch: int) -> str:
        """Return lines for the user that list the settings that would reduce the memory of a step."""


@dataclass
class Progress:
    """Position of a run, saved with ``last/``.

    Together with the optimizer's state it suffices to continue the run exactly: data order, augmentation and dropout
    are functions of the seed and these numbers, so no state of a random generator is saved.

    Attributes:
        step: optimizer steps taken.
        best_step: step of the best validation.
        stale_validations: validations since the best one.
        pending_validation: 1 if the checkpoint was saved at the end of an epoch, before its validation; 0 otherwise.
    """

    step: int = 0
    best_step: int = 0
    stale_validations: int = 0
    pending_validation: int = 0


@dataclass
class StepResult:
    """Result of one optimizer step.

    Attributes:
        loss: mean loss over the frames of the batch, weighted by their weights.
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of the first parameter group.
        peaks: counts of the heatmaps' peaks.
        num_windows: number of windows in the batch of all processes.
    """

    loss: float
    grad_norm: float
    lr: float
    peaks: PeakCounts
    num_windows: int


@dataclass
class MeasuredPeak:
    """Measured memory of one step.

    Attributes:
        peak: peak memory by kind of tensor, or ``None`` before the first measurement.
        micro_batch: micro-batch size at which it was measured, in windows.
    """

    peak: StepPeak | None = None
    micro_batch: int = 0

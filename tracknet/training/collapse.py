"""Detection of collapsed heatmaps during training.

The best-known failure of heatmap networks is that all heatmaps become empty and stay empty while the loss still
decreases. The initial bias of the decoder, set to the prior of a ball cell, prevents it early in training
(``models/decoder.py``). This module detects it if it happens later.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tracknet.errors import UserError
from tracknet.tracking.heatmap import HeatmapGrid, size_hw

logger = logging.getLogger(__name__)

OnCollapse = Literal["warn", "stop"]
WINDOW = 50  # number of recent steps that are evaluated together
PATIENCE = 300  # number of steps after which peaks at balls should have started to rise
NEAR_PX = 4.0  # maximum distance of a hit from the ball, in pixels of the training frames
THRESHOLD = 0.5  # height of a peak, in [0, 1], from which it counts as a detection


class PeakCounts(NamedTuple):
    """Statistics of the highest cell of each heatmap, summed over frames.

    Frames without a label are not counted.

    Attributes:
        balls: number of frames with a ball.
        height: sum of the peak heights of these frames, each in ``[0, 1]``.
        empty: number of these frames with a peak below ``THRESHOLD``.
        hits: number of these frames with a peak of at least ``THRESHOLD`` within ``NEAR_PX`` of the ball.
        absent: number of frames without a ball.
        filled: number of these frames with a peak of at least ``THRESHOLD``.
    """

    balls: float
    height: float
    empty: float
    hits: float
    absent: float
    filled: float


def count_peaks(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the ``PeakCounts`` of a micro-batch as a float32 tensor ``[6]``.

    The counts stay on the device, so that the host reads them once per step together with the loss.

    Args:
        logits: heatmap logits ``[batch, frame, h, w]``.
        batch: ``frames`` uint8 ``[batch, frame, 3, H, W]``; ``xy`` ``[batch, frame, 2]``, ball positions in pixels of
            ``frames``; ``visible`` bool ``[batch, frame]``; ``weight`` ``[batch, frame]``, 0 where a frame is
            unlabeled.
    """
    with torch.no_grad():
        # Height and position of the highest cell. The cell's center is compared with the ball in pixels of the frame.
        input_hw = batch["frames"].shape[-2:]
        grid = HeatmapGrid((input_hw[1], input_hw[0]), size_hw(logits))
        score, index = logits.detach().flatten(-2).max(dim=-1)
        height = score.float().sigmoid()
        w = logits.shape[-1]
        peak_xy = grid.to_image(torch.stack([index % w, index // w], dim=-1).float())
        near = (peak_xy - batch["xy"]).square().sum(dim=-1).sqrt() <= NEAR_PX
        # The order of the sums is that of the fields of `PeakCounts`.
        labeled = batch["weight"] > 0
        ball, absent, high = batch["visible"] & labeled, ~batch["visible"] & labeled, height >= THRESHOLD
        parts = (ball, ball * height, ball & ~high, ball & high & near, absent, absent & high)
        return torch.stack([part.float().sum() for part in parts])


class CollapseWatch:
    """Detector of collapsed heatmaps, which reports the likely cause and the setting to change, at most once per run.

    Args:
        on_collapse: ``warn`` to log a warning, ``stop`` to end the run with an error.
    """

    def __init__(self, on_collapse: OnCollapse):
        self._on_collapse = on_collapse
        self._recent: deque[PeakCounts] = deque(maxlen=WINDOW)
        self._highest = 0.0  # largest mean height of peaks at balls in any window so far
        self._reported = False

    def update(self, step: int, counts: PeakCounts) -> dict[str, float]:
        """Add the counts of a step and report a collapse.

        Args:
            step: number of the step, from 1.
            counts: counts of the step.

        Returns:
            Scalars of this step for TensorBoard, by name.

        Raises:
            UserError: if the heatmaps have collapsed and ``on_collapse`` is ``stop``.
        """
        # Judge the recent steps together, once there are enough of them with enough balls to be representative.
        self._recent.append(counts)
        total = PeakCounts(*(sum(values) for values in zip(*self._recent)))
        if len(self._recent) == WINDOW and total.balls >= WINDOW and not self._reported:
            height, hits = total.height / total.balls, total.hits / total.balls
            self._highest = max(self._highest, height)
            if line := self._judge(step, height, hits, total):
                self._reported = True
                if self._on_collapse == "stop":
                    raise UserError(f"{line} (Set training.on_collapse=warn to continue training.)")
                logger.warning(line)
        # Shares of this step alone; a batch without frames of a kind has no value for it.
        scalars: dict[str, float] = {}
        if counts.balls:
            scalars |= {
                "train/peak_height": counts.height / counts.balls,
                "train/empty_share": counts.empty / counts.balls,
                "train/hit_share": counts.hits / counts.balls,
            }
        if counts.absent:
            scalars["train/false_share"] = counts.filled / counts.absent
        return scalars

    def _judge(self, step: int, height: float, hits: float, total: PeakCounts) -> str | None:
        """Return a message if the recent steps show a collapse, else ``None``.

        Args:
            step: number of the step.
            height: mean height of the peaks at balls in the recent steps, in ``[0, 1]``.
            hits: fraction of balls that were hit in the recent steps.
            total: counts summed over the recent steps.
        """
        # Peaks had risen, and have fallen to less than a quarter.
        if self._highest >= 0.3 and height < self._highest / 4:
            return (
                f"Collapse at step {step}: peaks at balls fell from {self._highest:.2f} to {height:.2f}, so the"
                " heatmaps are empty. The usual cause is a step size that is too large: lower training.optimizer.lr, or"
                " set training.grad_clip."
            )
        # Peaks have never risen, and no ball was hit.
        if step >= PATIENCE and self._highest < 0.1 and not total.hits:
            return (
                f"Collapse: after {step} steps no peak has risen at a ball ({height:.2f} on average). Either the weight"
                " of the ball's cells is too small (set training.loss.name=focal, or increase"
                " training.loss.positive_weight), or training.optimizer.lr is too low, or the labels are not on the"
                " ball (run tracknet check_data)."
            )
        # Peaks almost everywhere, whether there is a ball or not, and hardly any at the balls.
        if total.absent >= WINDOW and total.filled > 0.9 * total.absent and hits < 0.05:
            return (
                f"Collapse at step {step}: {total.filled / total.absent:.0%} of the frames without a ball have a peak,"
                f" and {hits:.0%} of the balls are found. Lower training.loss.positive_weight or training.optimizer.lr."
                " If the problem persists, the labels may not be on the ball (run tracknet check_data)."
            )
        return None

"""Watching for the family's best-known failure: heatmaps that go empty, and stay so, while the loss still falls.

The bias that starts at the prior keeps it from happening early (models/decoder.py); this says so when it happens all
the same.
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
WINDOW = 50  # steps that are looked at together
PATIENCE = 300  # steps after which peaks should have begun to rise
NEAR_PX = 4.0  # of the frames that training sees
THRESHOLD = 0.5


class PeakCounts(NamedTuple):
    """What the highest cells of a step's heatmaps were, summed over frames.

    Attributes:
        balls: frames with a ball.
        height: their peaks' heights in ``[0, 1]``, added up.
        empty: of them, those whose peak is below a half.
        hits: of them, those whose peak is above a half and near the ball.
        absent: frames without a ball.
        filled: of them, those whose peak is above a half.
    """

    balls: float
    height: float
    empty: float
    hits: float
    absent: float
    filled: float


def count_peaks(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return a part's ``PeakCounts`` as one tensor: they are read once per step, with the loss.

    Args:
        logits: ``[batch, frame, h, w]``.
        batch: ``frames``, ``xy``, ``visible``, ``weight``.
    """
    with torch.no_grad():
        input_hw = batch["frames"].shape[-2:]
        grid = HeatmapGrid((input_hw[1], input_hw[0]), size_hw(logits))
        score, index = logits.detach().flatten(-2).max(dim=-1)
        height = score.float().sigmoid()
        w = logits.shape[-1]
        at = grid.to_image(torch.stack([index % w, index // w], dim=-1).float())
        near = (at - batch["xy"]).square().sum(dim=-1).sqrt() <= NEAR_PX
        said = batch["weight"] > 0
        ball, absent, high = batch["visible"] & said, ~batch["visible"] & said, height >= THRESHOLD
        parts = (ball, ball * height, ball & ~high, ball & high & near, absent, absent & high)
        return torch.stack([part.float().sum() for part in parts])


class CollapseWatch:
    """Says in one line that heatmaps have collapsed, with the likely cause and the setting to change.

    Args:
        on_collapse: ``warn`` says it, ``stop`` ends the run with it.
    """

    def __init__(self, on_collapse: OnCollapse):
        self._on_collapse = on_collapse
        self._recent: deque[PeakCounts] = deque(maxlen=WINDOW)
        self._highest = 0.0
        self._said = False

    def update(self, step: int, counts: PeakCounts) -> dict[str, float]:
        """Take a step's counts.

        Returns:
            Scalars of this step for TensorBoard.

        Raises:
            UserError: they have collapsed, under ``stop``.
        """
        self._recent.append(counts)
        total = PeakCounts(*(sum(values) for values in zip(*self._recent)))
        if len(self._recent) == WINDOW and total.balls >= WINDOW and not self._said:
            height, hits = total.height / total.balls, total.hits / total.balls
            self._highest = max(self._highest, height)
            if line := self._judge(step, height, hits, total):
                self._said = True
                if self._on_collapse == "stop":
                    raise UserError(f"{line} (training.on_collapse=warn goes on).")
                logger.warning(line)
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
        if self._highest >= 0.3 and height < self._highest / 4:
            return (
                f"Collapse at step {step}: peaks at balls fell from {self._highest:.2f} to {height:.2f}, the heatmaps"
                " are empty. Most often steps are too large: lower training.optimizer.lr, or set training.grad_clip."
            )
        if step >= PATIENCE and self._highest < 0.1 and not total.hits:
            return (
                f"Collapse: after {step} steps no peak has risen at a ball ({height:.2f} on average). Either the ball's"
                " cells weigh too little (training.loss.name=focal, or a larger training.loss.positive_weight), or"
                " training.optimizer.lr is too low, or labels do not lie on the ball (tracknet check_data)."
            )
        if total.absent >= WINDOW and total.filled > 0.9 * total.absent and hits < 0.05:
            return (
                f"Collapse at step {step}: {total.filled / total.absent:.0%} of the frames without a ball have a peak,"
                f" and {hits:.0%} of the balls are found. Lower training.loss.positive_weight or training.optimizer.lr;"
                " if it stays, labels may not lie on the ball (tracknet check_data)."
            )
        return None

"""The loss of heatmaps: a sum over cells and frames, divided once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tracknet.errors import UserError
from tracknet.tracking.heatmap import HeatmapGrid, render, size_hw

MIN_RADIUS, MAX_RADIUS = 1e-6, 1e6  # beyond, its square is no number any more
EVENT_WEIGHT = 8.0  # of a frame with a hit or bounce, against one without


@dataclass
class LossConfig:
    """What the heatmap should look like, and how a deviation counts."""

    name: Literal["focal", "bce"] = "focal"
    """``focal``: ``|target - p|^gamma`` times the cross-entropy, for soft targets (Li et al., NeurIPS 2020); ``bce``:
    the cross-entropy with cells of the ball weighted."""
    gamma: float = 2.0
    """Focal exponent: how little well-scored cells count."""
    positive_weight: float = 30.0
    """Weight of the ball's cells under ``bce``."""
    target: Literal["gaussian", "disk"] = "gaussian"
    """Shape of the target. Disks want `evaluation.subpixel: centroid`."""
    events_weight: float = 1.0
    """Weight of hits and bounces beside the heatmaps, where ``model.events`` is on."""
    radius: float = 2.5
    """Standard deviation of the Gaussian, or radius of the disk, in pixels of the resized frame."""

    def __post_init__(self) -> None:
        for name in ("gamma", "events_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.loss.{name}={getattr(self, name)}: must be a number, and not negative.")
        if not 0 < self.positive_weight < math.inf:
            raise UserError(f"training.loss.positive_weight={self.positive_weight}: must be a number above 0.")
        if not MIN_RADIUS <= self.radius <= MAX_RADIUS:
            raise UserError(
                f"training.loss.radius={self.radius}: must be above 0, from {MIN_RADIUS:g} to {MAX_RADIUS:g}."
            )


def heatmap_loss(logits: Tensor, batch: dict[str, Tensor], config: LossConfig) -> Tensor:
    """Sum the loss over the cells of all frames, each frame by its weight; the caller divides by the sum of weights.

    Args:
        logits: ``[batch, frame, h, w]``.
        batch: ``frames`` (its size says what the positions refer to), ``xy``, ``visible``, ``weight``. A frame without
            a ball has an all-zero target at full weight; an unlabeled one has weight 0.
        config: target and weighting.
    """
    input_hw = batch["frames"].shape[-2:]
    grid = HeatmapGrid((input_hw[1], input_hw[0]), size_hw(logits))
    radius = config.radius * grid.scale_xy()[0]
    target = render(grid.to_heatmap(batch["xy"]), batch["visible"], grid.heatmap_hw, radius, config.target)
    return _SummedByWindow.apply(logits, target, batch["weight"], config)


def event_loss(logits: Tensor, event: Tensor) -> Tensor:
    """Sum the cross-entropy of hits and bounces over the frames whose label says what happens in them.

    Args:
        logits: ``[batch, frame, 2]``, hit and bounce.
        event: ``[batch, frame]``: 0 flying, 1 hit, 2 bounce, -1 unknown.
    """
    target = torch.stack([event == 1, event == 2], dim=-1).float()
    # One frame in twenty has one: weighted, so that saying "never" is no way out.
    weight = torch.where(target > 0, EVENT_WEIGHT, 1.0) * (event >= 0)[..., None]
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum()


class _SummedByWindow(torch.autograd.Function):
    """Takes the gradient of each window along with its loss, so that one window's intermediate values exist at a
    time."""

    @staticmethod
    def forward(ctx, logits, target, weight, config):
        total, grads = logits.new_zeros(()), torch.empty_like(logits)
        for x, t, w, grad in zip(logits, target, weight, grads):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = (_cell_losses(x, t, config).sum(dim=(-2, -1)) * w).sum()
            grad.copy_(torch.autograd.grad(loss, x)[0])
            total += loss.detach()
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (grads,) = ctx.saved_tensors
        return grads * grad, None, None, None


def _cell_losses(logits: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if config.name == "focal":
        return loss * (target - logits.sigmoid()).abs().pow(config.gamma)
    return loss * (1 + (config.positive_weight - 1) * target)

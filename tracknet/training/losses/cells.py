"""Losses that are a sum over the cells of the heatmaps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tracknet.tracking.heatmap import HeatmapGrid, render, size_hw
from tracknet.training.losses.base import Loss


class CellLoss(Loss):
    """Compares each cell with a rendered target. A frame without a ball has an all-zero target at full weight."""

    @abstractmethod
    def cell_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each cell: ``[frame, h, w]`` for logits and target of that shape."""

    def sum(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        input_hw = batch["frames"].shape[-2:]
        grid = HeatmapGrid((input_hw[1], input_hw[0]), size_hw(logits))
        radius = self.config.radius * grid.scale_xy()[0]
        target = render(grid.to_heatmap(batch["xy"]), batch["visible"], grid.heatmap_hw, radius, self.config.target)
        return _SumByWindow.apply(logits, target, batch["weight"], self.cell_losses)


class FocalLoss(CellLoss):
    """``|target - p|^gamma`` times the cross-entropy: quality focal loss for soft targets (Li et al., NeurIPS 2020)."""

    def cell_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return loss * (target - logits.sigmoid()).abs().pow(self.config.gamma)


class BceLoss(CellLoss):
    """Cross-entropy with the cells of the ball weighted by ``positive_weight``."""

    def cell_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return loss * (1 + (self.config.positive_weight - 1) * target)


class _SumByWindow(torch.autograd.Function):
    """Sums a loss over cells, and computes its gradient in the forward pass, window by window.

    Autograd would keep the intermediate maps of all windows until backward; here they exist for one window at a time,
    and only the gradient, as large as the logits, is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor, cell_losses: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        total, grads = logits.new_zeros(()), torch.empty_like(logits)
        for x, t, w, grad in zip(logits, target, weight, grads):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = (cell_losses(x, t).sum(dim=(-2, -1)) * w).sum()
            grad.copy_(torch.autograd.grad(loss, x)[0])
            total += loss.detach()
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * grad, None, None, None

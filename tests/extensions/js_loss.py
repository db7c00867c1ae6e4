"""A loss that is no sum over cells: the Jensen-Shannon divergence between heatmap and target as distributions."""

import math
from typing import ClassVar

import torch

from tracknet.tracking.heatmap import HeatmapGrid, render, size_hw
from tracknet.training.losses import LOSSES, Loss


class JensenShannonLoss(Loss):
    """Divergence of the softmax over all cells from a normalized Gaussian, in frames with a ball."""

    OPTIONS: ClassVar = {"temperature": 1.0}

    def sum(self, logits, batch):
        input_hw = batch["frames"].shape[-2:]
        grid = HeatmapGrid((input_hw[1], input_hw[0]), size_hw(logits))
        radius = self.config.radius * grid.scale_xy()[0]
        target = render(grid.to_heatmap(batch["xy"]), batch["visible"], grid.heatmap_hw, radius, "gaussian").flatten(-2)
        p = (logits.flatten(-2) / self.options["temperature"]).log_softmax(-1)
        q = (target / target.sum(-1, keepdim=True).clamp_min(1e-12)).clamp_min(1e-12).log()
        m = torch.logaddexp(p, q) - math.log(2)
        divergence = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
        return (divergence * self._weights(batch)).sum()

    def normalizer(self, batch):
        return self._weights(batch).sum()

    @staticmethod
    def _weights(batch):
        return batch["weight"] * batch["visible"]


LOSSES.register("jensen_shannon", JensenShannonLoss)

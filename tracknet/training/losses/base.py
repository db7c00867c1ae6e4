"""Interface of a heatmap loss, its configuration, and the registry that ``training.loss.name`` chooses from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tracknet.errors import UserError
from tracknet.registry import Registry, check_options

MIN_RADIUS, MAX_RADIUS = 1e-6, 1e6  # pixels; beyond, its square under- or overflows in fp32


@dataclass
class LossConfig:
    """Target of the heatmap, and the penalty for deviating from it."""

    name: str = field(default="focal", metadata={"choices": lambda: list(LOSSES)})
    """``focal``: ``|target - p|^gamma`` times the cross-entropy, for soft targets (Li et al., NeurIPS 2020); ``bce``:
    the cross-entropy with cells of the ball weighted."""
    gamma: float = 2.0
    """Focal exponent: larger values give well-scored cells less weight."""
    positive_weight: float = 30.0
    """Weight of the ball's cells under ``bce``."""
    target: Literal["gaussian", "disk"] = "gaussian"
    """Shape of the target. Disks want `evaluation.subpixel: centroid`."""
    events_weight: float = 1.0
    """Weight of hits and bounces relative to the heatmaps, where ``model.events`` is on."""
    radius: float = 2.5
    """Standard deviation of the Gaussian, or radius of the disk, in pixels of the resized frame."""
    options: dict[str, float] = field(default_factory=dict)
    """Settings of a loss that was registered by an extension; the built-in losses have none."""

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
        known = LOSSES.lookup(self.name).OPTIONS
        check_options("training.loss.options", self.options, known, f"the loss '{self.name}' has")


class Loss(ABC):
    """A heatmap loss: a sum over the frames of a batch, divided once by a normalizer.

    A batch may be split into micro-batches and over processes. Their gradients add up to those of the whole batch
    because both the loss and the normalizer are sums over windows, and because the normalizer depends on the labels
    alone, so that the whole batch's is known before the first forward.

    Args:
        config: target, weights and options.

    Attributes:
        OPTIONS: names and defaults of the entries of ``training.loss.options`` that the loss reads.
        options: those entries, with defaults filled in.
    """

    OPTIONS: ClassVar[dict[str, float]] = {}

    def __init__(self, config: LossConfig):
        self.config = config
        self.options = {**self.OPTIONS, **config.options}

    @abstractmethod
    def sum(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum the loss over all frames, each times its weight.

        Args:
            logits: float32 ``[batch, frame, h, w]``.
            batch: ``frames`` uint8 ``[batch, frame, 3, H, W]``; ``xy`` ``[batch, frame, 2]``, ball positions in pixels
                of ``frames``; ``visible`` bool ``[batch, frame]``; ``weight`` ``[batch, frame]``, 0 where a frame is
                unlabeled.

        Returns:
            A scalar.
        """

    def normalizer(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum what the loss is divided by, from labels alone: by default, the weights of the frames."""
        return batch["weight"].sum()


LOSSES: Registry[type[Loss]] = Registry("training.loss.name")


def heatmap_loss(logits: Tensor, batch: dict[str, Tensor], config: LossConfig) -> Tensor:
    """Sum the configured loss over a batch; see ``Loss.sum``."""
    return LOSSES.lookup(config.name)(config).sum(logits, batch)


def loss_normalizer(batch: dict[str, Tensor], config: LossConfig) -> Tensor:
    """Sum the normalizer of the configured loss over a batch; see ``Loss.normalizer``."""
    return LOSSES.lookup(config.name)(config).normalizer(batch)

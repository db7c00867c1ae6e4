"""Loss of hits and bounces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# About one frame in twenty shows an event. Weighted, a model that never predicts one no longer has a low loss.
EVENT_WEIGHT = 8.0


def event_loss(logits: Tensor, event: Tensor) -> Tensor:
    """Sum the cross-entropy of hits and bounces over the frames whose label covers events.

    Args:
        logits: float32 ``[batch, frame, 2]``, hit and bounce.
        event: int ``[batch, frame]``: 0 flying, 1 hit, 2 bounce, -1 unknown.

    Returns:
        A scalar.
    """
    target = torch.stack([event == 1, event == 2], dim=-1).float()
    weight = torch.where(target > 0, EVENT_WEIGHT, 1.0) * (event >= 0)[..., None]
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum()

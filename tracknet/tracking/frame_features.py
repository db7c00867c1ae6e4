"""Reuse of backbone features by overlapping windows.

With ``evaluation.stride=1`` each frame is in as many windows as a window has frames. The backbone encodes every frame
by itself, so its features are computed once and shared; only the decoder runs for each window.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class FrameFeatures:
    """Backbone features of the frames of the latest windows.

    Use one object per sequence of windows (a dataset or a video), because frames are identified by keys. Memory is
    bounded by the frames of one call.

    Args:
        model: model with a backbone, in evaluation mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._maps: dict[Hashable, list[Tensor]] = {}  # per frame, one [c, h, w] per layer

    def encode(self, frames: Tensor, keys: Sequence[Sequence[Hashable]]) -> list[Tensor]:
        """Return the features of windows, and run the backbone only for frames that the previous call did not contain.

        Args:
            frames: uint8 windows ``[batch, frame, 3, h, w]`` on the model's device.
            keys: key of every frame, ``[batch][frame]``; equal keys are equal frames.

        Returns:
            One map ``[batch * frame, c, h, w]`` per layer, as ``model.backbone`` returns for all frames.
        """
        order = [key for window in keys for key in window]
        # Positions of the frames that are new, in order, without repetitions.
        new = {key: i for i, key in reversed(list(enumerate(order))) if key not in self._maps}
        positions = sorted(new.values())
        if positions:
            maps = self.model.encode(frames.flatten(0, 1)[positions])
            self._maps |= {order[i]: [m[row] for m in maps] for row, i in enumerate(positions)}
        self._maps = {key: self._maps[key] for key in set(order)}
        return [torch.stack(layer) for layer in zip(*(self._maps[key] for key in order))]

    def clear(self) -> None:
        """Release all features, for example after running out of memory."""
        self._maps.clear()


def reuse_features(model: Any, num_frames: int, stride: int | None) -> FrameFeatures | None:
    """Return an object that shares features between windows, or ``None`` if there is nothing to share.

    Args:
        model: ``HeatmapModel``, or a model of another engine, which does not separate its backbone.
        num_frames: frames per window.
        stride: frames between the starts of two windows; ``None`` for windows side by side.
    """
    overlaps = stride is not None and stride < num_frames
    return FrameFeatures(model) if overlaps and getattr(model, "backbone", None) is not None else None

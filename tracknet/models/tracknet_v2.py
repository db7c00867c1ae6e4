"""TrackNetV2 (Sun et al., ICPAI 2020), the standard baseline: a VGG-style U-Net over the stacked frames.

The network has 11.3 M parameters, and its input and output have full resolution. GroupNorm replaces the BatchNorm of
the original, so that a batch can be split. The output bias is initialized from the prior, because the best-known
failure of the original is an empty heatmap.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.models.decoder import PRIOR


def _convs(channels_in: int, channels_out: int, depth: int) -> nn.Sequential:
    """Build ``depth`` 3x3 convolutions, each followed by ReLU and GroupNorm."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(channels_in if i == 0 else channels_out, channels_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.GroupNorm(16, channels_out),
        ]
    return nn.Sequential(*layers)


class TrackNetV2(nn.Module):
    """U-Net of three levels with nearest-neighbor upsampling.

    Args:
        num_frames: frames per window.
    """

    kind = None  # no backbone

    def __init__(self, num_frames: int):
        super().__init__()
        self.down1 = _convs(3 * num_frames, 64, 2)
        self.down2 = _convs(64, 128, 2)
        self.down3 = _convs(128, 256, 3)
        self.bottom = _convs(256, 512, 3)
        self.up3 = _convs(512 + 256, 256, 3)
        self.up2 = _convs(256 + 128, 128, 2)
        self.up1 = _convs(128 + 64, 64, 2)
        self.head = nn.Conv2d(64, num_frames, 1)
        # Every cell starts with the prior probability of a ball.
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, frames: Tensor) -> Tensor:
        """Compute heatmap logits.

        Args:
            frames: RGB in ``[0, 1]``, ``[batch, frame, 3, h, w]``; h and w multiples of 8.

        Returns:
            Logits ``[batch, frame, h, w]``.
        """
        d1 = self.down1(frames.flatten(1, 2))
        d2 = self.down2(F.max_pool2d(d1, 2))
        d3 = self.down3(F.max_pool2d(d2, 2))
        x = self.bottom(F.max_pool2d(d3, 2))
        x = self.up3(torch.cat([F.interpolate(x, scale_factor=2), d3], dim=1))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2), d2], dim=1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2), d1], dim=1))
        return self.head(x)

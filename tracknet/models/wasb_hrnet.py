"""HRNet at full resolution (WASB, BMVC 2023), the efficient baseline with 1.5 M parameters.

Four branches at strides 1, 2, 4 and 8 exchange features after every stage (HRNet, CVPR 2019). The stem does not
downsample the frames, so that a ball of three pixels keeps its position. GroupNorm replaces the BatchNorm of the
original, so that a batch can be split. The output bias is initialized from the prior.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.models.decoder import PRIOR

WIDTHS = (16, 32, 64, 128)  # channels of the branches, from stride 1 to stride 8


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


def _conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, _norm(channels_out))


class _Residual(nn.Module):
    """Residual block, whose shortcut is a projection if the number of channels changes."""

    def __init__(self, convolutions: list[nn.Module], channels_in: int, channels_out: int):
        super().__init__()
        self.body = nn.Sequential(*convolutions)
        self.shortcut = _conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _basic(channels: int) -> _Residual:
    """Build a residual block of two 3x3 convolutions."""
    return _Residual([_conv(channels, channels), nn.ReLU(), _conv(channels, channels)], channels, channels)


def _bottleneck(channels_in: int, channels: int) -> _Residual:
    """Build a residual block of 1x1, 3x3 and 1x1 convolutions with ``4 * channels`` output channels."""
    layers = [
        _conv(channels_in, channels, 1),
        nn.ReLU(),
        _conv(channels, channels),
        nn.ReLU(),
        _conv(channels, 4 * channels, 1),
    ]
    return _Residual(layers, channels_in, 4 * channels)


class _Stage(nn.Module):
    """Two residual blocks on each branch, followed by the sum of all branches' features in every branch."""

    def __init__(self, num_branches: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(_basic(c), _basic(c)) for c in WIDTHS[:num_branches])
        self.exchange = nn.ModuleList(
            nn.ModuleList(self._path(source, target) for source in range(num_branches))
            for target in range(num_branches)
        )

    @staticmethod
    def _path(source: int, target: int) -> nn.Module:
        """Build the layers that convert the map of one branch to the width of another.

        They also downsample to the stride of a coarser branch. Upsampling to a finer one follows in ``forward``.
        """
        if source >= target:
            return nn.Identity() if source == target else _conv(WIDTHS[source], WIDTHS[target], 1)
        # Halve the resolution once per branch in between; the width changes in the last step.
        steps: list[nn.Module] = []
        for i in range(source, target):
            is_last = i == target - 1
            steps += [_conv(WIDTHS[source], WIDTHS[target] if is_last else WIDTHS[source], stride=2)]
            steps += [] if is_last else [nn.ReLU()]
        return nn.Sequential(*steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map one tensor per branch, from the finest to the coarsest, to the same shapes."""
        paths: Any
        maps = [block(x) for block, x in zip(self.blocks, maps)]
        out = []
        for target, paths in enumerate(self.exchange):
            size = maps[target].shape[-2:]
            converted = (path(x) for path, x in zip(paths, maps))
            # Maps of coarser branches are upsampled (nearest neighbor).
            resized = [x if x.shape[-2:] == size else F.interpolate(x, size=size) for x in converted]
            out.append(F.relu(functools.reduce(torch.add, resized)))
        return out


class WasbHrnet(nn.Module):
    """HRNet of four branches; the heatmaps come from the finest.

    Args:
        num_frames: frames per window.
    """

    kind = None  # no backbone

    def __init__(self, num_frames: int):
        super().__init__()
        self.stem = nn.Sequential(_conv(3 * num_frames, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _bottleneck(64, 32))
        # Each new branch is created from the coarsest existing one, at half its resolution.
        self.first = nn.Sequential(_conv(128, WIDTHS[0]), nn.ReLU())
        self.second = nn.Sequential(_conv(128, WIDTHS[1], stride=2), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(_conv(a, b, stride=2), nn.ReLU()) for a, b in zip(WIDTHS[1:], WIDTHS[2:])
        )
        self.stages = nn.ModuleList(_Stage(n) for n in (2, 3, 4))
        self.head = nn.Conv2d(WIDTHS[0], num_frames, 1)
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
        # The stem expects values in [-1, 1].
        x = self.stem(2 * frames.flatten(1, 2) - 1)
        maps = [self.first(x), self.second(x)]
        for i, stage in enumerate(self.stages):
            maps = stage(maps)
            if i < len(self.down):
                maps.append(self.down[i](maps[-1]))
        return self.head(maps[0])

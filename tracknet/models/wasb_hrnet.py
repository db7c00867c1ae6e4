"""An HRNet that keeps full resolution (WASB, BMVC 2023), the field's efficient baseline: 1.5 M parameters.

Four branches at strides 1, 2, 4 and 8 exchange what they know after every stage (HRNet, CVPR 2019); the stem does not
shrink the frames, so that a ball of three pixels keeps its place. GroupNorm stands where the original has BatchNorm, so
that a batch may be split; the output bias starts at the prior.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.models.decoder import PRIOR

WIDTHS = (16, 32, 64, 128)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


def _conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, _norm(channels_out))


class _Residual(nn.Module):
    """Convolutions beside a shortcut, which is projected where the number of channels changes."""

    def __init__(self, convolutions: list[nn.Module], channels_in: int, channels_out: int):
        super().__init__()
        self.body = nn.Sequential(*convolutions)
        self.shortcut = _conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _basic(channels: int) -> _Residual:
    return _Residual([_conv(channels, channels), nn.ReLU(), _conv(channels, channels)], channels, channels)


def _bottleneck(channels_in: int, channels: int) -> _Residual:
    layers = [
        _conv(channels_in, channels, 1),
        nn.ReLU(),
        _conv(channels, channels),
        nn.ReLU(),
        _conv(channels, 4 * channels, 1),
    ]
    return _Residual(layers, channels_in, 4 * channels)


class _Stage(nn.Module):
    """Two residual blocks on each branch, then every branch adds what all the others have found."""

    def __init__(self, num_branches: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(_basic(c), _basic(c)) for c in WIDTHS[:num_branches])
        self.exchange = nn.ModuleList(
            nn.ModuleList(self._path(source, target) for source in range(num_branches))
            for target in range(num_branches)
        )

    @staticmethod
    def _path(source: int, target: int) -> nn.Module:
        """Bring a branch's map to the width of another, and down to its stride; up comes after."""
        if source >= target:
            return nn.Identity() if source == target else _conv(WIDTHS[source], WIDTHS[target], 1)
        steps: list[nn.Module] = []
        for i in range(source, target):
            last = i == target - 1
            steps += [_conv(WIDTHS[source], WIDTHS[target] if last else WIDTHS[source], stride=2)]
            steps += [] if last else [nn.ReLU()]
        return nn.Sequential(*steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        paths: Any
        maps = [block(x) for block, x in zip(self.blocks, maps)]
        out = []
        for target, paths in enumerate(self.exchange):
            size = maps[target].shape[-2:]
            found = (path(x) for path, x in zip(paths, maps))
            resized = [x if x.shape[-2:] == size else F.interpolate(x, size=size) for x in found]
            out.append(F.relu(functools.reduce(torch.add, resized)))
        return out


class WasbHrnet(nn.Module):
    """HRNet of four branches, of which the finest gives the heatmaps."""

    def __init__(self, num_frames: int):
        super().__init__()
        self.stem = nn.Sequential(_conv(3 * num_frames, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _bottleneck(64, 32))
        # A new branch comes from the coarsest there is, at half its resolution.
        self.first = nn.Sequential(_conv(128, WIDTHS[0]), nn.ReLU())
        self.second = nn.Sequential(_conv(128, WIDTHS[1], stride=2), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(_conv(a, b, stride=2), nn.ReLU()) for a, b in zip(WIDTHS[1:], WIDTHS[2:])
        )
        self.stages = nn.ModuleList(_Stage(n) for n in (2, 3, 4))
        self.head = nn.Conv2d(WIDTHS[0], num_frames, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames ``[batch, frame, 3, h, w]`` in ``[0, 1]``, sides multiples of 8, to logits ``[batch, frame, h,
        w]``."""
        x = self.stem(2 * frames.flatten(1, 2) - 1)
        maps = [self.first(x), self.second(x)]
        for i, stage in enumerate(self.stages):
            maps = stage(maps)
            if i < len(self.down):
                maps.append(self.down[i](maps[-1]))
        return self.head(maps[0])

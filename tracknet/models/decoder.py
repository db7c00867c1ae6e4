"""The light decoder: fuses what the backbone knows of each frame with full-resolution detail and motion.

A 3-pixel ball does not survive a backbone's stride of 14 or 16, so a shallow detail branch looks at the raw frames and
their differences; the backbone's maps join it at strides 8 and 4, where they say which of the small moving things is
the ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracknet.errors import UserError
from tracknet.models.norm_silu import NormSilu

EVENT_PRIOR = 0.05  # of a frame with a hit, or with a bounce
PRIOR = 0.01  # of a heatmap cell holding a ball, at the start (RetinaNet, ICCV 2017, sec. 4.1): no early collapse


@dataclass
class DecoderConfig:
    """Width of the decoder."""

    channels: int = 64
    """Channels of the fused backbone maps, and of the detail branch at stride 8."""
    detail: bool = True
    """Look at raw frames and their differences at full resolution; without it the heatmap knows only the backbone."""

    def __post_init__(self) -> None:
        if not 32 <= self.channels <= 2048 or self.channels % 32:
            raise UserError(f"model.decoder.channels={self.channels}: give a multiple of 32, up to 2048.")


class ConvBlock(nn.Sequential):
    """3x3 convolution, GroupNorm (its statistics do not depend on the batch, so splitting one changes nothing),
    SiLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), NormSilu(8, channels_out))

    def forward(self, *inputs: Tensor, prepare: Callable[..., Tensor] = lambda x: x) -> Tensor:
        """Convolve ``prepare(*inputs)``; backward prepares it once more, instead of keeping it (the convolution itself
        runs once)."""
        convolution, norm = self
        if not torch.is_grad_enabled():
            return norm(convolution(prepare(*inputs)))
        return norm(
            checkpoint(lambda *x: convolution(prepare(*x)), *inputs, use_reentrant=False, preserve_rng_state=False)
        )


class FrameFusion(nn.Module):
    """Projects backbone maps of equal stride and fuses the frames of a window."""

    def __init__(self, channels_in: list[int], num_frames: int, channels: int):
        super().__init__()
        self.num_frames = num_frames
        self.project = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=False) for c in channels_in)
        self.norm = NormSilu(8, channels)
        self.fuse = nn.Conv2d(num_frames * channels, channels, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map ``[batch * frame, c_i, h, w]`` per layer to ``[batch, channels, h, w]``."""
        x = self.norm(sum(project(m) for project, m in zip(self.project, maps)))
        return self.fuse(x.unflatten(0, (-1, self.num_frames)).flatten(1, 2))


class Decoder(nn.Module):
    """A small U-Net over the window, joined by the backbone's maps, to one logit map per frame.

    Args:
        num_frames: frames per window.
        config: width.
        joins: stride (8, or 4) at which a fused backbone map of ``config.channels`` is added.
        events: find hits and bounces too.
    """

    def __init__(self, num_frames: int, config: DecoderConfig, joins: tuple[int, ...], events: bool = False):
        super().__init__()
        c8, c4, c2 = config.channels, config.channels // 2 + config.channels // 4, config.channels // 2
        self.detail = config.detail
        if config.detail:
            self.down2 = ConvBlock(3 * num_frames + 3 * (num_frames - 1), c2, stride=2)
            self.down4 = nn.Sequential(ConvBlock(c2, c4, stride=2), ConvBlock(c4, c4))
            self.down8 = nn.Sequential(ConvBlock(c4, c8, stride=2), ConvBlock(c8, c8))
        self.mix8 = ConvBlock(c8, c8)
        self.join4 = nn.Conv2d(config.channels, c4, 1, bias=False) if 4 in joins else None
        self.up4 = ConvBlock(c8 + (c4 if config.detail else 0), c4)
        self.up2 = ConvBlock(c4 + (c2 if config.detail else 0), c2)
        self.head = nn.Conv2d(c2, num_frames, 3, padding=1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -math.log((1 - PRIOR) / PRIOR))
        self.events = None
        if events:
            first, last = ConvBlock(c8, c8), nn.Conv2d(c8, 2 * num_frames, 1)
            assert last.bias is not None
            nn.init.constant_(last.bias, -math.log((1 - EVENT_PRIOR) / EVENT_PRIOR))
            self.events = nn.Sequential(first, last)

    def forward(self, frames: Tensor, context: dict[int, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Decode a window.

        Args:
            frames: uint8 ``[batch, frame, 3, h, w]``, h and w multiples of 8.
            context: fused backbone maps ``[batch, channels, ·, ·]`` by the stride at which they join; any size.

        Returns:
            Logits ``[batch, frame, h / 2, w / 2]``, and with events those of hit and bounce, ``[batch, frame, 2]``.
        """
        h, w = frames.shape[-2:]
        x8 = resize_maps(context[8], (h // 8, w // 8))
        if self.detail:
            d2 = self.down2(frames, prepare=partial(_detail, dtype=x8.dtype))
            d4 = self.down4(d2)
            x8 = x8 + self.down8(d4)
        x8 = self.mix8(x8)
        x4 = self.up4(x8, *([d4] if self.detail else []), prepare=partial(_resize_and_stack, hw=(h // 4, w // 4)))
        if self.join4 is not None:
            x4 = x4 + resize_maps(self.join4(context[4]), (h // 4, w // 4))
        x2 = self.up2(x4, *([d2] if self.detail else []), prepare=partial(_resize_and_stack, hw=(h // 2, w // 2)))
        logits = self.head(x2)
        if self.events is None:
            return logits
        return logits, _read_at_peaks(self.events(x8).unflatten(1, (-1, 2)), logits.detach())


def _read_at_peaks(maps: Tensor, logits: Tensor) -> Tensor:
    """Average maps ``[batch, frame, 2, h, w]`` where the ball is, by the heatmaps' probabilities; ``[batch, frame,
    2]``."""
    where = F.adaptive_max_pool2d(logits.float(), maps.shape[-2:]).flatten(-2).softmax(dim=-1)
    return (maps.flatten(-2).float() * where[:, :, None]).sum(dim=-1)


def _detail(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Stack the frames and their differences as channels."""
    x = frames.float() / 255
    motion = (x[:, 1:] - x[:, :-1]) * 4  # frames differ little: bring both to one scale
    return torch.cat([x - 0.5, motion], dim=1).flatten(1, 2).to(dtype)


def _resize_and_stack(x: Tensor, *others: Tensor, hw: tuple[int, int]) -> Tensor:
    return torch.cat([resize_maps(x, hw), *others], dim=1) if others else resize_maps(x, hw)


def resize_maps(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Interpolate ``[..., h, w]`` in its own dtype: CUDA's autocast would go over to fp32, and carry it into whatever
    meets the result."""
    if tuple(x.shape[-2:]) == hw:
        return x
    return F.interpolate(x, size=hw, mode="bilinear", align_corners=False).to(x.dtype)

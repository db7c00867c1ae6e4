"""Lightweight decoder that fuses the backbone's maps of each frame with full-resolution detail and motion.

A ball of 3 pixels does not survive a backbone's stride of 14 or 16. A shallow detail branch therefore processes the raw
frames and their differences. The backbone's maps join it at strides 8 and 4, where they identify which of the small
moving objects is the ball.
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

EVENT_PRIOR = 0.05  # initial probability of a hit, and of a bounce, per frame
# Initial probability of a ball per heatmap cell, which prevents early collapse (RetinaNet, ICCV 2017, sec. 4.1).
PRIOR = 0.01


@dataclass
class DecoderConfig:
    """Settings of the decoder."""

    channels: int = 64
    """Channels of the fused backbone maps, and of the detail branch at stride 8."""
    detail: bool = True
    """Process raw frames and their differences in a branch at full resolution; without it the heatmap depends on the
    backbone only."""

    def __post_init__(self) -> None:
        if not 32 <= self.channels <= 2048 or self.channels % 32:
            raise UserError(f"model.decoder.channels={self.channels}: must be a multiple of 32, up to 2048.")


class ConvBlock(nn.Sequential):
    """3x3 convolution, GroupNorm and SiLU.

    The statistics of GroupNorm do not depend on the batch, so splitting a batch does not change the result.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), NormSilu(8, channels_out))

    def forward(self, *inputs: Tensor, prepare: Callable[..., Tensor] = lambda x: x) -> Tensor:
        """Apply the block to ``prepare(*inputs)`` without keeping the prepared tensor for backward.

        Args:
            inputs: tensors that are kept for backward instead.
            prepare: function that computes the input of the convolution, ``[batch, channels, h, w]``. It must be
                deterministic, because backward calls it again.
        """
        convolution, norm = self
        if not torch.is_grad_enabled():
            return norm(convolution(prepare(*inputs)))
        # The checkpointed function keeps only `inputs` and prepares again in backward. Recomputation stops as soon as
        # the convolution has saved its input, so the convolution itself runs once. `prepare` draws no random numbers,
        # so no RNG state has to be preserved.
        return norm(
            checkpoint(lambda *x: convolution(prepare(*x)), *inputs, use_reentrant=False, preserve_rng_state=False)
        )


class FrameFusion(nn.Module):
    """Projection of backbone maps of equal stride, and fusion of the frames of a window.

    Args:
        channels_in: channels of each map.
        num_frames: frames per window.
        channels: channels of the result.
    """

    def __init__(self, channels_in: list[int], num_frames: int, channels: int):
        super().__init__()
        self.num_frames = num_frames
        self.project = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=False) for c in channels_in)
        self.norm = NormSilu(8, channels)
        self.fuse = nn.Conv2d(num_frames * channels, channels, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map ``[batch * frame, c_i, h, w]`` per layer to ``[batch, channels, h, w]``."""
        # The sum of 1x1 projections equals one projection of the concatenated maps.
        x = self.norm(sum(project(m) for project, m in zip(self.project, maps)))
        # Stack the frames of each window as channels.
        return self.fuse(x.unflatten(0, (-1, self.num_frames)).flatten(1, 2))


class Decoder(nn.Module):
    """Small U-Net over a window that adds the backbone's maps and predicts one logit map per frame.

    Args:
        num_frames: frames per window.
        config: width, and whether there is a detail branch.
        joins: strides (8, and optionally 4) at which a fused backbone map of ``config.channels`` is added.
        events: whether to predict hits and bounces too.
    """

    def __init__(self, num_frames: int, config: DecoderConfig, joins: tuple[int, ...], events: bool = False):
        super().__init__()
        # Channels at strides 8, 4 and 2: all, three quarters and half of the configured width.
        c8, c4, c2 = config.channels, config.channels // 2 + config.channels // 4, config.channels // 2
        self.detail = config.detail
        if config.detail:
            # Input: RGB of all frames, and of the differences between consecutive ones.
            self.down2 = ConvBlock(3 * num_frames + 3 * (num_frames - 1), c2, stride=2)
            self.down4 = nn.Sequential(ConvBlock(c2, c4, stride=2), ConvBlock(c4, c4))
            self.down8 = nn.Sequential(ConvBlock(c4, c8, stride=2), ConvBlock(c8, c8))
        self.mix8 = ConvBlock(c8, c8)
        self.join4 = nn.Conv2d(config.channels, c4, 1, bias=False) if 4 in joins else None
        self.up4 = ConvBlock(c8 + (c4 if config.detail else 0), c4)
        self.up2 = ConvBlock(c4 + (c2 if config.detail else 0), c2)
        self.head = nn.Conv2d(c2, num_frames, 3, padding=1)
        # Start with the prior probability in every cell: the bias is its logit.
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -math.log((1 - PRIOR) / PRIOR))
        self.events = None
        if events:
            # Maps of hit and bounce logits at stride 8, two per frame, which also start at their prior.
            first, last = ConvBlock(c8, c8), nn.Conv2d(c8, 2 * num_frames, 1)
            assert last.bias is not None
            nn.init.constant_(last.bias, -math.log((1 - EVENT_PRIOR) / EVENT_PRIOR))
            self.events = nn.Sequential(first, last)

    def forward(self, frames: Tensor, context: dict[int, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Decode a window.

        Args:
            frames: uint8 ``[batch, frame, 3, h, w]``; h and w multiples of 8.
            context: fused backbone maps ``[batch, channels, h_i, w_i]`` of any size, by the stride at which they join.

        Returns:
            Heatmap logits ``[batch, frame, h / 2, w / 2]``; with events also logits of hit and bounce, ``[batch,
            frame, 2]``.
        """
        h, w = frames.shape[-2:]
        # Stride 8: backbone maps, plus the detail branch. Resizing, stacking and the conversion of frames are passed to
        # the blocks as `prepare`, so that their results are not kept for backward.
        x8 = resize_maps(context[8], (h // 8, w // 8))
        if self.detail:
            d2 = self.down2(frames, prepare=partial(_prepare_detail, dtype=x8.dtype))
            d4 = self.down4(d2)
            x8 = x8 + self.down8(d4)
        x8 = self.mix8(x8)
        # Strides 4 and 2: upsample, with skip connections from the detail branch.
        x4 = self.up4(x8, *([d4] if self.detail else []), prepare=partial(_resize_and_stack, hw=(h // 4, w // 4)))
        if self.join4 is not None:
            x4 = x4 + resize_maps(self.join4(context[4]), (h // 4, w // 4))
        x2 = self.up2(x4, *([d2] if self.detail else []), prepare=partial(_resize_and_stack, hw=(h // 2, w // 2)))
        logits = self.head(x2)
        if self.events is None:
            return logits
        # The heatmap only selects the position at which events are read. Detached, it is not trained by their loss.
        return logits, _read_at_peaks(self.events(x8).unflatten(1, (-1, 2)), logits.detach())


def _read_at_peaks(maps: Tensor, logits: Tensor) -> Tensor:
    """Read event maps at the ball's position, as an average weighted by the heatmap.

    Args:
        maps: event maps ``[batch, frame, 2, h, w]``.
        logits: heatmap logits ``[batch, frame, h', w']``.

    Returns:
        fp32 ``[batch, frame, 2]``.
    """
    # Max pooling to the size of the maps keeps the peak; the softmax over all cells gives weights that sum to 1.
    weights = F.adaptive_max_pool2d(logits.float(), maps.shape[-2:]).flatten(-2).softmax(dim=-1)
    return (maps.flatten(-2).float() * weights[:, :, None]).sum(dim=-1)


def _prepare_detail(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Stack uint8 frames and their differences as channels ``[batch, 6 * frame - 3, h, w]`` of ``dtype``."""
    x = frames.float() / 255
    motion = (x[:, 1:] - x[:, :-1]) * 4  # differences are small: scale them to the range of the frames
    return torch.cat([x - 0.5, motion], dim=1).flatten(1, 2).to(dtype)


def _resize_and_stack(x: Tensor, *skips: Tensor, hw: tuple[int, int]) -> Tensor:
    """Resize ``x`` and concatenate the skip connections, which have that size already, as channels."""
    return torch.cat([resize_maps(x, hw), *skips], dim=1) if skips else resize_maps(x, hw)


def resize_maps(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Resize maps ``[n, channels, h, w]`` bilinearly and keep their dtype.

    CUDA's autocast would return fp32, which every operation on the result would then inherit.
    """
    if tuple(x.shape[-2:]) == hw:
        return x
    return F.interpolate(x, size=hw, mode="bilinear", align_corners=False).to(x.dtype)

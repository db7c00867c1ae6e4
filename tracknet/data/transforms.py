"""Augmentation of windows: one random draw per window, applied to all of its frames and to the ball positions.

The draw is a pure function of ``(seed, epoch, window)``, so that it depends neither on the order of the data, nor on
the number of loading processes, nor on whether a run was resumed. Loading processes draw the parameters, transform the
labels and send the original uint8 frames; the frames are augmented on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tracknet.errors import UserError

# Color of the margin around an image that was made smaller: the mean of ImageNet, which normalization maps to zero. The
# margin is plain because a mirrored or smeared one could show a second, unlabeled ball.
MARGIN_RGB = (124, 116, 104)
GROUP = 1 << 23  # values of the windows that a GPU augments at once


@dataclass
class AugmentConfig:
    """Random changes of training windows. Validation and test windows are never augmented."""

    enabled: bool = True
    """Switch for all augmentation."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    crop: tuple[int, int] | None = None
    """Width and height of a random crop in pixels of the resized frame; ``null`` = the whole frame. Smaller crops train
    faster. Scoring always uses whole frames."""
    crop_on_ball: float = 0.7
    """Probability that the crop is placed so that it contains the ball of a random frame of the window that shows
    one."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest factor of the random zoom."""
    brightness: float = 0.2
    """Largest change of brightness, as a fraction of the full range."""
    contrast: float = 0.2
    """Largest relative change of contrast."""
    saturation: float = 0.3
    """Largest relative change of saturation."""
    blur: float = 0.1
    """Probability of a Gaussian blur with a standard deviation of 0.3 to 1 pixels."""
    noise: float = 0.02
    """Largest standard deviation of the noise per pixel, as a fraction of the full range."""

    def __post_init__(self) -> None:
        for name in ("flip", "crop_on_ball", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.augment.{name} is a probability from 0 to 1, got {getattr(self, name)}.")
        for name in ("brightness", "contrast", "saturation", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.augment.{name} is a fraction from 0 to 1, got {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] < 100:
            raise UserError(
                f"data.augment.scale is [smallest, largest] zoom above 0 and below 100, got {list(self.scale)}."
            )
        if self.crop is not None and (min(self.crop) < 32 or any(side % 8 for side in self.crop)):
            near = [max(32, round(side / 8) * 8) for side in self.crop]
            raise UserError(
                f"data.augment.crop={list(self.crop)}: [width, height] must be multiples of 8, at least 32; the"
                f" nearest is {near}."
            )

    @property
    def only_flips(self) -> bool:
        """Return whether frames are at most flipped and otherwise unchanged."""
        changes = (self.brightness, self.contrast, self.saturation, self.blur, self.noise)
        return not self.enabled or (self.crop is None and tuple(self.scale) == (1.0, 1.0) and not any(changes))


SAMPLED = ("affine", "color", "blur", "noise", "noise_seed")  # keys of the drawn parameters in an item or batch


def sample_augmentation(
    xy: np.ndarray, visible: np.ndarray, size_wh: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Draw the augmentation of a window and transform its labels.

    Args:
        xy: ball positions in pixels of the frames, float ``[frame, 2]``.
        visible: whether there is a ball to find, bool ``[frame]``.
        size_wh: width and height of the frames in pixels.
        config: range of the random changes.
        rng: generator of all random values.

    Returns:
        Ball positions in pixels of the augmented frames, float ``[frame, 2]``; visibility in them, bool ``[frame]``,
        false for balls that left the frame; and the parameters for ``apply_augmentation``:

        - ``affine``: matrix from pixels of the frames to pixels of the augmented frames, float32 ``[2, 3]``.
        - ``color``: matrix that maps ``(r, g, b, 1)`` to RGB, in gray levels, float32 ``[3, 4]``.
        - ``blur``: standard deviation of the blur in pixels, 0 for none.
        - ``noise``: standard deviation of the noise in gray levels.
        - ``noise_seed``: seed of the noise, int64.
    """
    w, h = size_wh
    out_w, out_h = config.crop or (w, h)
    affine = _sample_affine(w, h, out_w, out_h, xy, visible, config, rng)
    xy = xy @ affine[:, :2].T + affine[:, 2]
    # Pixel centers are at integers, so the frame reaches from -0.5 to the size minus 0.5.
    inside = (xy >= -0.5).all(axis=1) & (xy[:, 0] <= out_w - 0.5) & (xy[:, 1] <= out_h - 0.5)
    sampled: dict[str, Any] = {
        "affine": affine.astype(np.float32),
        "color": _draw_color(config, rng).astype(np.float32),
        "blur": np.float32(rng.uniform(0.3, 1.0) if rng.random() < config.blur else 0.0),
        "noise": np.float32(rng.uniform(0, config.noise) * 255),
        "noise_seed": rng.integers(2**63),
    }
    return xy, visible & inside, sampled


def apply_augmentation(batch: dict[str, Tensor], crop: tuple[int, int] | None) -> dict[str, Tensor]:
    """Apply the drawn augmentation to the frames of a batch, on their device.

    Args:
        batch: ``frames``, uint8 ``[batch, frame, 3, h, w]``, and the drawn parameters of each window. A batch without
            parameters is returned unchanged.
        crop: width and height of the augmented frames in pixels; ``None`` keeps the size of the frames.

    Returns:
        The batch with augmented ``frames`` and without the parameters.
    """
    if "affine" not in batch:
        return batch
    frames = batch["frames"]
    out_wh = crop or (frames.shape[-1], frames.shape[-2])
    out = frames.new_empty((*frames.shape[:3], out_wh[1], out_wh[0]))
    # Only some windows are in floating point at a time: on a GPU many, because each launch takes time on the host.
    size = max(1, GROUP // max(1, frames[0].numel())) if frames.is_cuda else 1
    for start in range(0, len(frames), size):
        part = slice(start, start + size)
        out[part] = _augment_windows(frames[part], {name: batch[name][part] for name in SAMPLED}, out_wh)
    return {**{name: t for name, t in batch.items() if name not in SAMPLED}, "frames": out}


def _augment_windows(frames: Tensor, sampled: dict[str, Tensor], out_wh: tuple[int, int]) -> Tensor:
    """Augment the frames of several windows, uint8 ``[window, frame, 3, h, w]``.

    The result of a window does not depend on the others.
    """
    x = _warp(frames.float(), sampled["affine"], out_wh)
    # As single products and sums, whose rounding does not depend on the number of windows.
    color = sampled["color"].to(x.device, non_blocking=True)[:, None, :, :, None, None]
    x = (
        (color[:, :, :, 3] + x[:, :, :1] * color[:, :, :, 0])
        .addcmul_(x[:, :, 1:2], color[:, :, :, 1])
        .addcmul_(x[:, :, 2:], color[:, :, :, 2])
    )
    # Separable Gaussian blur with 7 taps. Replicated borders keep the edge of the frame from darkening.
    for window, sigma in zip(x, sampled["blur"].tolist()):
        if sigma:
            taps = torch.exp(-0.5 * (torch.arange(-3, 4, device=x.device) / sigma).square())
            taps = taps / taps.sum()
            flat = F.pad(window.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
            blurred = F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, 7)), taps.view(1, 1, 7, 1))
            window.copy_(blurred[:, 0].view_as(window))
    # Gray noise, equal in all channels; a standard deviation of up to half a gray level is skipped. The generator does
    # not affect the global random state.
    deviations, seeds = sampled["noise"].tolist(), sampled["noise_seed"].tolist()
    if max(deviations) > 0.5:
        noise, generator = x.new_zeros(*x.shape[:2], 1, *x.shape[3:]), torch.Generator(x.device)
        for window, deviation, seed in zip(noise, deviations, seeds):
            if deviation > 0.5:
                window.normal_(0, deviation, generator=generator.manual_seed(seed))
        x += noise
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _warp(frames: Tensor, affine: Tensor, out_wh: tuple[int, int]) -> Tensor:
    """Resample frames bilinearly; pixels outside the input get the color of the margin.

    Args:
        frames: frames in floating point, ``[window, frame, 3, h, w]``; may be changed.
        affine: matrices from input to output pixels, ``[window, 2, 3]``; only flip, zoom and translation.
        out_wh: width and height of the result in pixels.
    """
    h, w = frames.shape[-2:]
    # Without rotation or shear, each axis is inverted separately. align_corners=True places pixel centers at integers,
    # as everywhere in this package.
    affine = affine.to(frames.device, non_blocking=True)[..., None]
    xs = (torch.arange(out_wh[0], device=frames.device) - affine[:, 0, 2]) / affine[:, 0, 0]
    ys = (torch.arange(out_wh[1], device=frames.device) - affine[:, 1, 2]) / affine[:, 1, 1]
    xs, ys = 2 * xs / (w - 1) - 1, 2 * ys / (h - 1) - 1
    grid = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), dim=-1)
    margin = torch.tensor(MARGIN_RGB, dtype=frames.dtype).to(frames.device, non_blocking=True)[:, None, None]
    # All frames share the grid of their window, so pass them as channels of one image. Subtracting the margin's color
    # makes it zero, which is what padding_mode="zeros" fills in.
    flat = frames.sub_(margin).flatten(1, 2)
    warped = F.grid_sample(flat, grid, padding_mode="zeros", align_corners=True)
    return warped.view(*frames.shape[:3], *grid.shape[1:3]).add_(margin)


def _sample_affine(w, h, out_w, out_h, xy, visible, config, rng) -> np.ndarray:
    """Draw flip, zoom and placement as one matrix from input to output pixels, float64 ``[2, 3]``."""
    flip = rng.random() < config.flip
    zoom = np.exp(rng.uniform(np.log(config.scale[0]), np.log(config.scale[1])))
    on_ball, pick = rng.random() < config.crop_on_ball, rng.random()
    u, v = rng.random(2)
    # Position of the output's corner in the zoomed input. It is negative if the zoomed input is smaller than the
    # output, which places the input at random inside the output.
    corner = np.array([u * (w * zoom - out_w), v * (h * zoom - out_h)])
    if config.crop and on_ball and visible.any():
        balls = xy[visible]
        ball = balls[int(pick * len(balls))].copy()
        if flip:
            ball[0] = w - 1 - ball[0]
        # Place the ball at a random position of the output, but keep the crop inside the zoomed input.
        ball = (ball + 0.5) * zoom - 0.5
        corner = ball - np.array([u * (out_w - 1), v * (out_h - 1)])
        limit = np.array([w * zoom - out_w, h * zoom - out_h])
        corner = np.clip(corner, np.minimum(limit, 0), np.maximum(limit, 0))
    # Pixel centers are at integers, so scaling is about the corner of the image at -0.5.
    shift = 0.5 * zoom - 0.5
    if flip:
        return np.array([[-zoom, 0, (w - 1) * zoom + shift - corner[0]], [0, zoom, shift - corner[1]]])
    return np.array([[zoom, 0, shift - corner[0]], [0, zoom, shift - corner[1]]])


def _draw_color(config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw brightness, contrast and saturation as one matrix ``[3, 4]`` from ``(r, g, b, 1)`` to RGB in gray levels."""
    brightness = rng.uniform(-config.brightness, config.brightness) * 255
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    saturation = 1 + rng.uniform(-config.saturation, config.saturation)
    # Saturation interpolates between the image and its luma (ITU-R BT.601 weights); contrast is a gain about the gray
    # level 128.
    luma = np.array([0.299, 0.587, 0.114])
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * np.tile(luma, (3, 1)))
    return np.hstack([matrix, np.full((3, 1), 128 * (1 - contrast) + brightness)])

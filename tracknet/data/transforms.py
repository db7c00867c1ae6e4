"""Augmentation: one random draw per window, applied alike to all its frames and to the ball.

The draw is a pure function of ``(seed, epoch, window)``: the order of the data, the number of workers and a resumed run
change nothing. Loading processes draw, move the labels and send whole uint8 frames; the pictures are changed where the
model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tracknet.errors import UserError

# Beside a picture that was made smaller: plain, because a mirrored or smeared margin could show a second ball,
# unlabeled.
MARGIN_RGB = (124, 116, 104)


@dataclass
class AugmentConfig:
    """Random changes of training windows; validation and test windows are never changed."""

    enabled: bool = True
    """Switches all of it."""
    flip: float = 0.5
    """Probability of a left-right mirror."""
    crop: tuple[int, int] | None = None
    """Width and height of a random crop in pixels of the resized frame, ``null`` for the whole frame. Smaller crops
    train faster; scoring is always on whole frames."""
    crop_on_ball: float = 0.7
    """Probability that the crop is placed so that it holds the ball of a random labeled frame of the window."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Range of the random zoom."""
    brightness: float = 0.2
    """Largest change of brightness, as a fraction of white."""
    contrast: float = 0.2
    """Largest relative change of contrast."""
    saturation: float = 0.3
    """Largest relative change of saturation."""
    blur: float = 0.1
    """Probability of a Gaussian blur of 0.3 to 1 pixels."""
    noise: float = 0.02
    """Largest standard deviation of per-pixel noise, as a fraction of white."""

    def __post_init__(self) -> None:
        for name in ("flip", "crop_on_ball", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.augment.{name} is a probability, got {getattr(self, name)}.")
        for name in ("brightness", "contrast", "saturation", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.augment.{name} is a fraction from 0 to 1, got {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] < 100:
            raise UserError(f"data.augment.scale is [least, largest] zoom above 0, got {list(self.scale)}.")
        if self.crop is not None and (min(self.crop) < 32 or any(side % 8 for side in self.crop)):
            near = [max(32, round(side / 8) * 8) for side in self.crop]
            raise UserError(
                f"data.augment.crop={list(self.crop)}: [width, height] are multiples of 8, at least 32; nearest "
                f"is {near}."
            )

    @property
    def only_flips(self) -> bool:
        """Whether pictures stay as they are, or are mirrored."""
        changes = (self.brightness, self.contrast, self.saturation, self.blur, self.noise)
        return not self.enabled or (self.crop is None and tuple(self.scale) == (1.0, 1.0) and not any(changes))


SAMPLED = ("affine", "color", "blur", "noise", "noise_seed")


def sample_augmentation(
    xy: np.ndarray, visible: np.ndarray, size_wh: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Draw what happens to a window, and move its labels.

    Args:
        xy: float ``[frame, 2]``, ball in pixels of the frames.
        visible: bool ``[frame]``.
        size_wh: of the frames.
        config: what may change, and how much.
        rng: source of the draw.

    Returns:
        Positions and visibility in the changed pictures (a ball that left is absent), and what ``apply_augmentation``
        needs: ``affine`` ``[2, 3]`` from pixels of the frames to those of the result, ``color`` ``[3, 4]`` of RGB and
        one, ``blur`` and ``noise`` as standard deviations in pixels and in gray levels, ``noise_seed``.
    """
    w, h = size_wh
    out_w, out_h = config.crop or (w, h)
    affine = _sample_affine(w, h, out_w, out_h, xy, visible, config, rng)
    xy = xy @ affine[:, :2].T + affine[:, 2]
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
    """Apply a batch's draws to its pictures, where they are, a window at a time: no more than one in floating point.

    Args:
        batch: ``frames`` uint8 ``[batch, frame, 3, h, w]`` and the draws of its windows; without draws it is returned
            as it is.
        crop: width and height of the result, ``None`` for that of the frames.
    """
    if "affine" not in batch:
        return batch
    frames = batch["frames"]
    out_wh = crop or (frames.shape[-1], frames.shape[-2])
    out = frames.new_empty((*frames.shape[:3], out_wh[1], out_wh[0]))
    for b, window in enumerate(frames):
        out[b] = _augment_window(window, {name: batch[name][b] for name in SAMPLED}, out_wh)
    return {**{name: t for name, t in batch.items() if name not in SAMPLED}, "frames": out}


def _augment_window(frames: Tensor, sampled: dict[str, Tensor], out_wh: tuple[int, int]) -> Tensor:
    x = _warp(frames.float(), sampled["affine"], out_wh)
    color = sampled["color"].to(x.device, non_blocking=True)
    x = torch.einsum("ij,fjhw->fihw", color[:, :3], x) + color[:, 3, None, None]
    if sigma := sampled["blur"].item():
        taps = torch.exp(-0.5 * (torch.arange(-3, 4, device=x.device) / sigma).square())
        taps = taps / taps.sum()
        flat = F.pad(x.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
        x = F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, 7)), taps.view(1, 1, 7, 1))[:, 0].view_as(x)
    if (noise := sampled["noise"].item()) > 0.5:
        generator = torch.Generator(x.device).manual_seed(int(sampled["noise_seed"].item()))
        x = x + noise * torch.randn((len(x), 1, *x.shape[2:]), device=x.device, generator=generator)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _warp(frames: Tensor, affine: Tensor, out_wh: tuple[int, int]) -> Tensor:
    """Sample float ``[frame, 3, h, w]`` bilinearly; beside the picture is the margin's color."""
    h, w = frames.shape[-2:]
    (ax, _, cx), (_, ay, cy) = affine.tolist()
    # Mirror and zoom only: each axis is mapped by itself. align_corners: pixel centers at integers, as everywhere.
    xs = (torch.arange(out_wh[0], device=frames.device) - cx) / ax
    ys = (torch.arange(out_wh[1], device=frames.device) - cy) / ay
    grid = torch.stack(torch.meshgrid(2 * xs / (w - 1) - 1, 2 * ys / (h - 1) - 1, indexing="xy"), dim=-1)
    margin = torch.tensor(MARGIN_RGB, dtype=frames.dtype).to(frames.device, non_blocking=True)[:, None, None]
    # All frames share the grid: they pass as channels of one picture.
    flat = (frames - margin).flatten(0, 1)[None]
    return (
        F.grid_sample(flat, grid[None], padding_mode="zeros", align_corners=True)[0].view(
            len(frames), 3, *grid.shape[:2]
        )
        + margin
    )


def _sample_affine(w, h, out_w, out_h, xy, visible, config, rng) -> np.ndarray:
    """Draw flip, zoom and placement as one 2x3 matrix from input to output pixels."""
    flip = rng.random() < config.flip
    zoom = np.exp(rng.uniform(np.log(config.scale[0]), np.log(config.scale[1])))
    on_ball, pick = rng.random() < config.crop_on_ball, rng.random()
    u, v = rng.random(2)
    # Where the output's corner lies in the zoomed input; a picture smaller than the output is placed at random in it.
    corner = np.array([u * (w * zoom - out_w), v * (h * zoom - out_h)])
    if config.crop and on_ball and visible.any():
        balls = xy[visible]
        ball = balls[int(pick * len(balls))].copy()
        if flip:
            ball[0] = w - 1 - ball[0]
        ball = (ball + 0.5) * zoom - 0.5
        corner = ball - np.array([u * (out_w - 1), v * (out_h - 1)])
        limit = np.array([w * zoom - out_w, h * zoom - out_h])
        corner = np.clip(corner, np.minimum(limit, 0), np.maximum(limit, 0))
    # Pixel centers at integers: scaling is about the picture's corner at -0.5.
    shift = 0.5 * zoom - 0.5
    if flip:
        return np.array([[-zoom, 0, (w - 1) * zoom + shift - corner[0]], [0, zoom, shift - corner[1]]])
    return np.array([[zoom, 0, shift - corner[0]], [0, zoom, shift - corner[1]]])


def _draw_color(config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw brightness, contrast and saturation as one 3x4 matrix on RGB and one, in gray levels."""
    brightness = rng.uniform(-config.brightness, config.brightness) * 255
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    saturation = 1 + rng.uniform(-config.saturation, config.saturation)
    # Saturation is a matrix toward luma, contrast a gain about gray.
    luma = np.array([0.299, 0.587, 0.114])
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * np.tile(luma, (3, 1)))
    return np.hstack([matrix, np.full((3, 1), 128 * (1 - contrast) + brightness)])

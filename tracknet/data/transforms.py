"""Augmentation: one random draw per window, applied alike to all its frames and to the ball.

The draw is a pure function of ``(seed, epoch, window)``: the order of the data, the number of workers and a resumed run
change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.errors import UserError

# Beside a picture that was made smaller: plain, because a mirrored or smeared margin could show a second ball, unlabelled.
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
    """Probability that the crop is placed so that it holds the ball of a random labelled frame of the window."""
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
            raise UserError(f"data.augment.crop={list(self.crop)}: [width, height] are multiples of 8, at least 32; nearest "
                            f"is {near}.")  # fmt: skip


def augment(
    frames: np.ndarray, xy: np.ndarray, visible: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Change a window at random.

    Args:
        frames: uint8 RGB ``[frame, h, w, 3]``.
        xy: float ``[frame, 2]``, ball in pixels of these frames.
        visible: bool ``[frame]``.
        config: what may change, and how much.
        rng: source of the draw.

    Returns:
        Frames (of the crop's size, where one is set), positions and visibility; a ball that left the picture is absent.
    """
    h, w = frames.shape[1:3]
    out_w, out_h = config.crop or (w, h)
    matrix = _draw_affine(w, h, out_w, out_h, xy, visible, config, rng)
    moved = np.stack([
        cv2.warpAffine(f, matrix, (out_w, out_h), flags=cv2.INTER_LINEAR, borderValue=MARGIN_RGB)
        for f in frames
    ])  # fmt: skip
    xy = xy @ matrix[:, :2].T + matrix[:, 2]
    inside = (xy >= -0.5).all(axis=1) & (xy[:, 0] <= out_w - 0.5) & (xy[:, 1] <= out_h - 0.5)
    return _change_colour(moved, config, rng), xy, visible & inside


def _draw_affine(w, h, out_w, out_h, xy, visible, config, rng) -> np.ndarray:
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
    # Pixel centres at integers: scaling is about the picture's corner at -0.5.
    shift = 0.5 * zoom - 0.5
    if flip:
        return np.array([[-zoom, 0, (w - 1) * zoom + shift - corner[0]], [0, zoom, shift - corner[1]]])
    return np.array([[zoom, 0, shift - corner[0]], [0, zoom, shift - corner[1]]])


def _change_colour(frames: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    brightness = rng.uniform(-config.brightness, config.brightness) * 255
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    saturation = 1 + rng.uniform(-config.saturation, config.saturation)
    blur = rng.uniform(0.3, 1.0) if rng.random() < config.blur else 0.0
    noise = rng.uniform(0, config.noise) * 255
    # Saturation is a 3x3 matrix on RGB (towards luma), contrast a gain about grey: one transform for both.
    luma = np.array([0.299, 0.587, 0.114])
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * np.tile(luma, (3, 1)))
    offset = np.full((3, 1), 128 * (1 - contrast) + brightness)
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):
        # cv2.transform saturates to uint8 by itself.
        changed = cv2.transform(frame, np.hstack([matrix, offset]))
        if blur:
            changed = cv2.GaussianBlur(changed, (0, 0), blur)
        if noise > 0.5:
            grain = rng.standard_normal(frame.shape[:2], dtype=np.float32)[..., None] * noise
            changed = np.clip(changed + grain, 0, 255).astype(np.uint8)
        out[i] = changed
    return out

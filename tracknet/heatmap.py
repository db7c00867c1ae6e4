"""The coordinate convention, and the only place where heatmap cells meet image pixels.

Pixel centres are at integers in every space. A source image of width ``W`` covers ``[-0.5, W - 0.5]``, and so does its
heatmap of width ``w`` in cells; resizing maps one interval onto the other::

    x_heatmap = (x_image + 0.5) * w / W - 0.5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeatmapGrid:
    """Maps between source-image pixels and heatmap cells.

    Attributes:
        image_wh: source image size in pixels.
        heatmap_hw: heatmap size in cells.
    """

    image_wh: tuple[int, int]
    heatmap_hw: tuple[int, int]

    def scale_xy(self) -> tuple[float, float]:
        """Heatmap cells per source-image pixel, along x and y."""
        return self.heatmap_hw[1] / self.image_wh[0], self.heatmap_hw[0] / self.image_wh[1]

    def to_heatmap(self, xy_image: Tensor) -> Tensor:
        """Map ``[..., 2]`` source-image pixels to heatmap cells."""
        scale = torch.tensor(self.scale_xy(), dtype=xy_image.dtype, device=xy_image.device)
        return (xy_image + 0.5) * scale - 0.5

    def to_image(self, xy_heatmap: Tensor) -> Tensor:
        """Map ``[..., 2]`` heatmap cells to source-image pixels."""
        scale = torch.tensor(self.scale_xy(), dtype=xy_heatmap.dtype, device=xy_heatmap.device)
        return (xy_heatmap + 0.5) / scale - 0.5


class Peaks(NamedTuple):
    """One peak per heatmap.

    Attributes:
        xy_image: ``[batch, frame, 2]`` source-image pixels.
        confidence: ``[batch, frame]`` height of the peak in ``[0, 1]``.
    """

    xy_image: Tensor
    confidence: Tensor


def render(
    xy_heatmap: Tensor, visible: Tensor, hw: tuple[int, int], radius: float, shape: Literal["gaussian", "disk"]
) -> Tensor:
    """Render one target map per frame.

    Args:
        xy_heatmap: ``[batch, frame, 2]`` ball positions in heatmap cells; ignored where not visible.
        visible: ``[batch, frame]`` bool; a frame without a ball gets an all-zero map.
        hw: size of the map in cells.
        radius: standard deviation of the Gaussian, or radius of the disk, in cells.
        shape: ``gaussian`` peaks at 1; ``disk`` is 1 inside and 0 outside, and never empty.

    Returns:
        ``[batch, frame, h, w]`` float32 in ``[0, 1]``.
    """
    ys = torch.arange(hw[0], device=xy_heatmap.device, dtype=torch.float32)
    xs = torch.arange(hw[1], device=xy_heatmap.device, dtype=torch.float32)
    xy = torch.where(visible[..., None], xy_heatmap.float(), torch.zeros((), device=xy_heatmap.device))
    if shape == "disk":
        # A disk smaller than a cell could miss every cell centre: snap to the cell that holds the ball.
        xy = xy.round() if radius < 0.75 else xy
    dx2 = (xs - xy[..., 0, None]).square()
    dy2 = (ys - xy[..., 1, None]).square()
    if shape == "gaussian":
        # Separable: exp(-(dx2 + dy2) / 2 sigma^2) is an outer product of two short vectors.
        factor = -0.5 / radius**2
        target = torch.exp(dy2 * factor)[..., :, None] * torch.exp(dx2 * factor)[..., None, :]
    else:
        target = (dy2[..., :, None] + dx2[..., None, :] <= radius**2).float()
    return target * visible[..., None, None]


def decode(logits: Tensor, grid: HeatmapGrid, reach: int = 3) -> Peaks:
    """Locate each heatmap's ball to sub-pixel precision.

    The heat-weighted centroid of the cells around the highest one (WASB, BMVC 2023, sec. 3.3, on a fixed neighbourhood
    instead of a thresholded component, so that a weak peak has a position too).

    Args:
        logits: ``[batch, frame, h, w]`` raw scores, before the sigmoid.
        grid: maps heatmap cells to source-image pixels.
        reach: the neighbourhood is ``2 * reach + 1`` cells wide.

    Returns:
        Peaks in source-image pixels (x right, y down), confidence in ``[0, 1]``.
    """
    h, w = logits.shape[-2:]
    flat = logits.flatten(-2).float()
    score, index = flat.max(dim=-1)
    peak_y, peak_x = index // w, index % w
    offset = torch.arange(-reach, reach + 1, device=logits.device)
    ys = peak_y[..., None] + offset
    xs = peak_x[..., None] + offset
    inside = ((ys >= 0) & (ys < h))[..., :, None] & ((xs >= 0) & (xs < w))[..., None, :]
    cells = ys.clamp(0, h - 1)[..., :, None] * w + xs.clamp(0, w - 1)[..., None, :]
    heat = torch.gather(flat, -1, cells.flatten(-2)).unflatten(-1, cells.shape[-2:]).sigmoid() * inside
    total = heat.sum(dim=(-2, -1)).clamp_min(torch.finfo(heat.dtype).tiny)
    x = (heat.sum(dim=-2) * xs).sum(dim=-1) / total
    y = (heat.sum(dim=-1) * ys).sum(dim=-1) / total
    return Peaks(grid.to_image(torch.stack([x, y], dim=-1)), score.sigmoid())

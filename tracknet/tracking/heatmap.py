"""The coordinate convention, and the only place where heatmap cells meet image pixels.

Pixel centers are at integers in every space. A source image of width ``W`` covers ``[-0.5, W - 0.5]``, and so does its
heatmap of width ``w`` in cells; resizing maps one interval onto the other::

    x_heatmap = (x_image + 0.5) * w / W - 0.5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def size_hw(maps: Tensor) -> tuple[int, int]:
    """Return height and width of maps or frames ``[..., h, w]``."""
    return maps.shape[-2], maps.shape[-1]


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
        # By numbers rather than a tensor of them, whose copy to a GPU would make the host wait.
        return torch.stack([(x + 0.5) * s - 0.5 for x, s in zip(xy_image.unbind(-1), self.scale_xy())], dim=-1)

    def to_image(self, xy_heatmap: Tensor) -> Tensor:
        """Map ``[..., 2]`` heatmap cells to source-image pixels."""
        return torch.stack([(x + 0.5) / s - 0.5 for x, s in zip(xy_heatmap.unbind(-1), self.scale_xy())], dim=-1)


class Peaks(NamedTuple):
    """Peaks of heatmaps.

    Attributes:
        xy_image: ``[..., 2]`` source-image pixels.
        confidence: ``[...]`` height of the peak in ``[0, 1]``.
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
        # A disk smaller than a cell could miss every cell center: snap to the cell that holds the ball.
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


Subpixel = Literal["parabola", "centroid"]


def decode(logits: Tensor, grid: HeatmapGrid) -> Peaks:
    """Locate each heatmap's highest peak: of ``[..., h, w]`` raw scores, before the sigmoid, one peak each."""
    xy, confidence = find_peaks(logits.float().sigmoid(), grid, 1)
    return Peaks(xy[..., 0, :], confidence[..., 0])


def find_peaks(heat: Tensor, grid: HeatmapGrid, number: int, subpixel: Subpixel = "parabola", reach: int = 3) -> Peaks:
    """Locate each heatmap's highest peaks to a fraction of a cell.

    Args:
        heat: ``[..., h, w]`` in ``[0, 1]``.
        grid: maps heatmap cells to source-image pixels.
        number: how many, the highest first; each is more than ``2 * reach`` cells from those before it.
        subpixel: ``parabola``: the vertex through the logarithms of the highest cell and its neighbors, in each
            direction, which is exact for a Gaussian (DARK, CVPR 2020, sec. 3.2, with one axis at a time). ``centroid``:
            the heat-weighted mean of the cells within reach (WASB, BMVC 2023, sec. 3.3, on a fixed neighborhood
            instead of a thresholded component), for plateaus.
        reach: of the centroid, and half the least distance of two peaks, in cells to each side.

    Returns:
        ``[..., number]`` peaks in source-image pixels (x right, y down).
    """
    h, w = heat.shape[-2:]
    flat = heat.flatten(-2)
    left = flat.clone() if number > 1 else flat
    found: list[Peaks] = []
    for i in range(number):
        height, index = left.max(dim=-1)
        peak = (index // w, index % w)
        xy = _vertex(flat, peak, (h, w)) if subpixel == "parabola" else _centroid(flat, peak, (h, w), reach)
        found.append(Peaks(grid.to_image(xy), height.clamp_min(0)))
        if i < number - 1:
            taken = _neighbors(peak, (h, w), 2 * reach)[0]
            left.scatter_(-1, taken.flatten(-2), -1.0)
    return Peaks(torch.stack([p.xy_image for p in found], dim=-2), torch.stack([p.confidence for p in found], dim=-1))


def _centroid(flat: Tensor, peak: tuple[Tensor, Tensor], hw: tuple[int, int], reach: int) -> Tensor:
    cells, inside, ys, xs = _neighbors(peak, hw, reach)
    near = torch.gather(flat, -1, cells.flatten(-2)).unflatten(-1, cells.shape[-2:]) * inside
    total = near.sum(dim=(-2, -1)).clamp_min(torch.finfo(near.dtype).tiny)
    x = (near.sum(dim=-2) * xs).sum(dim=-1) / total
    y = (near.sum(dim=-1) * ys).sum(dim=-1) / total
    return torch.stack([x, y], dim=-1)


def _vertex(flat: Tensor, peak: tuple[Tensor, Tensor], hw: tuple[int, int]) -> Tensor:
    cells, inside, _, _ = _neighbors(peak, hw, 1)
    log = torch.gather(flat, -1, cells.flatten(-2)).unflatten(-1, cells.shape[-2:]).clamp_min(1e-12).log()
    offsets = []
    for line, within in ((log[..., 1, :], inside[..., 1, :]), (log[..., :, 1], inside[..., :, 1])):
        before, top, after = line.unbind(-1)
        bend = 2 * top - before - after
        # No vertex at the border, on a plateau, or on the slope that a higher peak has left.
        found = (bend > 1e-6) & within.all(dim=-1)
        offsets.append(torch.where(found, (after - before) / (2 * bend).clamp_min(1e-6), 0.0).clamp(-0.5, 0.5))
    return torch.stack([peak[1] + offsets[0], peak[0] + offsets[1]], dim=-1)


def _neighbors(peak: tuple[Tensor, Tensor], hw: tuple[int, int], reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells around a peak ``(y, x)``: flat index (border cells stand for those outside), which are inside, and their
    rows and columns."""
    offset = torch.arange(-reach, reach + 1, device=peak[0].device)
    ys, xs = (at[..., None] + offset for at in peak)
    inside = ((ys >= 0) & (ys < hw[0]))[..., :, None] & ((xs >= 0) & (xs < hw[1]))[..., None, :]
    cells = ys.clamp(0, hw[0] - 1)[..., :, None] * hw[1] + xs.clamp(0, hw[1] - 1)[..., None, :]
    return cells, inside, ys, xs

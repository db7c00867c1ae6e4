"""Conversion between source-image positions and heatmaps: target rendering and peak detection.

No other module converts between heatmap cells and source-image pixels. Pixel centers are at integer coordinates in
every space. A source image of width ``W`` covers ``[-0.5, W - 0.5]``, and its heatmap of ``w`` cells covers
``[-0.5, w - 0.5]``. Resizing maps one interval linearly onto the other::

    x_heatmap = (x_image + 0.5) * w / W - 0.5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def size_hw(maps: Tensor) -> tuple[int, int]:
    """Return the height and width of maps or frames ``[..., h, w]``."""
    return maps.shape[-2], maps.shape[-1]


@dataclass(frozen=True)
class HeatmapGrid:
    """Mapping between source-image pixels and heatmap cells.

    Attributes:
        image_wh: width and height of the source image in pixels.
        heatmap_hw: height and width of the heatmap in cells.
    """

    image_wh: tuple[int, int]
    heatmap_hw: tuple[int, int]

    def scale_xy(self) -> tuple[float, float]:
        """Return the number of heatmap cells per source-image pixel, along x and y."""
        return self.heatmap_hw[1] / self.image_wh[0], self.heatmap_hw[0] / self.image_wh[1]

    def to_heatmap(self, xy_image: Tensor) -> Tensor:
        """Map positions ``[..., 2]`` from source-image pixels to heatmap cells."""
        # Scale each axis with a Python float. A tensor of scales would have to be copied to the GPU, and the host would
        # wait for that copy.
        return torch.stack([(x + 0.5) * s - 0.5 for x, s in zip(xy_image.unbind(-1), self.scale_xy())], dim=-1)

    def to_image(self, xy_heatmap: Tensor) -> Tensor:
        """Map positions ``[..., 2]`` from heatmap cells to source-image pixels."""
        return torch.stack([(x + 0.5) / s - 0.5 for x, s in zip(xy_heatmap.unbind(-1), self.scale_xy())], dim=-1)


class Peaks(NamedTuple):
    """Peaks of heatmaps.

    Attributes:
        xy_image: positions ``[..., 2]`` in source-image pixels.
        confidence: heights of the peaks ``[...]`` in ``[0, 1]``.
    """

    xy_image: Tensor
    confidence: Tensor


def render(
    xy_heatmap: Tensor, visible: Tensor, hw: tuple[int, int], radius: float, shape: Literal["gaussian", "disk"]
) -> Tensor:
    """Render one target map per frame.

    Args:
        xy_heatmap: ball positions ``[batch, frame, 2]`` in heatmap cells; ignored where the ball is not visible.
        visible: bool mask ``[batch, frame]``; a frame without a ball gets an all-zero map.
        hw: height and width of the map in cells.
        radius: standard deviation of the Gaussian, or radius of the disk, in cells.
        shape: ``gaussian`` has its maximum of 1 at the ball; ``disk`` is 1 inside and 0 outside, and never empty.

    Returns:
        Target maps ``[batch, frame, h, w]``, float32 in ``[0, 1]``.
    """
    ys = torch.arange(hw[0], device=xy_heatmap.device, dtype=torch.float32)
    xs = torch.arange(hw[1], device=xy_heatmap.device, dtype=torch.float32)
    # Positions of invisible balls may be NaN, which multiplying the map by the mask would not remove.
    xy = torch.where(visible[..., None], xy_heatmap.float(), torch.zeros((), device=xy_heatmap.device))
    if shape == "disk":
        # A disk smaller than a cell could miss every cell center, so it is moved to the center of the ball's cell.
        xy = xy.round() if radius < 0.75 else xy
    dx2 = (xs - xy[..., 0, None]).square()
    dy2 = (ys - xy[..., 1, None]).square()
    if shape == "gaussian":
        # The Gaussian is separable: exp(-(dx2 + dy2) / (2 sigma^2)) is the outer product of two vectors, which needs
        # h + w instead of h * w exponentials.
        factor = -0.5 / radius**2
        target = torch.exp(dy2 * factor)[..., :, None] * torch.exp(dx2 * factor)[..., None, :]
    else:
        target = (dy2[..., :, None] + dx2[..., None, :] <= radius**2).float()
    return target * visible[..., None, None]


Subpixel = Literal["parabola", "centroid"]


def decode(logits: Tensor, grid: HeatmapGrid) -> Peaks:
    """Locate the highest peak of each heatmap.

    Args:
        logits: raw scores ``[..., h, w]``, before the sigmoid.
        grid: mapping from heatmap cells to source-image pixels.

    Returns:
        One peak per heatmap: ``xy_image`` ``[..., 2]`` and ``confidence`` ``[...]``.
    """
    xy, confidence = find_peaks(logits.float().sigmoid(), grid, 1)
    return Peaks(xy[..., 0, :], confidence[..., 0])


def find_peaks(heat: Tensor, grid: HeatmapGrid, number: int, subpixel: Subpixel = "parabola", reach: int = 3) -> Peaks:
    """Locate the highest peaks of each heatmap with subcell accuracy.

    Args:
        heat: heatmaps ``[..., h, w]`` in ``[0, 1]``.
        grid: mapping from heatmap cells to source-image pixels.
        number: number of peaks per heatmap, in descending order of height; each is more than ``2 * reach`` cells from
            the higher ones.
        subpixel: refinement method. ``parabola``: vertex of the parabola through the logarithms of the highest cell and
            its neighbors, along each axis, which is exact for a Gaussian (DARK, CVPR 2020, sec. 3.2, applied to one
            axis at a time). ``centroid``: heat-weighted mean of the cells within ``reach`` (WASB, BMVC 2023, sec. 3.3,
            on a fixed neighborhood instead of a thresholded component), for heatmaps with plateaus.
        reach: extent of the centroid's neighborhood to each side, and half the minimum distance between two peaks, in
            cells.

    Returns:
        Peaks in source-image pixels (x right, y down): ``xy_image`` ``[..., number, 2]`` and ``confidence``
        ``[..., number]``. A peak that does not exist has confidence 0.
    """
    h, w = heat.shape[-2:]
    flat = heat.flatten(-2)
    # Suppression writes into a copy: refinement below needs the original heat around each peak, and so does the caller.
    remaining = flat.clone() if number > 1 else flat
    peaks: list[Peaks] = []
    for i in range(number):
        height, index = remaining.max(dim=-1)
        peak = (index // w, index % w)
        xy = _vertex(flat, peak, (h, w)) if subpixel == "parabola" else _centroid(flat, peak, (h, w), reach)
        # A negative maximum means that every cell has been suppressed.
        peaks.append(Peaks(grid.to_image(xy), height.clamp_min(0)))
        if i < number - 1:
            # Suppress the neighborhood of this peak, so that the next maximum is a different peak.
            suppressed = _neighbors(peak, (h, w), 2 * reach)[0]
            remaining.scatter_(-1, suppressed.flatten(-2), -1.0)
    return Peaks(torch.stack([p.xy_image for p in peaks], dim=-2), torch.stack([p.confidence for p in peaks], dim=-1))


def _centroid(flat: Tensor, peak: tuple[Tensor, Tensor], hw: tuple[int, int], reach: int) -> Tensor:
    """Return the heat-weighted mean position ``[..., 2]``, as (x, y) in cells, of the cells within ``reach``."""
    cells, inside, ys, xs = _neighbors(peak, hw, reach)
    # Cells outside the map duplicate border cells; the mask gives them weight 0.
    weights = torch.gather(flat, -1, cells.flatten(-2)).unflatten(-1, cells.shape[-2:]) * inside
    # Avoid 0 / 0 on an all-zero map.
    total = weights.sum(dim=(-2, -1)).clamp_min(torch.finfo(weights.dtype).tiny)
    x = (weights.sum(dim=-2) * xs).sum(dim=-1) / total
    y = (weights.sum(dim=-1) * ys).sum(dim=-1) / total
    return torch.stack([x, y], dim=-1)


def _vertex(flat: Tensor, peak: tuple[Tensor, Tensor], hw: tuple[int, int]) -> Tensor:
    """Return the vertex ``[..., 2]``, as (x, y) in cells, of a parabola through three log-heats along each axis."""
    cells, inside, _, _ = _neighbors(peak, hw, 1)
    log = torch.gather(flat, -1, cells.flatten(-2)).unflatten(-1, cells.shape[-2:]).clamp_min(1e-12).log()
    offsets = []
    # The middle row holds the neighbors along x, the middle column those along y.
    for line, line_inside in ((log[..., 1, :], inside[..., 1, :]), (log[..., :, 1], inside[..., :, 1])):
        before, center, after = line.unbind(-1)
        curvature = 2 * center - before - after
        # There is no vertex at the border, on a plateau, or on the slope of a higher peak that was suppressed.
        has_vertex = (curvature > 1e-6) & line_inside.all(dim=-1)
        # Clamp to the cell: beside a suppressed higher peak it is no local maximum, and the vertex may be outside.
        offsets.append(
            torch.where(has_vertex, (after - before) / (2 * curvature).clamp_min(1e-6), 0.0).clamp(-0.5, 0.5)
        )
    return torch.stack([peak[1] + offsets[0], peak[0] + offsets[1]], dim=-1)


def _neighbors(peak: tuple[Tensor, Tensor], hw: tuple[int, int], reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the square neighborhood of each peak.

    Args:
        peak: row and column of each peak, ``[...]`` each.
        hw: height and width of the map in cells.
        reach: extent of the neighborhood to each side, in cells.

    Returns:
        With ``n = 2 * reach + 1``: flat cell indices ``[..., n, n]``, in which positions outside the map are replaced
        by border cells; a bool mask ``[..., n, n]`` of the positions inside the map; rows ``[..., n]``; columns
        ``[..., n]``.
    """
    offset = torch.arange(-reach, reach + 1, device=peak[0].device)
    ys, xs = (center[..., None] + offset for center in peak)
    inside = ((ys >= 0) & (ys < hw[0]))[..., :, None] & ((xs >= 0) & (xs < hw[1]))[..., None, :]
    cells = ys.clamp(0, hw[0] - 1)[..., :, None] * hw[1] + xs.clamp(0, hw[1] - 1)[..., None, :]
    return cells, inside, ys, xs

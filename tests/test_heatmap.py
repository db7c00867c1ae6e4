import pytest
import torch

from tracknet.heatmap import HeatmapGrid, decode, find_peaks, render

GRID = HeatmapGrid((1280, 720), (144, 256))


def test_corners_of_the_picture_map_to_corners_of_the_map():
    corners = torch.tensor([[-0.5, -0.5], [1279.5, 719.5]])
    assert torch.allclose(GRID.to_heatmap(corners), torch.tensor([[-0.5, -0.5], [255.5, 143.5]]))


def test_the_middle_of_a_block_of_pixels_is_the_middle_of_its_cell():
    # 5 x 5 image pixels make one cell: the centre of the first block is pixel 2.
    assert torch.allclose(GRID.to_heatmap(torch.tensor([2.0, 2.0])), torch.zeros(2))


def test_to_image_inverts_to_heatmap():
    xy = torch.rand(50, 2, dtype=torch.float64) * 700
    assert torch.allclose(GRID.to_image(GRID.to_heatmap(xy)), xy)


def test_axes_are_scaled_apart():
    grid = HeatmapGrid((100, 400), (40, 20))
    assert torch.allclose(grid.to_heatmap(torch.tensor([9.5, 9.5])), torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize(
    "shape, subcell, most",
    # In image pixels, of which a cell has 5 x 5. A Gaussian's logarithm is a parabola; a binary disk is known to half a cell in each direction.
    [("gaussian", "parabola", 0.01), ("gaussian", "centroid", 0.5), ("disk", "centroid", 3.6)],
)
def test_rendered_balls_are_found_where_they_are(shape, subcell, most):
    torch.manual_seed(0)
    xy = torch.rand(20, 3, 2) * torch.tensor([1200.0, 640.0]) + 40
    target = render(GRID.to_heatmap(xy), torch.ones(20, 3, dtype=torch.bool), GRID.heatmap_hw, 1.25, shape)
    peaks = find_peaks(target, GRID, 1, subcell)
    assert (peaks.xy_image[..., 0, :] - xy).norm(dim=-1).max() < most
    if subcell == "parabola":
        assert torch.allclose(decode(torch.logit(target, 1e-7), GRID).xy_image, xy, atol=most)


@pytest.mark.parametrize("subcell", ["parabola", "centroid"])
def test_a_lopsided_peak_is_not_drawn_to_its_tail(subcell):
    """The streak behind a ball warms the cells behind it: the parabola asks the nearest neighbours only."""
    target = render(torch.tensor([[[20.0, 10.0]]]), torch.ones(1, 1, dtype=torch.bool), (24, 40), 1.25, "gaussian")
    target[0, 0, 9:12, 16:18] += 0.4
    xy = find_peaks(target, HeatmapGrid((40, 24), (24, 40)), 1, subcell).xy_image[0, 0, 0]
    assert (xy[0] == pytest.approx(20.0, abs=0.01)) == (subcell == "parabola")


@pytest.mark.parametrize("heat", [0.0, 0.5, 1.0])
def test_an_even_map_has_a_peak_that_is_a_number(heat):
    xy, confidence = find_peaks(torch.full((1, 8, 8), heat), HeatmapGrid((8, 8), (8, 8)), 2)
    assert xy.isfinite().all() and (confidence == heat).any()


def test_axes_are_not_swapped():
    target = render(torch.tensor([[[10.0, 3.0]]]), torch.ones(1, 1, dtype=torch.bool), (20, 30), 1.0, "gaussian")
    assert target[0, 0].argmax() == 3 * 30 + 10


def test_a_frame_without_a_ball_has_an_empty_target():
    xy = torch.tensor([[[float("nan"), 5.0]]])
    target = render(xy, torch.zeros(1, 1, dtype=torch.bool), (20, 30), 1.0, "gaussian")
    assert target.abs().sum() == 0


def test_a_small_disk_is_never_empty():
    target = render(torch.tensor([[[7.5, 7.5]]]), torch.ones(1, 1, dtype=torch.bool), (20, 30), 0.4, "disk")
    assert target.sum() == 1


def test_a_peak_at_the_border_stays_inside():
    logits = torch.full((1, 1, 10, 12), -9.0)
    logits[0, 0, 9, 11] = 9
    peaks = decode(logits, HeatmapGrid((12, 10), (10, 12)))
    assert (peaks.xy_image[0, 0] - torch.tensor([11.0, 9.0])).abs().max() < 0.01
    assert peaks.confidence[0, 0] > 0.99


def test_several_peaks_come_in_order_and_apart():
    heat = torch.zeros(2, 1, 30, 40)
    places = [(5, 5), (7, 6), (20, 15), (38, 28)]
    for height, (x, y) in zip((0.9, 0.8, 0.7, 0.4), places):
        heat[1, 0, y, x] = height
    xy, confidence = find_peaks(heat, HeatmapGrid((40, 30), (30, 40)), 3)
    assert xy.shape == (2, 1, 3, 2)
    assert confidence[1, 0].tolist() == pytest.approx([0.9, 0.7, 0.4])  # 0.8 lies beside 0.9
    assert torch.allclose(xy[1, 0, 1:], torch.tensor([[20.0, 15.0], [38.0, 28.0]]))
    assert (confidence[0] == 0).all() and (heat[1, 0, 5, 5] == 0.9), "the heat stays as it is"

import pytest
import torch

from tracknet.tracking.heatmap import HeatmapGrid, decode, find_peaks, render

GRID = HeatmapGrid((1280, 720), (144, 256))


def test_corners_of_the_picture_map_to_corners_of_the_map():
    corners = torch.tensor([[-0.5, -0.5], [1279.5, 719.5]])
    assert torch.allclose(GRID.to_heatmap(corners), torch.tensor([[-0.5, -0.5], [255.5, 143.5]]))


def test_the_middle_of_a_block_of_pixels_is_the_middle_of_its_cell():
    # 5 x 5 image pixels make one cell: the center of the first block is pixel 2.
    assert torch.allclose(GRID.to_heatmap(torch.tensor([2.0, 2.0])), torch.zeros(2))


def test_to_image_inverts_to_heatmap():
    xy = torch.rand(50, 2, dtype=torch.float64) * 700
    assert torch.allclose(GRID.to_image(GRID.to_heatmap(xy)), xy)


def test_axes_are_scaled_apart():
    grid = HeatmapGrid((100, 400), (40, 20))
    assert torch.allclose(grid.to_heatmap(torch.tensor([9.5, 9.5])), torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize(
    "shape, subpixel, most",
    # In image pixels, of which a cell has 5 x 5. A Gaussian's logarithm is a parabola; a binary disk is known to half a
    # cell in each direction.
    [("gaussian", "parabola", 0.01), ("gaussian", "centroid", 0.5), ("disk", "centroid", 3.6)],
)
def test_rendered_balls_are_found_where_they_are(shape, subpixel, most):
    torch.manual_seed(0)
    xy = torch.rand(20, 3, 2) * torch.tensor([1200.0, 640.0]) + 40
    target = render(GRID.to_heatmap(xy), torch.ones(20, 3, dtype=torch.bool), GRID.heatmap_hw, 1.25, shape)
    peaks = find_peaks(target, GRID, 1, subpixel)
    assert (peaks.xy_image[..., 0, :] - xy).norm(dim=-1).max() < most
    if subpixel == "parabola":
        assert torch.allclose(decode(torch.logit(target, 1e-7), GRID).xy_image, xy, atol=most)


@pytest.mark.parametrize("subpixel", ["parabola", "centroid"])
def test_a_lopsided_peak_is_not_drawn_to_its_tail(subpixel):
    """The streak behind a ball warms the cells behind it: the parabola asks the nearest neighbors only."""
    target = render(torch.tensor([[[20.0, 10.0]]]), torch.ones(1, 1, dtype=torch.bool), (24, 40), 1.25, "gaussian")
    target[0, 0, 9:12, 16:18] += 0.4
    xy = find_peaks(target, HeatmapGrid((40, 24), (24, 40)), 1, subpixel).xy_image[0, 0, 0]
    assert (xy[0] == pytest.approx(20.0, abs=0.01)) == (subpixel == "parabola")


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


@pytest.mark.parametrize("visible", [True, False])
def test_targets_are_gaussians_or_disks_of_their_radius(visible):
    x, y, radius = 10.25, 6.5, 3.0
    xs, ys = torch.arange(30.0), torch.arange(20.0)[:, None]
    square = (xs - x) ** 2 + (ys - y) ** 2
    one, there = torch.tensor([[[x, y]]]), torch.full((1, 1), visible)
    gaussian = render(one, there, (20, 30), radius, "gaussian")
    disk = render(one, there, (20, 30), radius, "disk")
    assert gaussian.shape == disk.shape == (1, 1, 20, 30) and gaussian.dtype == disk.dtype == torch.float32
    assert torch.allclose(gaussian[0, 0], torch.exp(-square / (2 * radius**2)) * visible, atol=1e-6)
    assert torch.equal(disk[0, 0], (square <= radius**2).float() * visible)


def test_the_border_of_a_disk_belongs_to_it():
    disk = render(torch.tensor([[[10.0, 6.0]]]), torch.ones(1, 1, dtype=torch.bool), (20, 30), 3.0, "disk")
    assert disk[0, 0, 6].nonzero().flatten().tolist() == list(range(7, 14)) and disk.sum() == 29


@pytest.mark.parametrize(("radius", "cells"), [(0.74, [[4, 8]]), (0.75, [[4, 7], [4, 8]])])
def test_only_a_disk_smaller_than_a_cell_is_moved_to_the_nearest(radius, cells):
    disk = render(torch.tensor([[[7.55, 4.0]]]), torch.ones(1, 1, dtype=torch.bool), (10, 20), radius, "disk")
    assert disk[0, 0].nonzero().tolist() == cells


def test_frames_of_a_batch_have_targets_of_their_own():
    xy = torch.tensor([[[3.0, 4.0], [8.0, 1.0]], [[5.0, 5.0], [0.0, 9.0]]], dtype=torch.float64)
    target = render(xy, torch.tensor([[True, True], [False, True]]), (10, 12), 1.0, "gaussian")
    assert target.flatten(2).argmax(-1).tolist() == [[4 * 12 + 3, 1 * 12 + 8], [0, 9 * 12]]
    assert target[1, 0].sum() == 0 and target.dtype == torch.float32


CELLS = HeatmapGrid((40, 30), (30, 40))


def spots(*places):
    """A heatmap with cells ``(x, y, heat)``."""
    heat = torch.zeros(1, 30, 40)
    for x, y, height in places:
        heat[0, y, x] = height
    return heat


def test_a_centroid_weighs_the_cells_within_reach_and_no_others():
    heat = spots((10, 10, 1.0), (13, 10, 0.5), (10, 7, 0.25), (14, 10, 0.9), (10, 14, 0.9))
    xy = find_peaks(heat, CELLS, 1, "centroid", reach=3).xy_image[0, 0]
    assert xy.tolist() == pytest.approx([10 + 3 * 0.5 / 1.75, 10 - 3 * 0.25 / 1.75], abs=1e-5)
    near = find_peaks(heat, CELLS, 1, "centroid", reach=2).xy_image[0, 0]
    assert near.tolist() == [10, 10]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (39, 29), (0, 29), (39, 0)])
@pytest.mark.parametrize("subpixel", ["parabola", "centroid"])
def test_cells_outside_of_the_map_weigh_nothing(x, y, subpixel):
    inner_x, inner_y = abs(x - 1), abs(y - 1)
    heat = spots((x, y, 0.8), (inner_x, y, 0.4), (x, inner_y, 0.2))
    xy = find_peaks(heat, CELLS, 1, subpixel).xy_image[0, 0].tolist()
    shift = (0.4 / 1.4, 0.2 / 1.4) if subpixel == "centroid" else (0, 0)
    assert xy == pytest.approx([x + (inner_x - x) * shift[0], y + (inner_y - y) * shift[1]], abs=1e-5)


def test_a_parabola_is_put_through_the_logarithms_of_three_cells_in_each_direction():
    heat = spots((10, 10, 0.8), (9, 10, 0.2), (11, 10, 0.4), (10, 9, 0.6), (10, 11, 0.3))
    log = torch.tensor([0.2, 0.8, 0.4, 0.6, 0.3], dtype=torch.float64).log()
    x = (log[2] - log[0]) / (2 * (2 * log[1] - log[0] - log[2]))
    y = (log[4] - log[3]) / (2 * (2 * log[1] - log[3] - log[4]))
    found = find_peaks(heat, CELLS, 1).xy_image[0, 0].tolist()
    assert found == pytest.approx([10 + float(x), 10 + float(y)], abs=1e-4)


def test_a_parabola_at_the_border_still_knows_the_other_direction():
    heat = spots((0, 10, 0.8), (1, 10, 0.4), (0, 9, 0.2), (0, 11, 0.4))
    x, y = find_peaks(heat, CELLS, 1).xy_image[0, 0].tolist()
    assert x == 0 and y == pytest.approx(10 + 1 / 6, abs=1e-5)  # log2: -2, 0, -1 from the top


def test_the_slope_that_a_higher_peak_leaves_has_no_vertex_and_none_lies_beyond_half_a_cell():
    slope = torch.exp(-torch.arange(40.0) / 50).view(1, 1, 40)  # falls evenly from the left
    assert find_peaks(slope, HeatmapGrid((40, 1), (1, 40)), 2, reach=2).xy_image[0].tolist() == [[0, 0], [5, 0]]
    lopsided = spots((10, 10, 0.5), (11, 10, 0.49999), (9, 10, 1e-6))
    x = find_peaks(lopsided, CELLS, 1).xy_image[0, 0, 0].item()
    assert 10.49 < x <= 10.5


@pytest.mark.parametrize("reach", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_peaks_are_more_than_twice_the_reach_apart(reach, axis):
    def beside(cells):
        return (10 + cells, 10) if axis == 0 else (10, 10 + cells)

    heat = spots(
        (10, 10, 0.9), (*beside(2 * reach), 0.8), (*beside(2 * reach + 1), 0.7), (*beside(-2 * reach - 1), 0.6)
    )
    found = find_peaks(heat, CELLS, 2, "centroid", reach)
    assert found.confidence[0].tolist() == pytest.approx([0.9, 0.7])


def test_where_there_is_no_further_peak_its_confidence_is_zero():
    found = find_peaks(torch.full((1, 4, 4), 0.3), HeatmapGrid((4, 4), (4, 4)), 3)
    assert found.confidence[0].tolist() == pytest.approx([0.3, 0, 0]) and found.xy_image.isfinite().all()


def test_as_many_peaks_are_found_as_were_asked_for():
    heat = spots((5, 5, 0.4), (20, 5, 0.5), (35, 5, 0.6))
    assert find_peaks(heat, CELLS, 1).xy_image.tolist() == [[[35, 5]]]
    assert find_peaks(heat, CELLS, 3).xy_image[0].tolist() == [[35, 5], [20, 5], [5, 5]]


def test_a_peak_is_decoded_from_scores_before_the_sigmoid_in_any_precision():
    logits = torch.full((2, 3, 30, 40), -6.0, dtype=torch.bfloat16)
    logits[1, 2, 7, 9] = 2.0
    peaks = decode(logits, HeatmapGrid((80, 90), (30, 40)))
    assert peaks.xy_image.shape == (2, 3, 2) and peaks.confidence.shape == (2, 3)
    assert peaks.xy_image[1, 2].tolist() == pytest.approx([(9 + 0.5) * 2 - 0.5, (7 + 0.5) * 3 - 0.5], abs=1e-4)
    assert peaks.confidence[1, 2].item() == pytest.approx(1 / (1 + 2.718281828**-2), abs=1e-6)

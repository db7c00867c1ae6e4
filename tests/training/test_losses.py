"""Losses of heatmaps and events: values, gradients, weights, and sums over micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from tracknet.errors import UserError
from tracknet.tracking.heatmap import HeatmapGrid, render
from tracknet.training.losses import LossConfig, event_loss, heatmap_loss


def batch(n=6):
    torch.manual_seed(0)
    visible = torch.rand(n, 3) > 0.3
    weight = (torch.rand(n, 3) > 0.4).float()
    return {
        "frames": torch.zeros(n, 3, 3, 32, 48, dtype=torch.uint8),
        "xy": torch.rand(n, 3, 2) * 30,
        "visible": visible,
        "weight": weight,
    }


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(name="bce", target="disk")])
def test_uneven_parts_add_up(config):
    whole = batch()
    logits = torch.randn(6, 3, 16, 24)
    total = heatmap_loss(logits, whole, config)
    parts = sum(
        heatmap_loss(logits[s], {k: v[s] for k, v in whole.items()}, config)
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    )
    assert torch.allclose(total, parts, rtol=1e-6)


def test_unlabeled_frames_weigh_nothing_and_absent_ones_fully():
    one = batch(1)
    one["visible"][:] = False
    one["weight"] = torch.tensor([[1.0, 0.0, 1.0]])
    logits = torch.zeros(1, 3, 16, 24, requires_grad=True)
    heatmap_loss(logits, one, LossConfig()).backward()
    assert logits.grad[0, 1].abs().sum() == 0
    assert (logits.grad[0, 0] > 0).all()  # every cell of a frame without a ball is pushed down


def test_the_right_heatmap_costs_least():
    one = batch(1)
    one["visible"][:] = True
    one["weight"][:] = 1
    one["xy"][:] = torch.tensor([20.0, 10.0])
    at = torch.full((1, 3, 16, 24), -6.0)
    at[..., 5, 10] = 3
    off = at.roll(6, dims=-1)
    assert (
        heatmap_loss(at, one, LossConfig())
        < heatmap_loss(torch.full_like(at, -6.0), one, LossConfig())
        < heatmap_loss(off, one, LossConfig())
    )


def test_settings_change_the_loss():
    logits, one = torch.randn(6, 3, 16, 24), batch()
    values = {
        float(heatmap_loss(logits, one, c))
        for c in (
            LossConfig(),
            LossConfig(gamma=1),
            LossConfig(radius=4),
            LossConfig(target="disk"),
            LossConfig(name="bce"),
            LossConfig(name="bce", positive_weight=5),
        )
    }
    assert len(values) == 6
    with pytest.raises(UserError):
        LossConfig(radius=0)


def written_out(logits, one, config):
    """Compute the loss with the formulas of the papers, without saving memory."""
    grid = HeatmapGrid((48, 32), (16, 24))
    radius = config.radius * 24 / 48
    target = render(grid.to_heatmap(one["xy"]), one["visible"], (16, 24), radius, config.target)
    p = logits.sigmoid()
    cells = -target * p.log() - (1 - target) * (1 - p).log()
    if config.name == "focal":
        cells = cells * (target - p).abs() ** config.gamma
    else:
        cells = cells * (config.positive_weight * target + (1 - target))
    return (cells.sum(dim=(-2, -1)) * one["weight"]).sum()


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(gamma=0.0),
        LossConfig(gamma=1.5, radius=4.0),
        LossConfig(target="disk"),
        LossConfig(name="bce", positive_weight=7.0),
        LossConfig(name="bce", positive_weight=0.5, target="disk"),
    ],
)
def test_loss_and_gradient_are_those_of_the_formula(config):
    one = batch(3)
    one["weight"] = torch.rand(3, 3)  # fractional weights scale the loss of a frame
    logits = torch.randn(3, 3, 16, 24, requires_grad=True)
    ours, wanted = heatmap_loss(logits, one, config), written_out(logits, one, config)
    assert torch.allclose(ours, wanted, rtol=1e-5)
    gradients = [torch.autograd.grad(loss * 0.5, logits)[0] for loss in (ours, wanted)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6) and gradients[0].abs().max() > 0.01


def test_a_disk_under_bce_weighs_its_cells_and_no_others():
    one = batch(1)
    one["visible"][:], one["weight"][:], one["xy"][:] = True, 1.0, torch.tensor([20.0, 10.0])
    logits = torch.zeros(1, 3, 16, 24, requires_grad=True)
    heatmap_loss(logits, one, LossConfig(name="bce", target="disk", positive_weight=30.0)).backward()
    values, counts = logits.grad[0, 0].unique(return_counts=True)
    assert values.tolist() == [-15.0, 0.5] and 1 <= counts[0] <= 9


def test_events_are_weighted_as_written():
    logits = torch.tensor([[[0.3, -1.0], [2.0, 0.5], [-0.7, 0.1], [5.0, -5.0]]], requires_grad=True)
    event = torch.tensor([[1, 2, 0, -1]])
    p = logits.sigmoid()[0]
    hit, bounce = 8 * p[0, 0].log() + (1 - p[0, 1]).log(), (1 - p[1, 0]).log() + 8 * p[1, 1].log()
    wanted = -(hit + bounce + (1 - p[2]).log().sum())
    assert torch.allclose(event_loss(logits, event), wanted)
    assert event_loss(logits, torch.full((1, 4), -1)) == 0


@pytest.mark.parametrize("name", ["gamma", "events_weight", "positive_weight", "radius"])
def test_numbers_that_make_no_loss_are_refused(name):
    zero_is_refused = name in ("positive_weight", "radius")
    for value in (-0.1, float("inf"), float("nan"), *([0.0] if zero_is_refused else [])):
        with pytest.raises(UserError, match=rf"training\.loss\.{name}={value}"):
            LossConfig(**{name: value})
    for value in (0.01, 0.99, 1e6, *([] if zero_is_refused else [0.0])):
        assert getattr(LossConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("target", "hw"), [("gaussian", (16, 24)), ("disk", (16, 24)), ("gaussian", (32, 48))])
def test_the_radius_is_in_pixels_of_the_frame_whatever_the_size_of_the_heatmap(target, hw):
    """For a frame of 32x48 pixels, a heatmap of half the size contains balls of half the radius."""
    one = batch(1)
    one["visible"][:], one["weight"][:], one["xy"][:] = True, 1, torch.tensor([21.5, 10.5])
    scale = hw[0] / 32
    ball = torch.tensor([21.5, 10.5]).add(0.5).mul(scale).sub(0.5).expand(1, 3, 2)
    wanted = render(ball, one["visible"], hw, 5 * scale, target)
    logits = torch.randn(1, 3, *hw)
    loss = heatmap_loss(logits, one, LossConfig(name="bce", positive_weight=1, target=target, radius=5))
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), rtol=1e-5)

"""Detection of collapsed heatmaps: one message per collapse, none for normal training."""

import pytest
import torch

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.training import collapse
from tracknet.training.collapse import PATIENCE, WINDOW, CollapseWatch, PeakCounts, count_peaks


def counts(height: float, hits: float = 0.0, filled: float = 0.0) -> PeakCounts:
    """Return the counts of a step with 20 frames with and 4 frames without a ball."""
    return PeakCounts(20, 20 * height, 20 * (height < 0.5), 20 * hits, 4, 4 * filled)


def run(*phases: tuple[int, PeakCounts], on_collapse: str = "warn") -> None:
    """Update a watch with phases, each a number of steps with the same counts."""
    watch, step = CollapseWatch(on_collapse), 0
    for number, of_phase in phases:
        for _ in range(number):
            step += 1
            watch.update(step, of_phase)


def test_training_that_goes_well_is_left_alone(said):
    run((100, counts(0.02)), (100, counts(0.2, 0.1)), (300, counts(0.7, 0.6)))
    assert said == []


def test_peaks_that_fall_are_said_once(said):
    run((100, counts(0.6, 0.5)), (200, counts(0.02)))
    (line,) = said
    assert "fell from 0.60 to" in line and "training.optimizer.lr" in line


def test_peaks_that_never_rise_are_said_after_a_while(said):
    run((PATIENCE - 1, counts(0.02)))
    assert said == []
    run((PATIENCE + WINDOW, counts(0.02)))
    (line,) = said
    assert f"after {PATIENCE} steps no peak has risen" in line and "training.loss" in line and "check_data" in line


def test_peaks_everywhere_are_said(said):
    run((WINDOW, counts(0.9, 0.0, 1.0)))
    (line,) = said
    assert "100% of the frames without a ball have a peak" in line and "positive_weight" in line


def test_stop_ends_the_run():
    with pytest.raises(UserError, match=r"fell from .*on_collapse=warn to continue"):
        run((100, counts(0.6, 0.5)), (200, counts(0.02)), on_collapse="stop")


def test_peaks_are_counted_where_labels_say_something():
    logits = torch.full((1, 4, 8, 8), -6.0)
    logits[0, 0, 2, 3] = 4.0  # at the ball
    logits[0, 1, 7, 7] = 4.0  # far from it
    logits[0, 2, 0, 0] = 4.0  # no ball
    batch = {
        "frames": torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8),
        "xy": torch.tensor([[[6.5, 4.5]] * 4]),
        "visible": torch.tensor([[True, True, False, True]]),
        "weight": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
    }
    found = PeakCounts(*count_peaks(logits, batch).tolist())
    assert (found.balls, found.empty, found.hits, found.absent, found.filled) == (2, 0, 1, 1, 1)
    assert found.height == pytest.approx(2 * torch.tensor(4.0).sigmoid().item())


def test_a_run_that_cannot_rise_stops_with_the_cause(tiny, tmp_path, monkeypatch):
    """Train with hardly any weight on the ball's cells and with a reduced window and patience."""
    monkeypatch.setattr(collapse, "WINDOW", 4)
    monkeypatch.setattr(collapse, "PATIENCE", 6)
    settings = [
        "training.loss.name=bce",
        "training.loss.positive_weight=1e-6",
        "training.max_steps=12",
        "training.on_collapse=stop",
    ]
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), *settings])
    with pytest.raises(UserError, match="no peak has risen at a ball"):
        train_run(config, tmp_path / "o/runs/r")

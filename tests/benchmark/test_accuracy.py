"""Intervals: known answers, and what the ratio's pairing is for."""

import numpy as np

from tracknet.benchmark.accuracy import summarize
from tracknet.tracking.metrics import FrameResult, score
from tracknet.tracking.records import Detection


def _frames(found: np.ndarray) -> list[FrameResult]:
    return [
        FrameResult(f"clip{i // 50}", Detection(i % 50, (10.0 if hit else 90.0, 10.0), 0.9), 1, (10.0, 10.0))
        for i, hit in enumerate(found)
    ]


def test_the_mean_is_the_score_and_the_interval_holds_it():
    rng = np.random.default_rng(0)
    runs = [_frames(rng.random(200) < 0.7) for _ in range(3)]
    (row,) = summarize({"default": runs}, 4.0, 0.5)
    assert np.isclose(row["f1"], np.mean([score(r, 4.0, 0.5)["f1_strict"] for r in runs]))
    low, high = row["interval"]
    assert low < row["f1"] < high and 0.02 < high - low < 0.25


def test_equal_modes_have_a_ratio_of_one_without_spread():
    rng = np.random.default_rng(1)
    runs = [_frames(rng.random(200) < p) for p in (0.5, 0.8)]
    rows = summarize({"default": runs, "int8": runs}, 4.0, 0.5)
    assert rows[1]["relative"] == 1.0 and rows[1]["relative_interval"] == [1.0, 1.0]
    assert rows[0]["interval"][1] - rows[0]["interval"][0] > 0.1, "the scores themselves are uncertain"


def test_a_worse_mode_lies_below_one():
    rng = np.random.default_rng(2)
    good = [rng.random(400) < 0.8 for _ in range(3)]
    rows = summarize(
        {"default": [_frames(g) for g in good], "int8": [_frames(g & (rng.random(400) < 0.8)) for g in good]}, 4.0, 0.5
    )
    assert 0.7 < rows[1]["relative"] < 0.9 and rows[1]["relative_interval"][1] < 0.95


def test_a_reference_that_finds_nothing_gives_no_ratio():
    rows = summarize({"default": [_frames(np.zeros(40, bool))], "int8": [_frames(np.ones(40, bool))]}, 4.0, 0.5)
    assert rows[1]["relative"] is None and rows[1]["relative_interval"] is None and rows[1]["f1"] == 1.0

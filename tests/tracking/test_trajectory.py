"""Choosing peaks by the ball's path: known answers, and the probabilities against counting every possibility."""

import itertools

import numpy as np
import pytest

from tracknet.tracking.trajectory import (
    ANYWHERE,
    AROUND,
    BLOCK,
    CHANGE,
    LAG,
    ODDS,
    SPREAD,
    STRAY,
    Trajectory,
    _logsumexp,
)

WH = (1280, 720)


def choose(places, heights):
    """Return peak numbers and confidences of a whole clip."""
    trajectory = Trajectory(WH)
    choices = [c for xy, h in zip(places, heights) for c in trajectory.add(np.array(xy, float), np.array(h, float))]
    choices += trajectory.finish()
    assert len(choices) == len(places)
    return [c.peak for c in choices], np.array([c.confidence for c in choices])


def flight(n, bounce_at=None):
    t = np.arange(n, dtype=float)
    y = 300 + 4 * t + 0.6 * t**2
    if bounce_at is not None:
        y[bounce_at:] = y[bounce_at] - 14 * (t[bounce_at:] - bounce_at) + 0.6 * (t[bounce_at:] - bounce_at) ** 2
    return np.stack([200 + 15 * t, y], axis=1)


def test_a_higher_peak_that_lies_on_no_path_is_left():
    rng = np.random.default_rng(0)
    ball = flight(20)
    shoes = rng.uniform((0, 0), WH, (20, 2))
    places = np.stack([shoes, ball], axis=1)
    peaks, confidence = choose(places, [[0.8, 0.4]] * 20)
    assert peaks == [1] * 20 and confidence.min() > 0.9


def test_a_bounce_is_followed():
    ball = flight(24, bounce_at=12)
    rng = np.random.default_rng(1)
    places = np.stack([rng.uniform((0, 0), WH, (24, 2)), ball], axis=1)
    peaks, confidence = choose(places, [[0.5, 0.5]] * 24)
    assert peaks == [1] * 24 and confidence.min() > 0.9


def test_low_peaks_everywhere_are_no_ball():
    rng = np.random.default_rng(2)
    _, confidence = choose(rng.uniform((0, 0), WH, (40, 3, 2)), rng.uniform(0, 0.3, (40, 3)))
    assert (confidence < 0.5).mean() > 0.9


def test_what_stays_in_place_is_no_ball_and_the_ball_that_passes_it_is_one():
    """The end of a line gives a low peak in every frame, which is a perfect path at rest."""
    rng = np.random.default_rng(6)
    line = np.tile([400.0, 500.0], (60, 1)) + rng.normal(0, 1, (60, 2))
    ball = rng.uniform((0, 0), WH, (60, 2))
    ball[20:40] = flight(20)
    heights = np.tile([0.2, 0.05], (60, 1))
    heights[20:40, 1] = 0.6
    peaks, confidence = choose(np.stack([line, ball], axis=1), heights)
    there = (np.arange(60) >= 20) & (np.arange(60) < 40)
    assert (confidence[~there] < 0.5).all()
    assert (confidence[there] > 0.9).all() and peaks[20:40] == [1] * 20


def test_a_high_peak_that_stays_in_place_is_a_ball_that_lies_there():
    rng = np.random.default_rng(7)
    _, confidence = choose(np.tile([400.0, 500.0], (30, 1, 1)) + rng.normal(0, 1, (30, 1, 2)), np.full((30, 1), 0.97))
    assert (confidence > 0.9).all()


def test_a_low_peak_on_a_path_is_the_ball_and_one_frame_without_any_breaks_nothing():
    ball = flight(20)
    places, heights = np.stack([ball, ball + 300], axis=1), np.tile([0.9, 0.05], (20, 1))
    heights[8, 0] = 0.2
    heights[13] = 0.001
    _, confidence = choose(places, heights)
    assert confidence[8] > 0.9 and confidence[12] > 0.9 and confidence[14] > 0.9


@pytest.mark.parametrize(
    "n", [0, 1, 2, AROUND, BLOCK + LAG + AROUND - 1, BLOCK + LAG + AROUND, BLOCK + LAG + AROUND + 1, 100]
)
def test_each_frame_gets_one_choice(n):
    rng = np.random.default_rng(3)
    peaks, confidence = choose(rng.uniform((0, 0), WH, (n, 2, 2)), rng.uniform(0, 1, (n, 2)))
    assert len(peaks) == n and ((confidence >= 0) & (confidence <= 1)).all()


def test_what_is_settled_does_not_wait_for_the_end():
    rng = np.random.default_rng(4)
    trajectory = Trajectory(WH)
    number = [len(trajectory.add(p, h)) for p, h in zip(rng.uniform((0, 0), WH, (100, 2, 2)), rng.random((100, 2)))]
    delay = BLOCK + LAG + AROUND
    assert np.cumsum(number)[delay - 1] == BLOCK and max(np.arange(1, 101) - np.cumsum(number)) < delay
    assert len(trajectory._frames) < BLOCK + LAG + 2 and len(trajectory._peaks) <= 2 * AROUND, "memory is bounded"


def test_the_probabilities_are_those_of_counting_every_possibility():
    rng = np.random.default_rng(5)
    n, k = 6, 2
    places = flight(n)[:, None] + rng.normal(0, 30, (n, k, 2))
    heights = rng.uniform(0.05, 0.95, (n, k))
    area = WH[1] / WH[0]

    def near(distance, deviation):
        gauss = np.exp(-0.5 * (distance**2).sum() / deviation**2) / (2 * np.pi * deviation**2)
        return (1 - STRAY) * area * gauss + STRAY

    def false_peaks(t, s):
        sum_ = 0.0
        for other in range(n):
            for j in range(k) if other != t else ():
                gauss = np.exp(-0.5 * ((x[t, s] - x[other, j]) ** 2).sum() / SPREAD**2) / (2 * np.pi * SPREAD**2)
                sum_ += (1 - heights[other, j]) * area * gauss
        return ANYWHERE + sum_ / (n - 1)

    weight = np.zeros((n, k + 1))
    x = places / WH[0]
    for states in itertools.product(range(k + 1), repeat=n):
        product = 1.0
        for t, s in enumerate(states):
            if t:
                product *= CHANGE if (s == k) != (states[t - 1] == k) else 1 - CHANGE
            if s == k:
                continue
            product *= ODDS * heights[t, s] / (1 - heights[t, s]) / false_peaks(t, s)
            before = states[t - 1] if t >= 1 else k
            earlier = states[t - 2] if t >= 2 else k
            if before < k and earlier < k:
                product *= near(x[t, s] - 2 * x[t - 1, before] + x[t - 2, earlier], 0.008)
            elif before < k:
                product *= near(x[t, s] - x[t - 1, before], 0.04)
            elif earlier < k:
                product *= near(x[t, s] - x[t - 2, earlier], 0.08)
        for t, s in enumerate(states):
            weight[t, s] += product
    weight /= weight.sum(axis=1, keepdims=True)
    peaks, confidence = choose(places, heights)
    assert peaks == weight[:, :k].argmax(axis=1).tolist()
    assert np.allclose(confidence, weight[:, :k].max(axis=1), atol=1e-9)


def test_one_frame_alone_and_two_by_hand():
    """With the numbers themselves: what a peak is worth, what a step is, and what a false peak nearby takes from it."""
    _, confidence = choose([[(300.0, 300.0)]], [[0.5]])
    assert confidence[0] == pytest.approx(0.45 / 1.45)
    step, heights = np.array([12.8, 6.4]), (0.6, 0.3)
    area, squared = 720 / 1280, (step**2).sum() / 1280**2

    def gauss(deviation):
        return area * np.exp(-squared / (2 * deviation**2)) / (2 * np.pi * deviation**2)

    odds = [0.45 * h / (1 - h) / (1 + (1 - other) * gauss(0.004)) for h, other in zip(heights, heights[::-1])]
    both = 0.9 * odds[0] * odds[1] * (0.98 * gauss(0.04) + 0.02)
    first, second, none = 0.1 * odds[0], 0.1 * odds[1], 0.9
    start = np.array([300.0, 300.0])
    _, confidence = choose([[start], [start + step]], [[heights[0]], [heights[1]]])
    total = both + first + second + none
    assert confidence.tolist() == pytest.approx([(both + first) / total, (both + second) / total], rel=1e-9)


@pytest.mark.parametrize("frame", [8, 30, 50])
@pytest.mark.parametrize("side", [-1, 1])
def test_false_peaks_are_counted_in_sixteen_frames_to_each_side(frame, side):
    """One low peak at the ball's place says that something stays there, up to 16 frames away."""

    def at(distance):
        rng = np.random.default_rng(0)
        places, heights = rng.uniform((700, 0), WH, (60, 1, 2)), np.full((60, 1), 1e-6)
        places[frame], heights[frame] = (200, 300), 0.9
        if distance is not None:
            places[frame + side * distance] = (200, 300)
        return choose(places, heights)[1][frame]

    if not 0 <= frame + side * 17 < 60:
        frame = 30
    alone = at(None)
    assert at(16) < 0.05 * alone and at(17) == pytest.approx(alone, rel=1e-3)


def test_choices_come_in_blocks_of_sixteen_once_forty_eight_frames_are_known():
    rng = np.random.default_rng(4)
    trajectory = Trajectory(WH)
    number = [len(trajectory.add(p, h)) for p, h in zip(rng.uniform((0, 0), WH, (100, 2, 2)), rng.random((100, 2)))]
    assert {i: n for i, n in enumerate(number) if n} == {47: 16, 63: 16, 79: 16, 95: 16}
    assert len(trajectory.finish()) == 36 and trajectory.finish() == []


def test_settling_in_blocks_gives_what_the_whole_clip_gives(monkeypatch):
    """A path is settled long before its block is: looking further ahead changes nothing that can be seen."""
    rng = np.random.default_rng(8)
    ball = np.concatenate([flight(30, bounce_at=12), flight(30)])
    places = np.stack([rng.uniform((0, 0), WH, (60, 2)), ball, rng.uniform((0, 0), WH, (60, 2))], axis=1)
    heights = rng.uniform(0.05, 0.9, (60, 3))
    peaks, confidence = choose(places, heights)
    monkeypatch.setattr("tracknet.tracking.trajectory.BLOCK", 1000)
    whole, sure = choose(places, heights)
    assert peaks == whole and np.abs(confidence - sure).max() < 1e-6


def test_sums_of_what_is_far_apart_in_size_are_exact():
    x = np.array([[0.0, 1.0], [-3000.0, -3001.0], [4000.0, 4000.0]])
    assert _logsumexp(x, 1) == pytest.approx([np.logaddexp(0, 1), -3000 + np.log1p(np.exp(-1)), 4000 + np.log(2)])
    assert _logsumexp(x, 0) == pytest.approx([4000, 4000])


@pytest.mark.parametrize("height", [0.0, 1.0])
def test_heights_at_the_ends_of_the_range_are_finite(height):
    _, confidence = choose(flight(5)[:, None], np.full((5, 1), height))
    assert np.isfinite(confidence).all() and ((confidence > 0.99) if height else (confidence < 0.01)).all()

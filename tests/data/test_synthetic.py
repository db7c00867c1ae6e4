"""Rallies are deterministic, labeled where the ball is, and never half written."""

import numpy as np
import pytest

from tracknet.data.layouts.tracknet import read_game
from tracknet.data.physics import simulate
from tracknet.data.rendering import draw_scene, render_frame
from tracknet.data.synthetic import SyntheticConfig, ensure_rallies
from tracknet.data.video import read_video
from tracknet.errors import UserError


def test_the_same_seed_renders_the_same(tmp_path):
    config = SyntheticConfig(games=1, frames_per_clip=5, size=(128, 72), seed=3)
    for name in ("a", "b"):
        ensure_rallies(tmp_path / name, config)
    assert (tmp_path / "a/game1/Clip1/Label.csv").read_text() == (tmp_path / "b/game1/Clip1/Label.csv").read_text()
    frames = [[f for _, f in read_video(tmp_path / name / "game1/Clip1/clip.mp4")] for name in ("a", "b")]
    assert np.array_equal(frames[0], frames[1])


def test_the_label_is_where_the_ball_was_drawn():
    """With and without the ball, the picture differs at the label and nowhere far from it."""
    checked = 0
    for game in range(8):
        scene = draw_scene((512, 288), np.random.default_rng(game))
        rally = simulate(30, np.random.default_rng(100 + game))
        without = rally._replace(ball=np.full_like(rally.ball, np.nan))
        for i in range(0, 30, 3):
            image, (visibility, x, y) = render_frame(scene, rally, i, np.random.default_rng(0))
            empty, (absent, *_) = render_frame(scene, without, i, np.random.default_rng(0))
            assert absent == 0
            if visibility != 1:
                continue
            difference = np.abs(image.astype(int) - empty.astype(int)).sum(axis=-1)
            ys, xs = np.nonzero(difference > 15)
            if len(xs):
                # The streak ends at the label: that is the nearest changed pixel, and the streak is short.
                distance = np.hypot(xs - x, ys - y)
                assert distance.min() < 1.5 and distance.max() < 60
                checked += 1
    assert checked > 40


def test_a_set_has_absent_balls_bounces_and_hits():
    rallies = [simulate(60, np.random.default_rng(i)) for i in range(20)]
    status = {s for r in rallies for s in r.status}
    assert status == {"", 0, 1, 2}


def test_a_folder_of_other_settings_is_refused_and_kept(tmp_path):
    config = SyntheticConfig(games=1, frames_per_clip=4, size=(64, 64))
    ensure_rallies(tmp_path / "r", config)
    with pytest.raises(UserError, match="other settings"):
        ensure_rallies(tmp_path / "r", SyntheticConfig(games=2, frames_per_clip=4, size=(64, 64)))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="other data"):
        ensure_rallies(tmp_path / "mine", config)
    assert read_game(tmp_path / "r", "game1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "r"]

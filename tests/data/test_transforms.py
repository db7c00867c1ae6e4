"""The ball moves with the picture, and a draw depends on nothing but its seed."""

import numpy as np
import pytest

from tracknet.data.transforms import AugmentConfig, augment

PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "blur": 0, "noise": 0}


def window(xy):
    """Three dark frames with a bright Gaussian ball at known places."""
    ys, xs = np.mgrid[0:72, 0:128]
    frames = [np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 8) * 255 for x, y in xy]
    return np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=-1)


def centre(frame):
    weight = np.maximum(frame[..., 0].astype(float) - 130, 0)  # brighter than the margin beside a smaller picture
    ys, xs = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]]
    return np.array([(xs * weight).sum(), (ys * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("crop", [None, (64, 40)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.8, 1.25)])
def test_the_label_follows_the_ball(crop, flip, scale):
    xy = np.array([[50.3, 30.0], [60.0, 35.7], [70.0, 40.0]])
    config = AugmentConfig(flip=flip, crop=crop, scale=scale, crop_on_ball=1.0, **PLAIN)
    checked = 0
    for seed in range(20):
        frames, moved, visible = augment(window(xy), xy.copy(), np.ones(3, bool), config, np.random.default_rng(seed))
        assert frames.shape[1:3] == (40, 64) if crop else frames.shape[1:3] == (72, 128)
        size = np.array([frames.shape[2], frames.shape[1]])
        for frame, at, there in zip(frames, moved, visible):
            assert there == bool((at >= -0.5).all() and (at <= size - 0.5).all())
            if there and (at > 10).all() and (at < size - 10).all():
                assert np.abs(centre(frame) - at).max() < 0.35
                checked += 1
    assert checked > 15


def test_a_crop_is_placed_on_a_ball():
    xy = np.array([[100.0, 50.0]] * 3)
    config = AugmentConfig(crop=(40, 32), crop_on_ball=1.0, **PLAIN)
    for seed in range(20):
        assert augment(window(xy), xy.copy(), np.ones(3, bool), config, np.random.default_rng(seed))[2].all()


def test_a_picture_made_smaller_shows_its_ball_once():
    """Whatever lies beside it is plain: a mirrored ball would be a ball without a label."""
    xy = np.array([[3.0, 35.0]] * 3)
    config = AugmentConfig(flip=0, scale=(0.7, 0.7), **PLAIN)
    for seed in range(10):
        frames, moved, _ = augment(window(xy), xy.copy(), np.ones(3, bool), config, np.random.default_rng(seed))
        ys, xs = np.nonzero(frames[0][..., 0] > 180)
        assert np.hypot(xs - moved[0, 0], ys - moved[0, 1]).max() < 4


def test_the_same_seed_draws_the_same_and_frames_share_a_draw():
    frames = np.repeat(window([(50, 30)]), 3, axis=0)
    config = AugmentConfig(noise=0)
    runs = [augment(frames, np.zeros((3, 2)), np.zeros(3, bool), config, np.random.default_rng(5))[0] for _ in range(2)]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0][0], runs[0][2])
    other = augment(frames, np.zeros((3, 2)), np.zeros(3, bool), config, np.random.default_rng(6))[0]
    assert not np.array_equal(runs[0], other)

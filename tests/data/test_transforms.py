"""The ball moves with the picture, and a draw depends on nothing but its seed."""

import numpy as np
import pytest
import torch

from tracknet.data.transforms import AugmentConfig, change_pictures, draw

PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "blur": 0, "noise": 0}


def window(xy):
    """Three dark frames with a bright Gaussian ball at known places."""
    ys, xs = np.mgrid[0:72, 0:128]
    frames = [np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 8) * 255 for x, y in xy]
    return np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=-1)


def augment(frames, xy, visible, config, rng):
    """Draw and change one window, as loading and training do between them; frames ``[frame, h, w, 3]``."""
    xy, visible, drawn = draw(xy, visible, (frames.shape[2], frames.shape[1]), config, rng)
    batch = {"frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))[None]}
    batch |= {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
    changed = change_pictures(batch, config.crop)
    assert set(changed) == {"frames"} and changed["frames"].dtype == torch.uint8
    return changed["frames"][0].permute(0, 2, 3, 1).numpy(), xy, visible


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


def test_colours_change_as_drawn():
    """Against the definitions: saturation is a mixture with luma, contrast a gain about grey, brightness an offset."""
    frames = np.full((1, 16, 16, 3), (90, 120, 140), np.uint8)
    config = AugmentConfig(flip=0, scale=(1, 1), brightness=0.1, contrast=0.2, saturation=0.3, blur=0, noise=0)
    changed, _, _ = augment(frames, np.zeros((1, 2)), np.zeros(1, bool), config, np.random.default_rng(3))
    matrix = draw(np.zeros((1, 2)), np.zeros(1, bool), (16, 16), config, np.random.default_rng(3))[2]["colour"]
    assert np.abs(changed[0, 5, 5] - (matrix @ [90, 120, 140, 1])).max() <= 0.5
    grey = matrix[:, :3] @ np.full(3, 128) + matrix[:, 3]
    assert np.ptp(grey) < 1e-3 and abs(grey[0] - 128) <= 0.1 * 255


def test_blur_and_noise_have_the_drawn_size():
    flat = np.full((2, 64, 64, 3), 128, np.uint8)
    config = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=0, noise=0.05)
    for seed in range(3):
        drawn = draw(np.zeros((2, 2)), np.zeros(2, bool), (64, 64), config, np.random.default_rng(seed))[2]
        noisy, _, _ = augment(flat, np.zeros((2, 2)), np.zeros(2, bool), config, np.random.default_rng(seed))
        assert noisy[..., 0].astype(float).std() == pytest.approx(np.hypot(drawn["noise"], 0.29), rel=0.1)
        assert not np.array_equal(noisy[0], noisy[1]) and np.array_equal(noisy[..., 0], noisy[..., 2])
    spot = flat.copy() * 0
    spot[:, 32, 32] = 255
    config = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=1, noise=0)
    blurred, _, _ = augment(spot, np.zeros((2, 2)), np.zeros(2, bool), config, np.random.default_rng(1))
    assert 30 < blurred[0, 32, 32, 0] < 250 and abs(int(blurred[0, ..., 0].sum()) - 255) < 30


@pytest.mark.gpu
def test_a_gpu_changes_pictures_as_the_cpu_does():
    config = AugmentConfig(crop=(64, 40), noise=0, blur=1)
    _xy, _visible, drawn = draw(np.full((3, 2), 30.0), np.ones(3, bool), (128, 72), config, np.random.default_rng(0))
    frames = torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8)
    drawn = {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
    cpu, gpu = (
        change_pictures({"frames": frames.to(d), **drawn}, config.crop)["frames"].cpu() for d in ("cpu", "cuda")
    )
    assert (cpu.int() - gpu.int()).abs().max() <= 1

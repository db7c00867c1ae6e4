"""The ball moves with the picture, and a draw depends on nothing but its seed."""

import numpy as np
import pytest
import torch

from tracknet.data.transforms import MARGIN_RGB, SAMPLED, AugmentConfig, apply_augmentation, sample_augmentation
from tracknet.errors import UserError
from tracknet.models.pretrained import IMAGENET_MEAN

PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "blur": 0, "noise": 0}


def window(xy):
    """Three dark frames with a bright Gaussian ball at known places."""
    ys, xs = np.mgrid[0:72, 0:128]
    frames = [np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 8) * 255 for x, y in xy]
    return np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=-1)


def augment(frames, xy, visible, config, rng):
    """Draw and change one window, as loading and training do between them; frames ``[frame, h, w, 3]``."""
    xy, visible, drawn = sample_augmentation(xy, visible, (frames.shape[2], frames.shape[1]), config, rng)
    batch = {"frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))[None]}
    batch |= {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
    changed = apply_augmentation(batch, config.crop)
    assert set(changed) == {"frames"} and changed["frames"].dtype == torch.uint8
    return changed["frames"][0].permute(0, 2, 3, 1).numpy(), xy, visible


def center(frame):
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
                assert np.abs(center(frame) - at).max() < 0.35
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


def test_colors_change_as_drawn():
    """Against the definitions: saturation is a mixture with luma, contrast a gain about gray, brightness an offset."""
    frames = np.full((1, 16, 16, 3), (90, 120, 140), np.uint8)
    config = AugmentConfig(flip=0, scale=(1, 1), brightness=0.1, contrast=0.2, saturation=0.3, blur=0, noise=0)
    changed, _, _ = augment(frames, np.zeros((1, 2)), np.zeros(1, bool), config, np.random.default_rng(3))
    matrix = sample_augmentation(np.zeros((1, 2)), np.zeros(1, bool), (16, 16), config, np.random.default_rng(3))[2][
        "color"
    ]
    assert np.abs(changed[0, 5, 5] - (matrix @ [90, 120, 140, 1])).max() <= 0.5
    gray = matrix[:, :3] @ np.full(3, 128) + matrix[:, 3]
    assert np.ptp(gray) < 1e-3 and abs(gray[0] - 128) <= 0.1 * 255


def test_blur_and_noise_have_the_drawn_size():
    flat = np.full((2, 64, 64, 3), 128, np.uint8)
    config = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=0, noise=0.05)
    for seed in range(3):
        drawn = sample_augmentation(np.zeros((2, 2)), np.zeros(2, bool), (64, 64), config, np.random.default_rng(seed))[
            2
        ]
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
    _xy, _visible, drawn = sample_augmentation(
        np.full((3, 2), 30.0), np.ones(3, bool), (128, 72), config, np.random.default_rng(0)
    )
    frames = torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8)
    drawn = {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
    cpu, gpu = (
        apply_augmentation({"frames": frames.to(d), **drawn}, config.crop)["frames"].cpu() for d in ("cpu", "cuda")
    )
    assert (cpu.int() - gpu.int()).abs().max() <= 1


def pictures(frames, **draws):
    """Change one window by draws that are given; frames ``[frame, 3, h, w]``."""
    draws = {"affine": np.eye(2, 3), "color": np.eye(3, 4), "blur": 0.0, "noise": 0.0, "noise_seed": 0, **draws}
    batch = {name: torch.as_tensor(value)[None] for name, value in draws.items()}
    batch["affine"], batch["color"] = batch["affine"].float(), batch["color"].float()
    return apply_augmentation({"frames": frames[None], **batch}, None)["frames"][0]


@pytest.mark.parametrize("x", [0, 1, 40, 127])
def test_a_mirrored_ball_is_at_the_mirrored_pixel_exactly(x):
    frames = np.zeros((2, 72, 128, 3), np.uint8)
    frames[:, 30, x] = 255
    config = AugmentConfig(flip=1, scale=(1, 1), **PLAIN)
    changed, xy, visible = augment(
        frames, np.full((2, 2), (x, 30.0)), np.ones(2, bool), config, np.random.default_rng(0)
    )
    assert visible.all() and np.allclose(xy, (127 - x, 30), atol=1e-6)
    for frame in changed[..., 0]:
        assert np.argwhere(frame > 0).tolist() == [[30, 127 - x]] and frame[30, 127 - x] == 255


@pytest.mark.parametrize("flip", [0, 1])
def test_a_crop_on_the_ball_holds_it_anywhere_and_never_beside_it(flip):
    """Its places in the crop go from the first pixel to the last, mirrored or not."""
    config = AugmentConfig(flip=flip, scale=(1, 1), crop=(40, 32), crop_on_ball=1, **PLAIN)
    rng = np.random.default_rng(0)
    at = np.array(
        [
            sample_augmentation(np.array([[70.0, 33.0]]), np.ones(1, bool), (128, 72), config, rng)[0][0]
            for _ in range(1000)
        ]
    )
    assert (at > -1e-9).all() and (at < np.array([39, 31]) + 1e-9).all()
    assert (at.min(axis=0) < 0.5).all() and (at.max(axis=0) > np.array([38.5, 30.5])).all()
    assert np.abs(at.mean(axis=0) - (19.5, 15.5)).max() < 1.5


def test_a_crop_on_the_ball_takes_any_of_the_frames_that_show_one():
    xy = np.array([[5.0, 36.0], [64.0, 36.0], [120.0, 36.0], [30.0, 36.0]])
    visible = np.array([True, True, True, False])
    config = AugmentConfig(flip=0, scale=(1, 1), crop=(32, 32), crop_on_ball=1, **PLAIN)
    seen = np.array(
        [sample_augmentation(xy, visible, (128, 72), config, np.random.default_rng(seed))[1] for seed in range(300)]
    )
    assert (seen.sum(axis=1) == 1).all() and (seen.sum(axis=0)[:3] > 60).all()


def test_a_crop_stays_inside_of_the_picture():
    config = AugmentConfig(scale=(1, 1), crop=(64, 40), crop_on_ball=0.5, **PLAIN)
    frames = np.full((1, 72, 128, 3), 255, np.uint8)
    corner = np.array([[1.0, 1.0]])
    for seed in range(30):
        changed, _, _ = augment(frames, corner.copy(), np.ones(1, bool), config, np.random.default_rng(seed))
        assert (changed == 255).all()


@pytest.mark.parametrize(("crop_on_ball", "least", "most"), [(0.0, 0, 0.4), (0.5, 0.5, 0.75), (1.0, 1, 1)])
def test_a_crop_is_placed_on_the_ball_as_often_as_configured(crop_on_ball, least, most):
    config = AugmentConfig(scale=(1, 1), crop=(32, 32), crop_on_ball=crop_on_ball, **PLAIN)
    xy, one = np.array([[64.0, 36.0]]), np.ones(1, bool)
    seen = np.mean(
        [sample_augmentation(xy, one, (128, 72), config, np.random.default_rng(s))[1][0] for s in range(400)]
    )
    assert least <= seen <= most


def test_noise_is_drawn_by_its_seed_alone():
    frames = torch.full((2, 3, 24, 32), 128, dtype=torch.uint8)
    noisy = []
    for seed, of_torch in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(of_torch)
        noisy.append(pictures(frames, noise=8.0, noise_seed=seed))
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    before = torch.random.get_rng_state()
    pictures(frames, noise=8.0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds_of_noise_differ_from_window_to_window():
    config, rng = AugmentConfig(), np.random.default_rng(0)
    drawn = [sample_augmentation(np.zeros((1, 2)), np.ones(1, bool), (64, 64), config, rng)[2] for _ in range(50)]
    seeds = [int(d["noise_seed"]) for d in drawn]
    assert len(set(seeds)) == 50 and max(seeds) > 2**61


def test_noise_below_half_a_gray_level_is_none():
    frames = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(pictures(frames, noise=0.5), frames)
    assert not torch.equal(pictures(frames, noise=0.6), frames)


def test_colors_mix_as_the_matrix_says_and_stay_within_their_range():
    frames = torch.tensor([10.0, 100.0, 250.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8).to(torch.uint8)
    color = np.array([[0, 1.0, 0, 5], [0.5, 0, 0.5, 0.4], [0, 0, 2, 0]])
    assert pictures(frames, color=color)[0, :, 4, 4].tolist() == [105, 130, 255]
    assert pictures(frames, color=-color)[0, :, 4, 4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_blur_is_a_gaussian_of_its_size_and_does_not_darken_the_border(sigma):
    frames = torch.zeros(1, 3, 21, 31, dtype=torch.uint8)
    frames[..., 10, 12] = 255
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    wanted = np.zeros((21, 31))
    wanted[7:14, 9:16] = 255 * np.outer(taps, taps) / taps.sum() ** 2
    blurred = pictures(frames, blur=sigma)
    assert np.abs(blurred[0].numpy() - wanted).max() <= 0.5
    flat = torch.full((2, 3, 9, 9), 200, dtype=torch.uint8)
    assert torch.equal(pictures(flat, blur=sigma), flat)


def test_blur_comes_as_often_and_is_as_wide_as_configured():
    config, rng = AugmentConfig(blur=0.25), np.random.default_rng(0)
    drawn = [sample_augmentation(np.zeros((1, 2)), np.ones(1, bool), (64, 64), config, rng)[2] for _ in range(2000)]
    blur, noise = (np.array([d[name] for d in drawn]) for name in ("blur", "noise"))
    assert 0.22 < (blur > 0).mean() < 0.28
    assert 0.3 <= blur[blur > 0].min() < 0.31 and 0.99 < blur.max() <= 1
    assert 0 <= noise.min() < 0.02 and 5.0 < noise.max() <= 0.02 * 255


def test_zooms_are_spread_over_their_range_and_flips_are_as_frequent_as_configured():
    config, rng = AugmentConfig(flip=0.25, scale=(0.5, 2)), np.random.default_rng(0)
    affine = [
        sample_augmentation(np.zeros((1, 2)), np.ones(1, bool), (64, 64), config, rng)[2]["affine"] for _ in range(2000)
    ]
    zoom = np.array([a[1, 1] for a in affine])
    assert 0.5 <= zoom.min() < 0.51 and 1.97 < zoom.max() <= 2
    assert 0.46 < (zoom < 1).mean() < 0.54  # as often smaller as larger
    assert 0.22 < np.mean([a[0, 0] < 0 for a in affine]) < 0.28
    assert all(abs(a[0, 0]) == a[1, 1] and a[0, 1] == a[1, 0] == 0 for a in affine)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2, 2)])
def test_a_zoomed_picture_is_placed_anywhere_and_nowhere_else(scale):
    """Smaller than its frame it lies wholly in it, larger it covers it; either way up to the border."""
    config, rng = AugmentConfig(flip=0.5, scale=scale, **PLAIN), np.random.default_rng(0)
    corners = np.array([[-0.5, -0.5], [127.5, 71.5]])
    moved = np.array(
        [np.sort(sample_augmentation(corners, np.ones(2, bool), (128, 72), config, rng)[0], axis=0) for _ in range(500)]
    )
    first, last = moved[:, 0], moved[:, 1]
    assert np.allclose(last - first, np.array([128, 72]) * scale[0])
    inner, outer = (first, last) if scale[0] < 1 else (last - np.array([128, 72]), first + np.array([128, 72]))
    assert (inner > -0.5 - 1e-6).all() and (inner.min(axis=0) < 0.5).all()
    assert (outer < np.array([127.5, 71.5]) + 1e-6).all() and (outer.max(axis=0) > (126.5, 70.5)).all()


def test_colors_are_drawn_over_the_whole_range_and_not_beyond():
    rng = np.random.default_rng(0)
    only = {"flip": 0, "scale": (1, 1), "brightness": 0, "contrast": 0, "saturation": 0, "blur": 0, "noise": 0}

    def matrices(**change):
        config = AugmentConfig(**{**only, **change})
        return np.array(
            [
                sample_augmentation(np.zeros((1, 2)), np.ones(1, bool), (8, 8), config, rng)[2]["color"]
                for _ in range(500)
            ]
        )

    brightness = matrices(brightness=0.2)
    assert np.allclose(brightness[:, :, :3], np.eye(3)) and np.ptp(brightness[:, :, 3], axis=1).max() == 0
    assert -51 <= brightness[:, 0, 3].min() < -50 and 50 < brightness[:, 0, 3].max() <= 51
    contrast = matrices(contrast=0.3)
    gain = contrast[:, 0, 0]
    assert np.allclose(contrast[:, :, :3], gain[:, None, None] * np.eye(3)) and np.allclose(
        contrast[:, :, 3], 128 * (1 - gain)[:, None], atol=1e-4
    )
    assert 0.7 <= gain.min() < 0.71 and 1.29 < gain.max() <= 1.3
    saturation = matrices(saturation=0.4)
    share = (saturation[:, 0, 0] - 0.299) / (1 - 0.299)
    luma = np.array([0.299, 0.587, 0.114])
    wanted = share[:, None, None] * np.eye(3) + (1 - share)[:, None, None] * luma
    assert np.allclose(saturation[:, :, :3], wanted, atol=1e-5) and (saturation[:, :, 3] == 0).all()
    assert 0.6 - 1e-6 < share.min() < 0.61 and 1.39 < share.max() < 1.4 + 1e-6


def test_beside_a_smaller_picture_is_what_normalization_makes_zero():
    assert list(MARGIN_RGB) == [round(255 * mean) for mean in IMAGENET_MEAN]
    frames = torch.full((1, 3, 40, 64), 255, dtype=torch.uint8)
    changed = pictures(frames, affine=np.array([[0.5, 0, 10], [0, 0.5, 8]]))
    assert changed[0, :, 2, 2].tolist() == list(MARGIN_RGB) == changed[0, :, 30, 60].tolist()
    assert (changed[0, :, 8:27, 10:41] == 255).all() and (changed[0, 0] == 255).sum() == 20 * 32


def test_a_window_without_draws_is_returned_as_it_is():
    batch = {"frames": torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)}
    assert apply_augmentation(batch, (32, 32)) is batch


def test_a_ball_is_visible_up_to_the_outer_edge_of_the_last_pixel_and_one_that_was_not_there_stays_away():
    config = AugmentConfig(flip=0, scale=(1, 1), **PLAIN)
    xy = np.array([[-0.5, -0.5], [63.5, 39.5], [-0.6, 5], [5, -0.6], [63.6, 5], [5, 39.6], [5, 5]])
    there = np.array([True] * 6 + [False])
    _, visible, _ = sample_augmentation(xy, there, (64, 40), config, np.random.default_rng(0))
    assert visible.tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flip": 1.01}, "flip is a probability"),
        ({"flip": -0.01}, "flip is a probability"),
        ({"crop_on_ball": 1.5}, "crop_on_ball is a probability"),
        ({"blur": 2}, "blur is a probability"),
        ({"brightness": 1.01}, "brightness is a fraction"),
        ({"contrast": -0.1}, "contrast is a fraction"),
        ({"saturation": 2}, "saturation is a fraction"),
        ({"noise": 20}, "noise is a fraction"),
        ({"scale": (0, 1)}, "zoom above 0"),
        ({"scale": (1.2, 1.1)}, "zoom above 0"),
        ({"scale": (1, 100)}, "zoom above 0"),
        ({"crop": (24, 32)}, r"nearest is \[32, 32\]"),
        ({"crop": (32, 45)}, r"nearest is \[32, 48\]"),
        ({"crop": (101, 64)}, r"nearest is \[104, 64\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        AugmentConfig(**settings)


def test_the_ends_of_each_range_are_allowed():
    for value in (0, 1):
        AugmentConfig(
            flip=value, crop_on_ball=value, blur=value, brightness=value, contrast=value, saturation=value, noise=value
        )
    AugmentConfig(crop=(32, 32), scale=(0.01, 99.9))
    AugmentConfig(scale=(1, 1))


@pytest.mark.parametrize(
    "change",
    [{"crop": (32, 32)}, {"scale": (0.9, 1)}, {"scale": (1, 1.1)}, *({name: 0.1} for name in PLAIN)],
)
def test_only_flips_means_that_nothing_else_changes(change):
    flips = {"flip": 1.0, "scale": (1, 1), **PLAIN}
    assert AugmentConfig(**flips).only_flips and not AugmentConfig(**{**flips, **change}).only_flips
    assert AugmentConfig(**{**flips, **change}, enabled=False).only_flips


def test_what_is_drawn_is_float32_as_the_pictures_are():
    drawn = sample_augmentation(
        np.zeros((1, 2)), np.ones(1, bool), (64, 64), AugmentConfig(), np.random.default_rng(0)
    )[2]
    assert tuple(drawn) == SAMPLED
    assert {name: value.dtype for name, value in drawn.items() if name != "noise_seed"} == dict.fromkeys(
        SAMPLED[:4], np.float32
    )

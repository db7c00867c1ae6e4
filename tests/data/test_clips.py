"""Windows, weights and splits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY_DATA
from tracknet.config import compose
from tracknet.data.clips import WindowDataset, describe, window_indices
from tracknet.data.splits import read_split
from tracknet.data.transforms import DRAWN
from tracknet.errors import UserError
from tracknet.labels import BallLabel, Clip, Visibility, target_of


def data_config(rallies, *overrides):
    return compose("synthetic", "vit_tiny_heatmap", "default", [*TINY_DATA, f"data.root={rallies}", *overrides]).data


@pytest.mark.parametrize(
    ("num_frames", "length", "stride"), [(10, 3, 3), (10, 3, 1), (3, 3, 3), (2, 3, 3), (1, 3, 1), (9, 4, 4)]
)
def test_windows_cover_every_frame_and_stay_inside(num_frames, length, stride):
    windows = window_indices(num_frames, length, stride)
    assert {i for w in windows for i in w} == set(range(num_frames))
    assert all(len(w) == length for w in windows)
    if num_frames >= length:
        assert all(w == list(range(w[0], w[0] + length)) for w in windows)


def test_what_a_label_is_worth():
    ball, hidden, none = (
        BallLabel(Visibility.HARD, (1, 1)),
        BallLabel(Visibility.OCCLUDED, (1, 1)),
        BallLabel(Visibility.ABSENT, None),
    )
    assert target_of(ball, "ignore") == (1.0, True)
    assert target_of(none, "ignore") == (1.0, False)  # no ball: a zero target at full weight
    assert target_of(None, "ignore") == (0.0, False)  # unlabelled: says nothing
    assert [target_of(hidden, o) for o in ("ignore", "absent", "visible")] == [(0.0, False), (1.0, False), (1.0, True)]


def test_a_window_is_uint8_with_positions_in_its_own_pixels(rallies, tmp_path):
    config = data_config(
        rallies, "data.preprocess.resize=[64,40]", f"data.cache_dir={tmp_path}", "data.augment.enabled=false"
    )
    clips = read_split(config, "train")
    dataset = WindowDataset(clips, config, training=True)
    item = dataset[0]
    assert item["frames"].dtype == torch.uint8 and item["frames"].shape == (3, 3, 40, 64)
    for t, i in enumerate(item["index"].tolist()):
        label = clips[item["clip"]].labels[i]
        if item["visible"][t]:
            expected = (np.array(label.xy_image) + 0.5) * np.array([64 / 128, 40 / 72]) - 0.5
            assert np.allclose(item["xy"][t].numpy(), expected, atol=1e-5)


def test_augmentation_depends_on_seed_and_epoch_only(rallies, tmp_path):
    config = data_config(rallies, f"data.cache_dir={tmp_path}")
    clips = read_split(config, "train")
    first, again = (WindowDataset(clips, config, training=True, seed=1) for _ in range(2))
    assert all(torch.equal(first[3][name], again[3][name]) for name in (*DRAWN, "frames", "xy"))
    again.epoch = 1
    assert not any(torch.equal(first[3][name], again[3][name]) for name in ("affine", "colour", "noise_seed"))


def test_without_the_cache_neighbours_come_together_and_none_twice(rallies, tmp_path):
    config = data_config(rallies, "data.cache=none")
    windows = WindowDataset(read_split(config, "train"), config, training=True)
    order = windows.epoch_order(0)
    assert sorted(order) == list(range(len(windows))) and order != windows.epoch_order(1)
    for item in order[:6]:
        cached = data_config(rallies, f"data.cache_dir={tmp_path}")
        assert torch.equal(windows[item]["frames"], WindowDataset(windows.clips, cached, training=True)[item]["frames"])


def test_validation_is_not_augmented_and_takes_each_frame_once(rallies, tmp_path):
    config = data_config(rallies, f"data.cache_dir={tmp_path}")
    dataset = WindowDataset(read_split(config, "val"), config, training=False)
    assert torch.equal(dataset[1]["frames"], dataset[1]["frames"])
    assert len(dataset) == 5  # 14 frames in windows of 3


def test_unlabelled_windows_are_left_out_of_training_and_said(tmp_path):
    config = compose("tracknet", "vit_tiny_heatmap", "default", ["data.cache=none"]).data
    labels = {8: BallLabel(Visibility.EASY, (3.0, 3.0)), 9: BallLabel(Visibility.OCCLUDED, (3.0, 3.0))}
    clip = Clip("g/c", "g", tuple(Path(f"{i}.jpg") for i in range(10)), None, 10, (64, 48), labels)
    assert len(WindowDataset([clip], config, training=True).windows) == 2
    line = describe([clip], "train", "ignore")
    assert "10 frames, 8 unlabelled, 1 occluded left out" in line


def test_an_empty_split_is_an_error(rallies):
    with pytest.raises(UserError, match="val_games is empty"):
        read_split(data_config(rallies, "data.split.val_games=[]"), "val")


def sparse(tmp_path, clips: int, every: int = 1, frames: int = 10) -> list[Clip]:
    ball = BallLabel(Visibility.EASY, (3.0, 3.0))
    return [
        Clip(
            f"g{c}",
            f"g{c}",
            tuple(Path(f"{i}.jpg") for i in range(frames)),
            None,
            frames,
            (64, 48),
            {i: ball for i in range(0, frames, every)},
        )
        for c in range(clips)
    ]


@pytest.mark.parametrize(("every", "limit"), [(1, 30), (1, 12), (5, 10), (5, 200)])
def test_labels_are_limited_in_number_and_spread(tmp_path, every, limit):
    config = compose("tracknet", "vit_tiny_heatmap", "default", ["data.cache=none", f"data.limit_labels={limit}"]).data
    clips = sparse(tmp_path, 12, every)
    windows = WindowDataset(clips, config, training=True).windows
    used = [(c, i) for c, indices in windows for i in indices]
    assert len(set(used)) == len(used)  # no frame in two windows
    labels = sum(i % every == 0 for _, i in used)
    assert labels == min(limit, 12 * 9 if every == 1 else 12 * 2)
    if limit >= 12:
        assert len({c for c, _ in windows}) > 3


def test_limited_labels_leave_what_is_mixed_in(tmp_path):
    mix = "data.mix=[{layout: csv, root: m, weight: 2}]"
    config = compose("tracknet", "vit_tiny_heatmap", "default", ["data.cache=none", "data.limit_labels=9", mix]).data
    windows = WindowDataset(sparse(tmp_path, 4), config, training=True, mix=[sparse(tmp_path, 3)])
    assert windows.sources == [(3, 3), (24, 6)] and windows.windows_per_epoch == 9
    assert all(0 <= w < 27 for w in windows.epoch_order(0))
    with pytest.raises(UserError, match="takes none of its windows"):
        few = compose("tracknet", "vit_tiny_heatmap", "default", ["data.cache=none", mix.replace("2}", "0.001}")]).data
        WindowDataset(sparse(tmp_path, 1), few, training=True, mix=[sparse(tmp_path, 3)])


def test_what_happens_outside_of_a_crop_is_unknown(rallies, tmp_path):
    config = data_config(
        rallies, f"data.cache_dir={tmp_path}", "data.augment.crop=[32,32]", "data.augment.crop_on_ball=0"
    )
    windows = WindowDataset(read_split(config, "train"), config, training=True)
    lost = 0
    for item in (windows[i] for i in range(len(windows))):
        clip = windows.clips[item["clip"]]
        for event, visible, i in zip(item["event"].tolist(), item["visible"].tolist(), item["index"].tolist()):
            if clip.labels[i].xy_image is not None and not visible:
                assert event == -1
                lost += 1
    assert lost > 10

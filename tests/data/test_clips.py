"""Windows, weights and splits."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import TINY_DATA
from tracknet.config import compose
from tracknet.data.clips import RUN_LENGTH, RUNS_TOGETHER, WindowDataset, describe, num_workers, window_indices
from tracknet.data.features import CHUNK, CachedFeatures
from tracknet.data.labels import BallLabel, Clip, Event, Visibility, target_of
from tracknet.data.splits import read_split
from tracknet.data.transforms import SAMPLED
from tracknet.errors import UserError


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
    assert target_of(None, "ignore") == (0.0, False)  # unlabeled: says nothing
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
    assert all(torch.equal(first[3][name], again[3][name]) for name in (*SAMPLED, "frames", "xy"))
    again.epoch = 1
    assert not any(torch.equal(first[3][name], again[3][name]) for name in ("affine", "color", "noise_seed"))


def test_without_the_cache_neighbors_come_together_and_none_twice(rallies, tmp_path):
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


def test_unlabeled_windows_are_left_out_of_training_and_said(tmp_path):
    config = compose("tracknet", "vit_tiny_heatmap", "default", ["data.cache=none"]).data
    labels = {8: BallLabel(Visibility.EASY, (3.0, 3.0)), 9: BallLabel(Visibility.OCCLUDED, (3.0, 3.0))}
    clip = Clip("g/c", "g", tuple(Path(f"{i}.jpg") for i in range(10)), None, 10, (64, 48), labels)
    assert len(WindowDataset([clip], config, training=True).windows) == 2
    line = describe([clip], "train", "ignore")
    assert "10 frames, 8 unlabeled, 1 occluded left out" in line


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


def on_disk(folder, frames, labels, size_wh=(48, 32), name="g/c"):
    """A clip whose frame i is a picture of gray level i (of 256)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{i}.png" for i in range(frames))
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), np.full((size_wh[1], size_wh[0], 3), i % 256, np.uint8))
    return Clip(name, name.split("/")[0], paths, None, frames, size_wh, labels)


def plain_config(tmp_path, *overrides):
    return compose(
        "tracknet",
        "vit_tiny_heatmap",
        "default",
        [
            "data.preprocess.resize=[48,32]",
            "data.cache=none",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.augment.enabled=false",
            *overrides,
        ],
    ).data


EASY = BallLabel(Visibility.EASY, (3.0, 3.0), Event.HIT)
GONE = BallLabel(Visibility.ABSENT, None)


def test_a_clip_shorter_than_a_window_repeats_its_last_frame_which_counts_once(tmp_path):
    clip = on_disk(tmp_path, 2, {0: EASY, 1: EASY})
    windows = WindowDataset([clip], plain_config(tmp_path), training=True)
    item = windows[0]
    assert len(windows) == 1 and item["index"].tolist() == [0, 1, 1]
    assert item["frames"][:, 0, 0, 0].tolist() == [0, 1, 1]
    assert item["weight"].tolist() == [1, 1, 0] and item["event"].tolist() == [1, 1, -1]


@pytest.mark.parametrize(("limit", "taken"), [(3, 1), (4, 2), (5, 2)])
def test_repeated_frames_count_once_among_limited_labels(tmp_path, limit, taken):
    clips = sparse(tmp_path, 2, frames=2)
    config = plain_config(tmp_path, f"data.limit_labels={limit}")
    assert len(WindowDataset(clips, config, training=True).windows) == taken


def test_frames_without_a_ball_are_labels_too(tmp_path):
    clip = Clip("g/c", "g", tuple(Path(f"{i}.jpg") for i in range(9)), None, 9, (48, 32), dict.fromkeys(range(9), GONE))
    for limit, taken in ((9, 3), (6, 2), (3, 1)):
        config = plain_config(tmp_path, f"data.limit_labels={limit}")
        assert len(WindowDataset([clip], config, training=True).windows) == taken
    assert len(WindowDataset([clip], plain_config(tmp_path), training=True).windows) == 7


@pytest.mark.parametrize(("frames", "windows"), [(9, 3), (10, 3), (11, 3), (12, 4), (2, 1)])
def test_with_limited_labels_no_frame_is_in_two_windows(tmp_path, frames, windows):
    """A last window that was moved back takes the place of the one that it overlaps."""
    config = plain_config(tmp_path, "data.limit_labels=1000")
    found = WindowDataset(sparse(tmp_path, 2, frames=frames), config, training=True).windows
    assert len(found) == 2 * windows and {c for c, _ in found} == {0, 1}
    used = [(c, i) for c, indices in found for i in set(indices)]
    assert len(used) == len(set(used))


def test_frames_that_say_nothing_or_show_no_ball_have_no_place(tmp_path):
    hidden = BallLabel(Visibility.OCCLUDED, (5.0, 5.0), Event.FLYING)
    clip = on_disk(tmp_path, 4, {0: EASY, 1: GONE, 2: hidden})
    item = WindowDataset([clip], plain_config(tmp_path, "data.sequence.length=4"), training=True)[0]
    assert item["visible"].tolist() == [True, False, False, False] and item["weight"].tolist() == [1, 1, 0, 0]
    assert item["event"].tolist() == [1, -1, -1, -1]
    assert item["xy"].tolist() == [[3, 3], [0, 0], [0, 0], [0, 0]]
    seen = WindowDataset(
        [clip], plain_config(tmp_path, "data.sequence.length=4", "data.occluded=visible"), training=True
    )[0]
    assert seen["xy"][2].tolist() == [5, 5] and seen["event"].tolist() == [1, -1, 0, -1]


def test_an_item_has_the_types_that_training_expects(tmp_path):
    item = WindowDataset([on_disk(tmp_path, 3, {0: EASY})], plain_config(tmp_path), training=True)[0]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "frames": (torch.uint8, (3, 3, 32, 48)),
        "xy": (torch.float32, (3, 2)),
        "visible": (torch.bool, (3,)),
        "weight": (torch.float32, (3,)),
        "event": (torch.int64, (3,)),
        "clip": (torch.int64, ()),
        "index": (torch.int64, (3,)),
    }


@pytest.mark.parametrize("flip", [0, 1])
def test_features_are_those_of_the_windows_frames_mirrored_where_it_is(tmp_path, flip):
    clips = [on_disk(tmp_path / str(c), 70, {i: EASY for i in range(70)}, name=f"g/{c}") for c in range(2)]
    config = plain_config(
        tmp_path, "data.augment.enabled=true", f"data.augment.flip={flip}", "data.augment.scale=[1,1]"
    )
    windows = WindowDataset(clips, config, training=True)
    assert not any(name.startswith("features") for name in windows[0])
    files = [[tmp_path / f"{c}-{part}.safetensors" for part in range(2)] for c in range(2)]
    for c, parts in enumerate(files):
        for part, path in enumerate(parts):
            value = 100.0 * c + torch.arange(CHUNK * part, min(CHUNK * part + CHUNK, 70)).float()
            value = value[:, None, None, None].expand(-1, 2, 1, 1).contiguous()
            save_file({"plain.0": value, "flipped.0": -value, "plain.1": value + 0.5, "flipped.1": -value - 0.5}, path)
    windows.features = CachedFeatures(files)
    sign = -1 if flip else 1
    for number in (1, 63, 68 + 62):  # the second and third lie in both files of their clip
        item = windows[number]
        wanted = 100 * item["clip"] + item["index"]
        assert torch.equal(item["features.0"][:, 0, 0, 0], sign * wanted.float())
        assert torch.equal(item["features.1"][:, 1, 0, 0], sign * (wanted + 0.5))


def test_a_number_of_frames_is_decoded_for_a_window_and_no_others(tmp_path):
    clip = on_disk(tmp_path, 9, {i: EASY for i in range(9)})
    clip.frames[3].unlink()
    windows = WindowDataset([clip], plain_config(tmp_path), training=True)
    assert windows[0]["frames"][:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(UserError):
        windows[1]


def test_with_the_cache_each_window_is_shuffled_by_itself_and_without_it_in_runs(tmp_path):
    clip = on_disk(tmp_path, 402, {i: EASY for i in range(402)})
    neighbors = {}
    for cache in ("disk", "none"):
        windows = WindowDataset([clip], plain_config(tmp_path, f"data.cache={cache}"), training=True)
        order = windows.epoch_order(0)
        assert sorted(order) == list(range(400))
        together = [sorted(order[i : i + 128]) for i in range(0, 400, 128)]
        neighbors[cache] = np.mean([b == a + 1 for group in together for a, b in zip(group, group[1:])])
        if cache == "none":
            assert all(len({w // RUN_LENGTH for w in group}) == RUNS_TOGETHER for group in together[:3])
            steps = np.diff(order)
            assert (
                np.abs(steps) > RUN_LENGTH
            ).mean() > 0.7  # neighbors come around the same time, not one after another
    assert neighbors["disk"] < 0.5 and neighbors["none"] > 0.85


def test_an_epoch_takes_of_what_is_mixed_in_what_it_weighs_and_others_the_next_time(tmp_path):
    mix = "data.mix=[{layout: csv, root: m, weight: 0.5}, {layout: csv, root: n, weight: 3}]"
    config = plain_config(tmp_path, mix)
    mixed = [sparse(tmp_path, 10), sparse(tmp_path, 1, frames=4)]
    windows = WindowDataset(sparse(tmp_path, 2), config, training=True, mix=mixed)
    assert windows.sources == [(16, 16), (80, 8), (2, 48)] and windows.windows_per_epoch == 72
    assert {c for c, _ in windows.windows} == set(range(13)) and len(windows.clips) == 13
    epochs = [windows.epoch_order(seed) for seed in range(4)]
    for order in epochs:
        own, first, second = (np.array([w for w in order if a <= w < b]) for a, b in ((0, 16), (16, 96), (96, 98)))
        assert sorted(own) == list(range(16)) and len(set(first)) == len(first) == 8
        assert len(second) == 48 and (second == 96).sum() == 24
    assert len({w for order in epochs for w in order if 16 <= w < 96}) > 8


def test_windows_have_the_stride_of_training_or_of_scoring(tmp_path):
    clips = sparse(tmp_path, 1, frames=13)
    config = plain_config(tmp_path, "data.sequence.length=4", "data.sequence.stride=2")

    def starts(**how):
        return [indices[0] for _, indices in WindowDataset(clips, config, **how).windows]

    assert starts(training=True) == starts(training=True, stride=3) == [0, 2, 4, 6, 8, 9]
    assert starts(training=False) == [0, 4, 8, 9] and starts(training=False, stride=1) == list(range(10))


def test_scoring_keeps_windows_without_labels_and_training_needs_one(tmp_path):
    clip = Clip("g/c", "g", tuple(Path(f"{i}.jpg") for i in range(9)), None, 9, (48, 32), {})
    assert len(WindowDataset([clip], plain_config(tmp_path), training=False).windows) == 3
    with pytest.raises(UserError, match="no window has a labeled frame"):
        WindowDataset([clip], plain_config(tmp_path), training=True)


@pytest.mark.parametrize(("cores", "number"), [(64, 8), (9, 8), (4, 3), (1, 0), (None, 1)])
def test_a_gpu_is_fed_by_as_many_processes_as_there_are_cores_to_spare(tmp_path, monkeypatch, cores, number):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    config = plain_config(tmp_path)
    assert num_workers(config, torch.device("cuda")) == number and num_workers(config, torch.device("cpu")) == 0
    chosen = plain_config(tmp_path, "data.num_workers=3")
    assert num_workers(chosen, torch.device("cuda")) == 3 == num_workers(chosen, torch.device("cpu"))


def test_a_split_is_described_by_what_is_in_it(tmp_path):
    whole = sparse(tmp_path, 3)
    assert describe(whole, "train", "ignore") == "train: 3 clips of 3 games, 30 frames"
    assert describe([*whole, *whole], "val", "ignore") == "val: 6 clips of 3 games, 60 frames"
    assert (
        describe(sparse(tmp_path, 1, every=3), "test", "ignore") == "test: 1 clips of 1 games, 10 frames, 6 unlabeled"
    )

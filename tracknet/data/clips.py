"""Dataset of windows of consecutive frames, for training and scoring."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from tracknet.data.cache import ensure_cached
from tracknet.data.config import DataConfig
from tracknet.data.features import CachedFeatures
from tracknet.data.frames import CachedFrames, Frames, Kept, RecentFrames, open_frames
from tracknet.data.labels import Clip, target_of
from tracknet.data.transforms import sample_augmentation
from tracknet.errors import UserError
from tracknet.files import expand_user

# Order of windows without the cache: number of neighboring windows in a run, which are loaded around the same time, and
# number of runs that are shuffled together.
RUN_LENGTH, RUNS_TOGETHER = 8, 16


def window_indices(num_frames: int, length: int, stride: int) -> list[list[int]]:
    """Split a clip's frames into windows that cover every frame.

    The last window is moved back so that it ends with the clip. A clip shorter than a window repeats its last frame.

    Args:
        num_frames: number of frames in the clip.
        length: number of frames per window.
        stride: number of frames between the starts of two windows.

    Returns:
        Frame indices of each window, ``[window][length]``.
    """
    if num_frames <= length:
        return [[min(i, num_frames - 1) for i in range(length)]]
    starts = list(range(0, num_frames - length + 1, stride))
    if starts[-1] + length < num_frames:
        starts.append(num_frames - length)
    return [list(range(s, s + length)) for s in starts]


def open_clips(clips: list[Clip], config: DataConfig) -> list[Frames]:
    """Open the frames of each clip at the model's size.

    With ``data.cache=disk`` the frames come from the cache, which is filled first; otherwise they are decoded from the
    clip's images or video when they are read.
    """
    size_wh = config.preprocess.resize
    if config.cache == "disk":
        return [
            CachedFrames(path, size_wh)
            for path in ensure_cached(clips, size_wh, expand_user(config.cache_dir, "data.cache_dir"))
        ]
    # All clips share one bounded store of decoded frames. Seeking in a video is expensive, so a frame that is missing
    # there is decoded together with its neighbors.
    kept = Kept()
    frame_bytes = size_wh[0] * size_wh[1] * 3
    return [
        RecentFrames(open_frames(c, size_wh), c.num_frames, kept, frame_bytes, 1 if c.video is None else RUN_LENGTH)
        for c in clips
    ]


class WindowDataset(Dataset):
    """Windows of a list of clips.

    An item is a dict of tensors:

    - ``frames``: RGB frames at the model's size, uint8 ``[frame, 3, h, w]``.
    - ``xy``: ball positions in pixels of these frames, float32 ``[frame, 2]``; meaningless without
      a visible ball.
    - ``visible``: whether there is a ball to find, bool ``[frame]``.
    - ``weight``: 1 for frames to learn from and to score, 0 for the others, float32 ``[frame]``.
    - ``event``: event of each frame, int64 ``[frame]``: 0 flying, 1 hit, 2 bounce, -1 unknown.
    - ``clip`` and ``index``: clip number, int64 ``[]``, and frame indices within the clip, int64 ``[frame]``.

    Items of an augmented training set also contain the parameters that ``transforms.sample_augmentation`` draws and
    ``transforms.apply_augmentation`` applies. Their positions already refer to the augmented frames, whereas ``frames``
    are not augmented yet.

    Args:
        clips: clips of the dataset.
        config: data section of the configuration.
        training: whether to augment windows and to leave out windows without labels.
        seed: seed of the augmentation.
        stride: number of frames between the starts of two windows for scoring, by default the window length. Training
            uses ``data.sequence.stride``.
        mix: clips of each further dataset in ``config.mix``.

    Attributes:
        clips: clips that the windows are cut from, including those of further datasets.
        frames: random access to the frames of each clip at the model's size, uint8 ``[3, h, w]``.
        windows: clip number and frame indices of each window.
        sources: number of windows and number of windows per epoch of each dataset, in the order of ``windows``.
        epoch: number of the epoch, on which the augmentation depends.
        features: cached outputs of a frozen backbone, or ``None``. If set, items also contain ``features.0``,
            ``features.1`` and so on, ``[frame, c, h, w]``.

    Raises:
        UserError: if no window has a labeled frame, or ``config.mix`` takes no window of a further dataset.
    """

    def __init__(
        self,
        clips: list[Clip],
        config: DataConfig,
        *,
        training: bool,
        seed: int = 0,
        stride: int | None = None,
        mix: Sequence[list[Clip]] = (),
    ):
        self.clips = [*clips, *(clip for mix_clips in mix for clip in mix_clips)]
        self.config = config
        self.training = training
        self.augment = config.augment if training and config.augment.enabled else None
        self.seed = seed
        self.epoch = 0
        self.features: CachedFeatures | None = None
        self.frames = open_clips(self.clips, config)

        # Windows of the dataset itself. Limited labels are counted in windows that do not overlap.
        stride = config.sequence.stride if training else stride or config.sequence.length
        if training and config.limit_labels is not None:
            windows = self._limit_labels(
                self._cut_windows(range(len(clips)), config.sequence.length), config.limit_labels
            )
        else:
            windows = self._cut_windows(range(len(clips)), stride)
        if not windows:
            raise UserError("data: no window has a labeled frame.")
        self.windows = windows

        # Windows of further datasets. An epoch takes each window of the dataset itself once, and of each further
        # dataset as many windows as its weight asks for.
        self.sources = [(len(windows), len(windows))]
        first_clip = len(clips)
        for mix_config, mix_clips in zip(config.mix, mix):
            mix_windows = self._cut_windows(range(first_clip, first_clip + len(mix_clips)), stride)
            num_taken = round(mix_config.weight * len(windows))
            if not mix_windows or not num_taken:
                raise UserError(
                    f"data.mix: {mix_config.root} has no labeled frame."
                    if not mix_windows
                    else (
                        f"data.mix: weight={mix_config.weight} of {mix_config.root} "
                        f"takes none of its windows for {len(windows)} windows of the dataset itself. Set a larger"
                        " weight, or remove the dataset from data.mix."
                    )
                )
            self.windows = [*self.windows, *mix_windows]
            self.sources.append((len(mix_windows), num_taken))
            first_clip += len(mix_clips)

    def _cut_windows(self, clips: Iterable[int], stride: int) -> list[tuple[int, list[int]]]:
        """Cut clips into windows; training leaves out windows without a labeled frame."""
        return [
            (c, indices)
            for c in clips
            for indices in window_indices(self.clips[c].num_frames, self.config.sequence.length, stride)
            if not self.training or self._count_labels(c, indices)
        ]

    def _count_labels(self, clip: int, indices: list[int]) -> int:
        """Return the number of different frames of a window whose labels have a weight above 0."""
        return sum(target_of(self.clips[clip].labels.get(i), self.config.occluded)[0] > 0 for i in set(indices))

    def _limit_labels(self, windows: list[tuple[int, list[int]]], limit: int) -> list[tuple[int, list[int]]]:
        """Choose evenly spread windows, no two of which share a frame, with at most ``limit`` labeled frames in all."""
        # The last window of a clip may overlap the one before it, which is dropped then.
        disjoint = [
            w for w, after in zip(windows, [*windows[1:], (-1, [0])]) if w[0] != after[0] or w[1][-1] < after[1][0]
        ]
        total = sum(self._count_labels(*w) for w in disjoint)
        num_taken, chosen = 0, []
        for i, window in enumerate(disjoint):
            num_labels = self._count_labels(*window)
            # Take the window if the number of labels stays within the limit and does not run ahead of an even spread.
            if num_taken + num_labels <= min(limit, math.ceil(limit * (i + 1) / len(disjoint))) or total <= limit:
                chosen.append(window)
                num_taken += num_labels
        return chosen

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows in an epoch."""
        return sum(num_taken for _, num_taken in self.sources)

    def epoch_order(self, seed: int) -> list[int]:
        """Return the window numbers of an epoch in random order.

        Each window of the dataset itself comes once, windows of further datasets as often as their weights ask for.

        Without the cache, windows come in runs of ``RUN_LENGTH`` neighbors, and the windows of ``RUNS_TOGETHER`` runs
        are shuffled together. A batch then still shows many scenes, and a frame is decoded once for all windows of its
        run.
        """
        rng = np.random.default_rng(seed)
        length = 1 if self.config.cache == "disk" else RUN_LENGTH
        # Draw runs without replacement until the dataset's share is reached; once all are drawn, start over.
        runs: list[list[int]] = []
        first = 0
        for num_windows, num_taken in self.sources:
            while num_taken > 0:
                for start in rng.permutation(np.arange(first, first + num_windows, length)).tolist():
                    runs.append(list(range(start, min(start + length, first + num_windows)))[:num_taken])
                    num_taken -= len(runs[-1])
                    if not num_taken:
                        break
            first += num_windows
        # Shuffle the runs of all datasets, then the windows within each group of runs.
        runs = [runs[i] for i in rng.permutation(len(runs))]
        order: list[int] = []
        for i in range(0, len(runs), RUNS_TOGETHER):
            group = [w for run in runs[i : i + RUNS_TOGETHER] for w in run]
            order += rng.permutation(group).tolist()
        return order

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        clip_index, indices = self.windows[item]
        clip = self.clips[clip_index]
        frames = np.stack([self.frames[clip_index][i] for i in indices])

        # Targets of the frames as they are on disk.
        targets = [target_of(clip.labels.get(i), self.config.occluded) for i in indices]
        weight = np.array([t[0] for t in targets], dtype=np.float32)
        weight[1:][np.diff(indices) == 0] = 0  # a repeated frame of a short clip counts once
        visible = np.array([t[1] for t in targets])
        event = np.array(
            [
                -1 if label is None or label.event is None else int(label.event)
                for label in map(clip.labels.get, indices)
            ]
        )
        # From source pixels to pixels of the resized frames. Pixel centers are at integers, so the corner of the image,
        # about which resizing scales, is at -0.5.
        scale = np.array(self.config.preprocess.resize) / np.array(clip.size_wh)
        xy = np.array([clip.labels[i].xy_image if v else (0.0, 0.0) for i, v in zip(indices, visible)])
        xy = (xy + 0.5) * scale - 0.5

        # The generator depends on seed, epoch and window alone, so that the order of the data does not matter.
        sampled: dict[str, np.ndarray] = {}
        if self.augment is not None:
            rng = np.random.default_rng([self.seed, self.epoch, item])
            was_visible = visible
            xy, visible, sampled = sample_augmentation(xy, visible, self.config.preprocess.resize, self.augment, rng)
            event[was_visible & ~visible] = -1  # the event of a ball outside the crop cannot be seen
        flipped = bool(sampled and sampled["affine"][0, 0] < 0)
        return {
            "frames": torch.from_numpy(frames),
            "xy": torch.from_numpy(xy.astype(np.float32)),
            "visible": torch.from_numpy(visible),
            "weight": torch.from_numpy(weight),
            "event": torch.from_numpy(np.where(weight > 0, event, -1)),
            "clip": torch.tensor(clip_index),
            "index": torch.tensor(indices),
            **{name: torch.as_tensor(value) for name, value in sampled.items()},
            **(self.features.read(clip_index, indices, flipped) if self.features is not None else {}),
        }


def num_workers(config: DataConfig, device: torch.device) -> int:
    """Return the number of processes that load data for a model on this device."""
    if config.num_workers is not None:
        return config.num_workers
    return min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0


def describe(clips: list[Clip], split: str, occluded: str) -> str:
    """Return a one-line summary of a split: clips, games, frames, and frames without a target.

    Args:
        clips: clips of the split.
        split: name of the split.
        occluded: treatment of occluded balls, ``data.occluded``.
    """
    frames = sum(c.num_frames for c in clips)
    labeled = sum(len(c.labels) for c in clips)
    left_out = sum(target_of(label, occluded)[0] == 0 for c in clips for label in c.labels.values())
    line = f"{split}: {len(clips)} clips of {len({c.game for c in clips})} games, {frames} frames"
    if frames > labeled:
        line += f", {frames - labeled} unlabeled"
    if left_out:
        line += f", {left_out} occluded left out (data.occluded={occluded})"
    return line

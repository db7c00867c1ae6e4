"""From clips to windows to batches: what the model is trained on and scored on."""

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
from tracknet.data.frames import CachedFrames, Frames, Kept, RecentFrames, open_source
from tracknet.data.transforms import sample_augmentation
from tracknet.errors import UserError
from tracknet.files import expand_user
from tracknet.labels import Clip, target_of

# Without the cache: neighboring windows that are loaded around the same time, and how many such runs are mixed.
RUN_LENGTH, RUNS_TOGETHER = 8, 16


def window_indices(num_frames: int, length: int, stride: int) -> list[list[int]]:
    """Group a clip's frames into windows that cover every frame.

    The last window is moved back so that it ends with the clip; a clip shorter than a window repeats its last frame.

    Returns:
        Frame indices, ``length`` per window.
    """
    if num_frames <= length:
        return [[min(i, num_frames - 1) for i in range(length)]]
    starts = list(range(0, num_frames - length + 1, stride))
    if starts[-1] + length < num_frames:
        starts.append(num_frames - length)
    return [list(range(s, s + length)) for s in starts]


def open_frames(clips: list[Clip], config: DataConfig) -> list[Frames]:
    """Open each clip's frames at the model's size: in the cache, which is filled first, or at their source."""
    size_wh = config.preprocess.resize
    if config.cache == "disk":
        return [
            CachedFrames(path, size_wh)
            for path in ensure_cached(clips, size_wh, expand_user(config.cache_dir, "data.cache_dir"))
        ]
    kept = Kept()
    frame_bytes = size_wh[0] * size_wh[1] * 3
    return [
        RecentFrames(open_source(c, size_wh), c.num_frames, kept, frame_bytes, 1 if c.video is None else RUN_LENGTH)
        for c in clips
    ]


class WindowDataset(Dataset):
    """Windows of a list of clips.

    An item is a dict: ``frames`` uint8 ``[frame, 3, h, w]``; ``xy`` float32 ``[frame, 2]`` in pixels of these frames;
    ``visible`` bool ``[frame]``; ``weight`` float32 ``[frame]``; ``event`` ``[frame]`` (0 flying, 1 hit, 2 bounce, -1
    unknown); ``clip`` and ``index`` (``[frame]``) say which frames. Training windows also have what
    ``transforms.sample_augmentation`` drew and ``apply_augmentation`` applies; their positions are those in the
    augmented pictures.

    Attributes:
        clips: what the windows are cut from.
        frames: random access to each clip's frames at the model's size, ``[3, h, w]``.
        windows: clip number and frame indices.
        features: what a frozen backbone makes of the frames, where it is kept; then an item has ``features.0`` and so
            on, ``[frame, c, h, w]``.
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
        self.clips = [*clips, *(clip for others in mix for clip in others)]
        self.config = config
        self.training = training
        self.augment = config.augment if training and config.augment.enabled else None
        self.seed = seed
        self.epoch = 0
        self.features: CachedFeatures | None = None
        self.frames = open_frames(self.clips, config)
        stride = config.sequence.stride if training else stride or config.sequence.length
        if training and config.limit_labels is not None:
            own = self._limit(self._windows(range(len(clips)), config.sequence.length), config.limit_labels)
        else:
            own = self._windows(range(len(clips)), stride)
        if not own:
            raise UserError("data: no window has a labeled frame.")
        self.windows = own
        # How many windows of each dataset an epoch takes: its own all once, of the others what their weight says.
        self.sources = [(len(own), len(own))]
        first = len(clips)
        for other, of_other in zip(config.mix, mix):
            windows = self._windows(range(first, first + len(of_other)), stride)
            taken = round(other.weight * len(own))
            if not windows or not taken:
                raise UserError(
                    f"data.mix: {other.root} has no labeled frame."
                    if not windows
                    else (
                        f"data.mix: weight={other.weight} of {other.root} "
                        f"takes none of its windows beside {len(own)}; raise it, or leave the dataset out."
                    )
                )
            self.windows = [*self.windows, *windows]
            self.sources.append((len(windows), taken))
            first += len(of_other)

    def _windows(self, clips: Iterable[int], stride: int) -> list[tuple[int, list[int]]]:
        """Cut clips into windows; while training, one of which nothing is labeled teaches nothing."""
        return [
            (c, indices)
            for c in clips
            for indices in window_indices(self.clips[c].num_frames, self.config.sequence.length, stride)
            if not self.training or self._num_labels(c, indices)
        ]

    def _num_labels(self, clip: int, indices: list[int]) -> int:
        return sum(target_of(self.clips[clip].labels.get(i), self.config.occluded)[0] > 0 for i in set(indices))

    def _limit(self, windows: list[tuple[int, list[int]]], number: int) -> list[tuple[int, list[int]]]:
        """Take windows spread evenly until they have so many labeled frames; no two share a frame."""
        apart = [
            w for w, after in zip(windows, [*windows[1:], (-1, [0])]) if w[0] != after[0] or w[1][-1] < after[1][0]
        ]
        total = sum(self._num_labels(*w) for w in apart)
        taken, chosen = 0, []
        for i, window in enumerate(apart):
            labels = self._num_labels(*window)
            # On the even course so far, and not beyond the number.
            if taken + labels <= min(number, math.ceil(number * (i + 1) / len(apart))) or total <= number:
                chosen.append(window)
                taken += labels
        return chosen

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch takes."""
        return sum(taken for _, taken in self.sources)

    def epoch_order(self, seed: int) -> list[int]:
        """Return the windows of an epoch in random order: each of the dataset's own once, of mixed ones as many as they
        weigh.

        Without the cache, windows come in runs of neighbors, of which sixteen at a time are shuffled together: a batch
        still shows many places, and a frame is decoded once for all the windows of its run.
        """
        rng = np.random.default_rng(seed)
        length = 1 if self.config.cache == "disk" else RUN_LENGTH
        runs: list[list[int]] = []
        first = 0
        for number, taken in self.sources:
            while taken > 0:
                for start in rng.permutation(np.arange(first, first + number, length)).tolist():
                    runs.append(list(range(start, min(start + length, first + number)))[:taken])
                    taken -= len(runs[-1])
                    if not taken:
                        break
            first += number
        runs = [runs[i] for i in rng.permutation(len(runs))]
        order: list[int] = []
        for i in range(0, len(runs), RUNS_TOGETHER):
            together = [w for run in runs[i : i + RUNS_TOGETHER] for w in run]
            order += rng.permutation(together).tolist()
        return order

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        clip_index, indices = self.windows[item]
        clip = self.clips[clip_index]
        frames = np.stack([self.frames[clip_index][i] for i in indices])
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
        scale = np.array(self.config.preprocess.resize) / np.array(clip.size_wh)
        xy = np.array([clip.labels[i].xy_image if v else (0.0, 0.0) for i, v in zip(indices, visible)])
        xy = (xy + 0.5) * scale - 0.5
        sampled: dict[str, np.ndarray] = {}
        if self.augment is not None:
            rng = np.random.default_rng([self.seed, self.epoch, item])
            there = visible
            xy, visible, sampled = sample_augmentation(xy, visible, self.config.preprocess.resize, self.augment, rng)
            event[there & ~visible] = -1  # what happens to a ball outside of the picture cannot be seen
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
    """How many processes load data for a model on this device."""
    if config.num_workers is not None:
        return config.num_workers
    return min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0


def describe(clips: list[Clip], split: str, occluded: str) -> str:
    """One line on a split: clips, frames, and the frames that say nothing."""
    frames = sum(c.num_frames for c in clips)
    labeled = sum(len(c.labels) for c in clips)
    left_out = sum(target_of(label, occluded)[0] == 0 for c in clips for label in c.labels.values())
    line = f"{split}: {len(clips)} clips of {len({c.game for c in clips})} games, {frames} frames"
    if frames > labeled:
        line += f", {frames - labeled} unlabeled"
    if left_out:
        line += f", {left_out} occluded left out (data.occluded={occluded})"
    return line

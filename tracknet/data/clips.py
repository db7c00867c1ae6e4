"""From clips to windows to batches: what the model is trained on and scored on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from tracknet.data.cache import ClipFrames
from tracknet.data.layouts import tracknet as tracknet_layout
from tracknet.data.synthetic import SyntheticConfig, ensure_rallies
from tracknet.data.transforms import AugmentConfig, augment
from tracknet.errors import UserError
from tracknet.labels import BallLabel, Clip, Visibility

Split = Literal["train", "val", "test"]
# A layout on disk reads one game into clips.
LAYOUTS: dict[str, Callable[[Path, str | int], list[Clip]]] = {"tracknet": tracknet_layout.read_game}


@dataclass
class SplitConfig:
    """Games of each split: a number N means the folder ``gameN``, a name the folder of that name."""

    train_games: list[int | str] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    """Games to train on."""
    val_games: list[int | str] = field(default_factory=lambda: [7])
    """Games that choose the best checkpoint."""
    test_games: list[int | str] = field(default_factory=lambda: [8, 9, 10])
    """Games that ``evaluate`` scores."""


@dataclass
class PreprocessConfig:
    """What happens to every frame before the model sees it."""

    resize: tuple[int, int] = (512, 288)
    """Width and height of the model's input in pixels."""


@dataclass
class SequenceConfig:
    """Windows of consecutive frames; a window never crosses a clip."""

    length: int = 3
    """Frames per window; each gets a heatmap."""
    stride: int = 1
    """Step between the starts of two training windows. Scoring uses every frame exactly once."""


@dataclass
class DataConfig:
    """Which frames, how they are split, resized, grouped and augmented."""

    layout: Literal["tracknet"] = "tracknet"
    """How the files lie on disk."""
    root: str = "data/tracknet"
    """Folder of the dataset."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Games by split."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """Resizing."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """Windows."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes while training."""
    occluded: Literal["visible", "absent", "ignore"] = "ignore"
    """What visibility class 3 (position inferred by the annotator) counts as, in training and scoring: a ball, no
    ball (as WASB does), or a frame that is left out."""
    limit_labels: int | None = None
    """Train on the labels of this many frames only, in whole windows spread evenly over the clips; ``null`` = all. For curves of
    accuracy against labelling effort."""
    cache_dir: str = "~/.cache/tracknet/frames"
    """Where decoded and resized frames of videos are kept."""
    num_workers: int | None = None
    """Processes that load data; 0 loads in the training process, ``null`` = up to 8 beside a GPU, else 0."""
    synthetic: SyntheticConfig | None = None
    """Render rallies into ``root`` on first use instead of reading a real dataset."""

    def __post_init__(self) -> None:
        if min(self.preprocess.resize) < 32:
            raise UserError(f"data.preprocess.resize is [width, height], got {list(self.preprocess.resize)}.")
        if self.sequence.length < 1 or self.sequence.stride < 1:
            raise UserError("data.sequence.length and data.sequence.stride are at least 1.")
        if self.limit_labels is not None and self.limit_labels < self.sequence.length:
            raise UserError(
                f"data.limit_labels={self.limit_labels}: a window takes {self.sequence.length}; give at least that."
            )
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must not be negative.")
        names = ("train_games", "val_games", "test_games")
        # `1` and `game1` are one folder.
        games = {name: {str(g).removeprefix("game") for g in getattr(self.split, name)} for name in names}
        for name in names:
            if len(games[name]) < len(getattr(self.split, name)):
                raise UserError(f"data.split.{name}={getattr(self.split, name)} names a game twice.")
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if both := games[a] & games[b]:
                    raise UserError(f"data.split.{a} and data.split.{b} share game {', '.join(sorted(both))}: scores on "
                                    "games that were trained on say nothing. Split by game.")  # fmt: skip

    @property
    def training_wh(self) -> tuple[int, int]:
        """Size of the frames that training sees: of the crops, where there are some."""
        return (self.augment.crop if self.augment.enabled else None) or self.preprocess.resize


def read_split(config: DataConfig, split: Split) -> list[Clip]:
    """Read all clips of a split, rendering synthetic rallies first where the config asks for them."""
    root = Path(config.root).expanduser()
    if config.synthetic is not None:
        ensure_rallies(root, config.synthetic)
    games = getattr(config.split, f"{split}_games")
    if not games:
        raise UserError(f"data.split.{split}_games is empty.")
    return [clip for game in games for clip in LAYOUTS[config.layout](root, game)]


def target_of(label: BallLabel | None, occluded: str) -> tuple[float, bool]:
    """Return the frame's weight (0 = says nothing) and whether there is a ball to find."""
    if label is None or (label.visibility is Visibility.OCCLUDED and occluded == "ignore"):
        return 0.0, False
    if label.visibility is Visibility.OCCLUDED:
        return 1.0, occluded == "visible"
    return 1.0, label.visibility is not Visibility.ABSENT


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


class WindowDataset(Dataset):
    """Windows of a list of clips.

    An item is a dict: ``frames`` uint8 ``[frame, 3, h, w]``; ``xy`` float32 ``[frame, 2]`` in pixels of these frames;
    ``visible`` bool ``[frame]``; ``weight`` float32 ``[frame]``; ``clip`` and ``index`` (``[frame]``) say which frames.

    Attributes:
        clips: what the windows are cut from.
        frames: random access to each clip's frames at the model's size.
        windows: clip number and frame indices.
    """

    def __init__(self, clips: list[Clip], config: DataConfig, *, training: bool, seed: int = 0):
        self.clips = clips
        self.config = config
        self.augment = config.augment if training and config.augment.enabled else None
        self.seed = seed
        self.epoch = 0
        cache_dir = Path(config.cache_dir).expanduser()
        self.frames = [ClipFrames(c, config.preprocess.resize, cache_dir) for c in clips]
        length = config.sequence.length
        limited = training and config.limit_labels is not None
        # Where labels are counted, no two windows share a frame.
        stride = config.sequence.stride if training and not limited else length
        self.windows = [
            (c, indices)
            for c, clip in enumerate(clips)
            for indices in window_indices(clip.num_frames, length, stride)
            # While training, a window of which nothing is labelled teaches nothing.
            if not training or any(target_of(clip.labels.get(i), config.occluded)[0] for i in indices)
        ]
        if not self.windows:
            raise UserError("data: no window has a labelled frame.")
        if limited and len(self.windows) > (number := config.limit_labels // length):
            self.windows = [self.windows[i * len(self.windows) // number] for i in range(number)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        clip_index, indices = self.windows[item]
        clip = self.clips[clip_index]
        frames = np.stack([self.frames[clip_index][i] for i in indices])
        targets = [target_of(clip.labels.get(i), self.config.occluded) for i in indices]
        weight = np.array([t[0] for t in targets], dtype=np.float32)
        weight[1:][np.diff(indices) == 0] = 0  # a repeated frame of a short clip counts once
        visible = np.array([t[1] for t in targets])
        scale = np.array(self.config.preprocess.resize) / np.array(clip.size_wh)
        xy = np.array([clip.labels[i].xy_image if v else (0.0, 0.0) for i, v in zip(indices, visible)])
        xy = (xy + 0.5) * scale - 0.5
        if self.augment is not None:
            rng = np.random.default_rng([self.seed, self.epoch, item])
            frames, xy, visible = augment(frames, xy, visible, self.augment, rng)
        return {
            "frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),
            "xy": torch.from_numpy(xy.astype(np.float32)),
            "visible": torch.from_numpy(visible),
            "weight": torch.from_numpy(weight),
            "clip": torch.tensor(clip_index),
            "index": torch.tensor(indices),
        }


def num_workers(config: DataConfig, device: torch.device) -> int:
    """How many processes load data for a model on this device."""
    if config.num_workers is not None:
        return config.num_workers
    return min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0


def describe(clips: list[Clip], split: str, occluded: str) -> str:
    """One line on a split: clips, frames, and the frames that say nothing."""
    frames = sum(c.num_frames for c in clips)
    labelled = sum(len(c.labels) for c in clips)
    left_out = sum(target_of(label, occluded)[0] == 0 for c in clips for label in c.labels.values())
    line = f"{split}: {len(clips)} clips of {len({c.game for c in clips})} games, {frames} frames"
    if frames > labelled:
        line += f", {frames - labelled} unlabelled"
    if left_out:
        line += f", {left_out} occluded left out (data.occluded={occluded})"
    return line

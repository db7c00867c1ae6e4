"""The data section: which frames, how they are split, resized, grouped and augmented."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from tracknet.data.layouts.coco import CocoConfig
from tracknet.data.layouts.csv import CsvConfig
from tracknet.data.layouts.cvat import CvatConfig
from tracknet.data.synthetic import SyntheticConfig
from tracknet.data.transforms import AugmentConfig
from tracknet.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
LayoutName = Literal[
    "tracknet",
    "tracknetv2",
    "wasb_soccer",
    "wasb_volleyball",
    "wasb_basketball",
    "blurball",
    "racketvision",
    "coco",
    "csv",
]


@dataclass
class SplitConfig:
    """Games of each split, by the name of their folder; a number N means ``gameN`` (of ``tracknetv2`` ``matchN``). A
    clip's name stands for that clip alone."""

    name: str | None = None
    """A published split of the layout, which says all three; games that are listed below replace its own."""
    train_games: list[int | str] | None = None
    """Games to train on."""
    val_games: list[int | str] | None = None
    """Games that choose the best checkpoint."""
    test_games: list[int | str] | None = None
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
    """Step between the starts of two training windows; that of scoring is ``evaluation.stride``."""


@dataclass
class SourceConfig:
    """A dataset on disk."""

    layout: LayoutName = "tracknet"
    """How its files lie on disk."""
    root: str = field(default="data/tracknet", metadata={"changes": ("resume",)})
    """Its folder."""
    synthetic: SyntheticConfig | None = None
    """Render it into ``root`` on first use."""
    csv: CsvConfig = field(default_factory=CsvConfig)
    """Columns of ``layout: csv``."""
    coco: CocoConfig = field(default_factory=CocoConfig)
    """Category of ``layout: coco``."""
    cvat: CvatConfig = field(default_factory=CvatConfig)
    """Tracks of the layouts in CVAT's XML: ``wasb_soccer``, ``wasb_basketball``."""


@dataclass
class MixConfig(SourceConfig):
    """A further dataset to train on."""

    root: str = "???"
    """Its folder."""
    games: list[int | str] = field(default_factory=list)
    """Which of its games; empty = all."""
    weight: float = 1.0
    """Windows of it in each epoch, for each window of the dataset itself: 0.5 adds half as many."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(
                f"data.mix: weight={self.weight} of {self.root} must be above 0; leave the dataset out instead."
            )


@dataclass
class DataConfig(SourceConfig):
    """Which frames, how they are split, resized, grouped and augmented."""

    split: SplitConfig = field(default_factory=SplitConfig)
    """Games by split."""
    allow_leaks: bool = False
    """Train although a game, or a frame, is in two splits. Scores then say nothing about games never seen."""
    mix: list[MixConfig] = field(default_factory=list)
    """Further datasets to train on; validation and scoring are on this one alone."""
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
    """Train on the labels of this many frames only, in whole windows spread evenly over the clips; ``null`` = all. For
    curves of accuracy against labeling effort."""
    check_motion: bool = True
    """Look before training whether labels lie on what moves, which those of another video do not; ``false`` where
    labels are right all the same."""
    cache: Literal["disk", "none"] = "disk"
    """``disk``: frames are decoded once and kept at the model's size (0.44 MB each at 512x288), which training reads an
    order of magnitude faster. ``none``: decoded whenever they are needed; training then takes neighboring windows
    around the same time."""
    cache_dir: str = field(default="~/.cache/tracknet/frames", metadata={"changes": ("resume",)})
    """Where decoded and resized frames are kept."""
    num_workers: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Processes that load data; 0 loads in the training process, ``null`` = up to 8 beside a GPU, else 0."""

    def seen_as(self, other: DataConfig) -> DataConfig:
        """Return this dataset as another's model was trained to see frames: resized and grouped alike."""
        return replace(self, preprocess=other.preprocess, sequence=other.sequence)

    def __post_init__(self) -> None:
        if min(self.preprocess.resize) < 32 or any(side % 8 for side in self.preprocess.resize):
            near = [max(32, round(side / 8) * 8) for side in self.preprocess.resize]
            raise UserError(
                f"data.preprocess.resize={list(self.preprocess.resize)}: [width, height] are multiples of 8, at least"
                f" 32; nearest is {near}."
            )
        crop, size = self.augment.crop, self.preprocess.resize
        if crop is not None and (crop[0] > size[0] or crop[1] > size[1]):
            raise UserError(
                f"data.augment.crop={list(crop)} is larger than the frame it is cut from"
                f" (data.preprocess.resize={list(size)}): take a smaller one, or null."
            )
        if not 1 <= self.sequence.length <= 256 or self.sequence.stride < 1:
            raise UserError("data.sequence.length is from 1 to 256, and data.sequence.stride at least 1.")
        if max(size) > 8192:
            raise UserError(f"data.preprocess.resize={list(size)}: at most 8192 pixels a side.")
        if self.limit_labels is not None and self.limit_labels < self.sequence.length:
            raise UserError(
                f"data.limit_labels={self.limit_labels}: a window takes {self.sequence.length}; give at least that."
            )
        if self.num_workers is not None and not 0 <= self.num_workers <= 256:
            raise UserError(f"data.num_workers={self.num_workers}: must be from 0 to 256.")
        names = ("train_games", "val_games", "test_games")
        # `1` and `game1` are one folder. What a published split names is known once its folder is looked into
        # (data/splits.py).
        games = {name: {str(g).removeprefix("game") for g in getattr(self.split, name) or ()} for name in names}
        for name in names:
            if len(games[name]) < len(getattr(self.split, name) or ()):
                raise UserError(f"data.split.{name}={getattr(self.split, name)} names a game twice.")
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if (both := games[a] & games[b]) and not self.allow_leaks:
                    raise UserError(
                        f"data.split.{a} and data.split.{b} share game {', '.join(sorted(both))}: scores on "
                        "games that were trained on say nothing. Split by game."
                    )

    @property
    def training_wh(self) -> tuple[int, int]:
        """Size of the frames that training sees: of the crops, where there are some."""
        return (self.augment.crop if self.augment.enabled else None) or self.preprocess.resize

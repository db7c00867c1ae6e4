"""Data section of the configuration: datasets, splits, preprocessing, windows and augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from tracknet.data.layouts import LAYOUTS
from tracknet.data.layouts.coco import CocoConfig
from tracknet.data.layouts.csv import CsvConfig
from tracknet.data.layouts.cvat import CvatConfig
from tracknet.data.synthetic import SyntheticConfig
from tracknet.data.transforms import AugmentConfig
from tracknet.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass
class SplitConfig:
    """Games of each split, by the names of their folders. A number N means ``gameN`` (``matchN`` in layout
    ``tracknetv2``). The name of a clip stands for that clip alone."""

    name: str | None = None
    """Published split of the layout, which defines all three lists; lists given below replace its own."""
    train_games: list[int | str] | None = None
    """Games to train on."""
    val_games: list[int | str] | None = None
    """Games whose scores select the best checkpoint."""
    test_games: list[int | str] | None = None
    """Games that ``evaluate`` scores by default."""


@dataclass
class PreprocessConfig:
    """Preprocessing of every frame."""

    resize: tuple[int, int] = (512, 288)
    """Width and height of the model's input in pixels, multiples of 8."""


@dataclass
class SequenceConfig:
    """Windows of consecutive frames. A window never extends beyond a clip."""

    length: int = 3
    """Frames per window; the model predicts a heatmap for each."""
    stride: int = 1
    """Frames from the start of one training window to the start of the next; for scoring, see ``evaluation.stride``."""


@dataclass
class SourceConfig:
    """Dataset on disk."""

    layout: str = field(default="tracknet", metadata={"choices": lambda: list(LAYOUTS)})
    """Layout of its files."""
    root: str = field(default="data/tracknet", metadata={"changes": ("resume",)})
    """Folder of the dataset."""
    synthetic: SyntheticConfig | None = None
    """Synthetic rallies, rendered into ``root`` on first use; ``null`` = the files in ``root``."""
    csv: CsvConfig = field(default_factory=CsvConfig)
    """Columns of ``layout: csv``."""
    coco: CocoConfig = field(default_factory=CocoConfig)
    """Category of ``layout: coco``."""
    cvat: CvatConfig = field(default_factory=CvatConfig)
    """Tracks of the layouts with CVAT XML files: ``wasb_soccer``, ``wasb_basketball``."""

    def __post_init__(self) -> None:
        LAYOUTS.lookup(self.layout)


@dataclass
class MixConfig(SourceConfig):
    """Additional dataset to train on."""

    root: str = "???"
    """Folder of the dataset."""
    games: list[int | str] = field(default_factory=list)
    """Games to train on; empty = all."""
    weight: float = 1.0
    """Number of its windows per epoch for each window of the main dataset: 0.5 adds half as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise UserError(
                f"data.mix: weight={self.weight} of {self.root} must be above 0; remove the dataset to exclude it."
            )


@dataclass
class DataConfig(SourceConfig):
    """Dataset, its splits, preprocessing, windows and augmentation."""

    split: SplitConfig = field(default_factory=SplitConfig)
    """Games of each split."""
    allow_leaks: bool = False
    """Allow a game or a frame to be in two splits. Scores then do not measure the accuracy on unseen games."""
    mix: list[MixConfig] = field(default_factory=list)
    """Additional datasets to train on; validation and scoring use the main dataset only."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """Size of the model's input."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """Windows of consecutive frames."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training windows."""
    occluded: Literal["visible", "absent", "ignore"] = "ignore"
    """Meaning of visibility class 3 (position inferred by the annotator) in training and scoring. ``visible``: a ball.
    ``absent``: no ball, as in WASB. ``ignore``: the frame is not used."""
    limit_labels: int | None = None
    """Number of labeled frames to train on, in whole windows spread evenly over the clips; ``null`` = all. Serves to
    measure accuracy as a function of labeling effort."""
    check_motion: bool = True
    """Check before training that labels are on moving objects, which labels of another video are not. Set it to
    ``false`` if the labels are correct although the check fails."""
    cache: Literal["disk", "none"] = "disk"
    """``disk``: decode frames once and store them at the model's size (0.44 MB each at 512x288); reading them is an
    order of magnitude faster. ``none``: decode frames whenever they are needed; training then uses neighboring windows
    at about the same time."""
    cache_dir: str = field(default="~/.cache/tracknet/frames", metadata={"changes": ("resume",)})
    """Folder of the cache of decoded and resized frames."""
    num_workers: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Number of data loading processes; 0 loads data in the training process. ``null`` = up to 8 with a GPU, otherwise
    0."""

    def seen_as(self, other: DataConfig) -> DataConfig:
        """Return this dataset with the preprocessing and the windows of another, which a model was trained on."""
        return replace(self, preprocess=other.preprocess, sequence=other.sequence)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Sizes and numbers.
        if min(self.preprocess.resize) < 32 or any(side % 8 for side in self.preprocess.resize):
            nearest = [max(32, round(side / 8) * 8) for side in self.preprocess.resize]
            raise UserError(
                f"data.preprocess.resize={list(self.preprocess.resize)}: width and height must be multiples of 8 and at"
                f" least 32; nearest is {nearest}."
            )
        crop, size = self.augment.crop, self.preprocess.resize
        if crop is not None and (crop[0] > size[0] or crop[1] > size[1]):
            raise UserError(
                f"data.augment.crop={list(crop)} is larger than the frame"
                f" (data.preprocess.resize={list(size)}): use a smaller crop, or null."
            )
        if not 1 <= self.sequence.length <= 256 or self.sequence.stride < 1:
            raise UserError("data.sequence.length must be from 1 to 256, and data.sequence.stride at least 1.")
        if max(size) > 8192:
            raise UserError(f"data.preprocess.resize={list(size)}: width and height must be at most 8192.")
        if self.limit_labels is not None and self.limit_labels < self.sequence.length:
            raise UserError(
                f"data.limit_labels={self.limit_labels}: must be at least {self.sequence.length}, the number of frames"
                " per window (data.sequence.length)."
            )
        if self.num_workers is not None and not 0 <= self.num_workers <= 256:
            raise UserError(f"data.num_workers={self.num_workers}: must be from 0 to 256.")
        names = ("train_games", "val_games", "test_games")
        # Overlap of the splits. `1` and `game1` are the same folder. The games of a published split are only known once
        # its folder is read, so data/splits.py checks those.
        games = {name: {str(g).removeprefix("game") for g in getattr(self.split, name) or ()} for name in names}
        for name in names:
            if len(games[name]) < len(getattr(self.split, name) or ()):
                raise UserError(f"data.split.{name}={getattr(self.split, name)} contains a game twice; remove one.")
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if (shared := games[a] & games[b]) and not self.allow_leaks:
                    raise UserError(
                        f"data.split.{a} and data.split.{b} share game {', '.join(sorted(shared))}: scores on training "
                        "games do not measure accuracy on unseen ones. List each game in one split only."
                    )

    @property
    def training_wh(self) -> tuple[int, int]:
        """Width and height of the training frames in pixels: those of the crops if cropping is on."""
        return (self.augment.crop if self.augment.enabled else None) or self.preprocess.resize

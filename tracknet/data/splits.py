"""Which clips belong to training, validation and test."""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

from tracknet.data.config import SPLITS, DataConfig, MixConfig, Split
from tracknet.data.images import natural_key
from tracknet.data.layouts import LAYOUTS
from tracknet.data.synthetic import describe_settings, ensure_rallies
from tracknet.errors import UserError, nearest
from tracknet.files import expand_user
from tracknet.labels import Clip, target_of


@dataclass
class Dataset:
    """A dataset on disk.

    Attributes:
        config: its settings.
        layout: the module that reads it.
        root: its folder.
        games: the names of its games.
    """

    config: DataConfig | MixConfig
    layout: ModuleType
    root: Path
    games: list[str]
    _read: dict[str, list[Clip]] = field(default_factory=dict, repr=False)  # a split may name many clips of one game

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.games)

    def read(self, entry: int | str) -> list[Clip]:
        """Read a game, or the one clip of that name.

        Raises:
            UserError: there is none, or its files are wrong; names what there is.
        """
        game, clip = self.locate(entry)
        if game not in self._read:
            options = [getattr(self.config, name) for name in self.layout.OPTIONS]
            with _naming_what_cannot_be_read(self.root):
                self._read[game] = self.layout.read_game(self.root, game, *options)
        clips = self._read[game]
        if clip is None:
            return clips
        found = [c for c in clips if c.name == clip]
        if not found:
            names = [c.name for c in clips]
            raise UserError(f"data.split: '{clip}' is no clip of {game} in '{self.root}'{nearest(clip, names)}")
        return found

    def locate(self, entry: int | str) -> tuple[str, str | None]:
        """Return the game that an entry of a split means, and the clip where it means one."""
        for name in (f"{self.layout.PREFIX}{entry}", str(entry)):
            if name in self._known:
                return name, None
        parts = str(entry).split("/")
        for i in range(len(parts) - 1, 0, -1):
            if (game := "/".join(parts[:i])) in self._known:
                return game, str(entry)
        raise UserError(
            f"data.split: game '{entry}' is not in '{self.root}' (there are: {', '.join(self.games)})"
            f"{nearest(str(entry), self.games)}"
        )


def open_dataset(config: DataConfig | MixConfig, key: str = "data", render: bool = True) -> Dataset:
    """Find the games of a dataset, rendering synthetic rallies first where the config asks for them.

    Args:
        config: its section.
        key: of the section, for messages.
        render: whether that may be done: not where a run says so, which may be a stranger's.

    Raises:
        UserError: there is no such folder, or nothing of the layout in it.
    """
    root = expand_user(config.root, f"{key}.root")
    layout = LAYOUTS[config.layout]
    with _naming_what_cannot_be_read(root):
        is_there, is_folder = root.exists(), root.is_dir()
    if config.synthetic is not None:
        if not render and not is_there:
            raise UserError(
                f"{key}.root: there is no folder '{root}', and what a run says is not rendered without being asked:"
                f" tracknet synthesize --out {shlex.quote(str(root))} {describe_settings(config.synthetic)}"
            )
        ensure_rallies(root, config.synthetic)
    elif not is_folder:
        raise UserError(f"{key}.root: there is no folder '{root}'. Set {key}.root=<folder with {layout.EXPECTED}>.")
    with _naming_what_cannot_be_read(root):
        games = layout.list_games(root)
    if not games:
        fits = [name for name, other in LAYOUTS.items() if name != config.layout and _fits(other, root)]
        hint = f" It looks like {key}.layout={fits[0]}." if len(fits) == 1 else ""
        raise UserError(
            f"{key}.root: '{root}' holds nothing of layout {config.layout}; expected {layout.EXPECTED}.{hint}"
        )
    return Dataset(config, layout, root, sorted(games, key=natural_key))


@contextlib.contextmanager
def _naming_what_cannot_be_read(root: Path) -> Iterator[None]:
    """Turn what a system says of a dataset's files (forbidden, damaged, a link to itself) into what a user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror}).") from error


def _fits(layout: ModuleType, root: Path) -> bool:
    try:
        return bool(layout.list_games(root))
    except (UserError, OSError):  # a file of a name that the layout knows, and of other content
        return False


def resolve_splits(config: DataConfig, dataset: Dataset, needed: Collection[Split] = SPLITS) -> dict[Split, list[str]]:
    """Return the games or clips of each split, by their names on disk.

    Args:
        config: says which.
        dataset: where they are.
        needed: splits that must be complete; of the others, games that are not there are left out.

    Raises:
        UserError: a published split or a game is not there, or two splits share one.
    """
    published: dict[str, list[str]] = {}
    if config.split.name is not None:
        known = dataset.layout.published_splits(dataset.root, dataset.games)
        if config.split.name not in known:
            raise UserError(
                f"data.split.name={config.split.name}: layout {config.layout} has the published splits "
                f"{', '.join(known) or '(none)'}{nearest(config.split.name, known)}"
            )
        published = known[config.split.name]
    entries: dict[Split, list[str]] = {}
    games: dict[Split, dict[str, str]] = {}
    for split in SPLITS:
        own = getattr(config.split, f"{split}_games")
        entries[split], games[split] = [], {}
        for entry in own if own is not None else published.get(split, []):
            try:
                game, clip = dataset.locate(entry)
            except UserError:
                if split in needed:
                    raise
                continue
            name = clip or game
            if name in entries[split] or (game in games[split] and game in (name, games[split][game])):
                raise UserError(f"data.split.{split}_games names '{entry}' twice.")
            entries[split].append(name)
            games[split][game] = name
    for i, a in enumerate(SPLITS):
        for b in SPLITS[i + 1 :]:
            # A game and a clip of it, or two clips of one game: the same court, camera and players.
            both = sorted(games[a].keys() & games[b].keys())
            if both and not config.allow_leaks:
                raise UserError(
                    f"The {a} and {b} splits share {both[0]}{' and more' if len(both) > 1 else ''}: scores on games "
                    "that were trained on say nothing. Split by game, or say data.allow_leaks=true."
                )
    return entries


def read_split(config: DataConfig, split: Split, render: bool = True) -> list[Clip]:
    """Read all clips of a split; ``render`` as of ``open_dataset``.

    Raises:
        UserError: it names no game or one that is not there, or none of its frames has a label to learn from or to
            score by.
    """
    dataset = open_dataset(config, render=render)
    entries = resolve_splits(config, dataset, (split,))[split]
    if not entries:
        raise UserError(f"data.split.{split}_games is empty: name the games, or a published split by data.split.name.")
    clips = [clip for entry in entries for clip in dataset.read(entry)]
    if not any(target_of(label, config.occluded)[0] > 0 for clip in clips for label in clip.labels.values()):
        raise UserError(
            f"data.split.{split}_games: no frame of {', '.join(entries[:3])}{' …' if len(entries) > 3 else ''} in"
            f" '{dataset.root}' has a label that counts (data.occluded={config.occluded}); nothing can be learned from"
            " them or scored. Label them, or name other games."
        )
    check_stills(clips, config.sequence.length)
    return clips


def check_stills(clips: list[Clip], length: int) -> None:
    """Refuse single pictures where the model looks at several frames: each would stand for all of its neighbors.

    Raises:
        UserError: most clips have one frame; says how to tie pictures to their video.
    """
    stills = [clip for clip in clips if clip.num_frames == 1]
    if length > 1 and len(stills) > len(clips) / 2:
        raise UserError(
            f"{len(stills)} of {len(clips)} clips have one frame ({stills[0].name}, …), and the model looks at {length}"
            " consecutive ones. Take the videos that the pictures are from, and give the labels by frame number:"
            " data.layout=csv with <clip>.mp4 and beside it <clip>.csv with columns frame, x, y (frames without a row"
            " are unlabeled). Or train on single pictures: data.sequence.length=1."
        )


def read_mix(config: DataConfig, render: bool = True) -> list[list[Clip]]:
    """Read the clips of each further dataset of ``data.mix``; ``render`` as of ``open_dataset``.

    Raises:
        UserError: as for a split, or a game is named twice, which would weigh it twice.
    """
    clips = []
    for i, other in enumerate(config.mix):
        dataset = open_dataset(other, f"data.mix[{i}]", render)
        clips.append([clip for entry in other.games or dataset.games for clip in dataset.read(entry)])
        counts = Counter(clip.name for clip in clips[-1])
        if twice := [name for name, count in counts.items() if count > 1]:
            raise UserError(f"data.mix[{i}].games names '{twice[0]}' twice, alone or with its game.")
        check_stills(clips[-1], config.sequence.length)
    return clips

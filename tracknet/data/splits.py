"""Datasets on disk and their splits into training, validation and test clips."""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tracknet.data.config import SPLITS, DataConfig, MixConfig, Split
from tracknet.data.images import natural_key
from tracknet.data.labels import Clip, target_of
from tracknet.data.layouts import LAYOUTS, Layout
from tracknet.data.synthetic import describe_settings, ensure_rallies
from tracknet.errors import UserError, nearest
from tracknet.files import expand_user


@dataclass
class DatasetOnDisk:
    """Dataset on disk.

    Attributes:
        config: settings of the dataset.
        layout: module that reads its files.
        root: folder that contains it.
        games: names of its games.
    """

    config: DataConfig | MixConfig
    layout: Layout
    root: Path
    games: list[str]
    # Clips of the games read so far: a split may list many clips of one game.
    _clips_by_game: dict[str, list[Clip]] = field(default_factory=dict, repr=False)

    @cached_property
    def _game_names(self) -> frozenset[str]:
        return frozenset(self.games)

    def read(self, entry: int | str) -> list[Clip]:
        """Read a game or a single clip.

        Args:
            entry: name of a game or a clip, or the number of a game.

        Returns:
            All clips of the game, or the single clip.

        Raises:
            UserError: if the entry is not found or its files are invalid. The message lists what is available.
        """
        game, clip = self.locate(entry)
        if game not in self._clips_by_game:
            options = [getattr(self.config, name) for name in self.layout.OPTIONS]
            with _reporting_unreadable_files(self.root):
                self._clips_by_game[game] = self.layout.read_game(self.root, game, *options)
        clips = self._clips_by_game[game]
        if clip is None:
            return clips
        matches = [c for c in clips if c.name == clip]
        if not matches:
            names = [c.name for c in clips]
            raise UserError(f"data.split: '{clip}' is not a clip of {game} in '{self.root}'{nearest(clip, names)}")
        return matches

    def locate(self, entry: int | str) -> tuple[str, str | None]:
        """Return the game and, if the entry is a clip, the clip that an entry of a split refers to.

        Raises:
            UserError: if no game of the dataset matches.
        """
        # The layout's prefix comes first: a bare number N is "gameN" if that exists.
        for name in (f"{self.layout.PREFIX}{entry}", str(entry)):
            if name in self._game_names:
                return name, None
        # A clip is named "game/clip". Names of games may contain slashes, so try the longest prefix first.
        parts = str(entry).split("/")
        for i in range(len(parts) - 1, 0, -1):
            if (game := "/".join(parts[:i])) in self._game_names:
                return game, str(entry)
        raise UserError(
            f"data.split: game '{entry}' is not in '{self.root}' (available: {', '.join(self.games)})"
            f"{nearest(str(entry), self.games)}"
        )


def open_dataset(config: DataConfig | MixConfig, key: str = "data", render: bool = True) -> DatasetOnDisk:
    """Find the games of a dataset; render a synthetic dataset first.

    Args:
        config: section of the configuration that describes the dataset.
        key: name of the section, for messages.
        render: whether a missing synthetic dataset may be rendered. Must be false if the configuration is that of a
            saved run, which may come from an untrusted source.

    Raises:
        UserError: if the folder does not exist or contains no game of the layout.
    """
    root = expand_user(config.root, f"{key}.root")
    layout = LAYOUTS[config.layout]
    with _reporting_unreadable_files(root):
        exists, is_folder = root.exists(), root.is_dir()
    if config.synthetic is not None:
        if not render and not exists:
            raise UserError(
                f"{key}.root: folder '{root}' not found. Synthetic data of a saved run is not rendered automatically."
                " To render it, run:"
                f" tracknet synthesize --out {shlex.quote(str(root))} {describe_settings(config.synthetic)}"
            )
        ensure_rallies(root, config.synthetic)
    elif not is_folder:
        raise UserError(f"{key}.root: folder '{root}' not found. Set {key}.root=<folder with {layout.EXPECTED}>.")
    with _reporting_unreadable_files(root):
        games = layout.list_games(root)
    if not games:
        matches = [name for name, other in LAYOUTS.items() if name != config.layout and _has_games(other, root)]
        hint = f" The folder looks like {key}.layout={matches[0]}." if len(matches) == 1 else ""
        raise UserError(
            f"{key}.root: '{root}' contains no game of layout {config.layout}; expected {layout.EXPECTED}.{hint}"
        )
    return DatasetOnDisk(config, layout, root, sorted(games, key=natural_key))


@contextlib.contextmanager
def _reporting_unreadable_files(root: Path) -> Iterator[None]:
    """Raise ``UserError`` for operating system errors of a dataset's files.

    Such files are, for example, forbidden, damaged, or a link to themselves.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror}).") from error


def _has_games(layout: Layout, root: Path) -> bool:
    """Return whether a folder contains games of a layout."""
    try:
        return bool(layout.list_games(root))
    except (UserError, OSError):  # a file with a name of this layout, but other content
        return False


def resolve_splits(
    config: DataConfig, dataset: DatasetOnDisk, needed: Collection[Split] = SPLITS
) -> dict[Split, list[str]]:
    """Return the games or clips of each split.

    Games that the configuration lists replace those of the published split that it names.

    Args:
        config: data section of the configuration.
        dataset: dataset that contains the games.
        needed: splits that must be complete. Missing games of other splits are left out.

    Returns:
        Names on disk of games (``game``) or clips (``game/clip``), by split.

    Raises:
        UserError: if a published split or a game does not exist, or if two splits share a game.
    """
    published: dict[str, list[str]] = {}
    if config.split.name is not None:
        available = dataset.layout.published_splits(dataset.root, dataset.games)
        if config.split.name not in available:
            raise UserError(
                f"data.split.name={config.split.name}: layout {config.layout} has the published splits "
                f"{', '.join(available) or '(none)'}{nearest(config.split.name, available)}"
            )
        published = available[config.split.name]

    # Locate the entries of each split. A game may be listed once, or several of its clips, but not both.
    entries: dict[Split, list[str]] = {}
    games: dict[Split, dict[str, str]] = {}
    for split in SPLITS:
        listed = getattr(config.split, f"{split}_games")
        entries[split], games[split] = [], {}
        for entry in listed if listed is not None else published.get(split, []):
            try:
                game, clip = dataset.locate(entry)
            except UserError:
                if split in needed:
                    raise
                continue
            name = clip or game
            if name in entries[split] or (game in games[split] and game in (name, games[split][game])):
                raise UserError(f"data.split.{split}_games contains '{entry}' twice.")
            entries[split].append(name)
            games[split][game] = name

    # Check for shared games.
    for i, a in enumerate(SPLITS):
        for b in SPLITS[i + 1 :]:
            # A game and one of its clips, or two clips of one game, show the same court, camera and players.
            shared = sorted(games[a].keys() & games[b].keys())
            if shared and not config.allow_leaks:
                raise UserError(
                    f"The {a} and {b} splits share {shared[0]}{' and more' if len(shared) > 1 else ''}, but scores on "
                    "games used for training are meaningless. Split by game, or set data.allow_leaks=true."
                )
    return entries


def read_split(config: DataConfig, split: Split, render: bool = True) -> list[Clip]:
    """Read all clips of a split.

    Args:
        config: data section of the configuration.
        split: name of the split.
        render: whether a missing synthetic dataset may be rendered, see ``open_dataset``.

    Raises:
        UserError: if the split is empty, a game does not exist, or no frame has a label to learn from or to score.
    """
    dataset = open_dataset(config, render=render)
    entries = resolve_splits(config, dataset, (split,))[split]
    if not entries:
        raise UserError(
            f"data.split.{split}_games is empty. List its games, or set data.split.name to a published split."
        )
    clips = [clip for entry in entries for clip in dataset.read(entry)]
    if not any(target_of(label, config.occluded)[0] > 0 for clip in clips for label in clip.labels.values()):
        raise UserError(
            f"data.split.{split}_games: no frame of {', '.join(entries[:3])}{' …' if len(entries) > 3 else ''} in"
            f" '{dataset.root}' has a label to learn from or to score (data.occluded={config.occluded}). Label"
            " these games, or list other games."
        )
    check_stills(clips, config.sequence.length)
    return clips


def check_stills(clips: list[Clip], length: int) -> None:
    """Raise an error if most clips are single images although the model takes several frames.

    A single image would be repeated for all of its neighbors.

    Args:
        clips: clips to check.
        length: number of frames per window.

    Raises:
        UserError: if more than half of the clips have one frame. The message explains how to label the video instead.
    """
    stills = [clip for clip in clips if clip.num_frames == 1]
    if length > 1 and len(stills) > len(clips) / 2:
        raise UserError(
            f"{len(stills)} of {len(clips)} clips have one frame ({stills[0].name}, …), but the model takes {length}"
            " consecutive frames. Use the videos that the images are from, and label them by frame number: set"
            " data.layout=csv, with <clip>.mp4 and next to it <clip>.csv with columns frame, x, y (frames without a row"
            " are unlabeled). To train on single images, set data.sequence.length=1."
        )


def read_mix(config: DataConfig, render: bool = True) -> list[list[Clip]]:
    """Read the clips of each further training dataset in ``data.mix``.

    Args:
        config: data section of the configuration.
        render: whether missing synthetic datasets may be rendered, see ``open_dataset``.

    Returns:
        Clips of each dataset, in the order of ``data.mix``.

    Raises:
        UserError: if a game does not exist, or is listed twice, which would double its weight.
    """
    clips = []
    for i, mix_config in enumerate(config.mix):
        dataset = open_dataset(mix_config, f"data.mix[{i}]", render)
        clips.append([clip for entry in mix_config.games or dataset.games for clip in dataset.read(entry)])
        counts = Counter(clip.name for clip in clips[-1])
        if duplicates := [name for name, count in counts.items() if count > 1]:
            raise UserError(f"data.mix[{i}].games contains '{duplicates[0]}' twice, by itself or with its game.")
        check_stills(clips[-1], config.sequence.length)
    return clips

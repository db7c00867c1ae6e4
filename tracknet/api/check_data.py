"""Look a dataset over: counts, findings, a contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from tracknet.data.checks import (
    Scene,
    check_fast,
    check_labels,
    find_leaks,
    needs_motion_check,
    read_skipping_errors,
    same_scene_bits,
)
from tracknet.data.config import SPLITS, DataConfig, Split
from tracknet.data.findings import Finding
from tracknet.data.frame_checks import check_frames
from tracknet.data.motion_checks import FEWEST, check_motion
from tracknet.data.splits import open_dataset, read_mix, resolve_splits
from tracknet.errors import UserError, printable, shorten
from tracknet.labels import Clip
from tracknet.progress import track
from tracknet.reporting.console import render_table
from tracknet.reporting.report import draw_contact_sheet

logger = logging.getLogger(__name__)

SHOWN = 40  # findings that are printed, of which most fit a screen
LINE = 600  # characters of one


def check(config: DataConfig, fast: bool, sheet: Path) -> dict:
    """Check a dataset and log what was found.

    Returns:
        ``counts`` by split, ``findings``, ``sheet``.
    """
    dataset = open_dataset(config)
    clips, findings = read_skipping_errors(dataset, resolve_splits(config, dataset), config.sequence.length)
    mixed = [clip for others in read_mix(config) for clip in others]
    everything = [(split, clip) for split in SPLITS for clip in clips[split]] + [("train", clip) for clip in mixed]
    if not everything and findings:
        raise UserError("Nothing can be read. " + " ".join(f.message for f in findings))
    if not everything:
        raise UserError(
            "The splits name no game, so nothing would be looked at: say data.split.train_games=[…], val_games and"
            f" test_games. There are {', '.join(dataset.games)}."
        )
    if fast:
        findings += check_fast(clips, mixed, same_scene_bits(config), needs_motion_check(config))
    else:
        findings += check_labels([clip for _, clip in everything])
        scenes = []
        with ThreadPoolExecutor() as pool:
            looked = pool.map(lambda entry: check_frames(entry[1]), everything)
            watched = track(looked, "Looking at frames", len(everything))
            for (split, clip), (found, hashes) in zip(everything, watched):
                findings += found
                if len(hashes):
                    scenes.append(Scene(split, clip, hashes))
        if config.check_motion:
            unreadable = {f.where for f in findings if f.kind == "unreadable"}
            readable = [clip for _, clip in everything if str(clip.labels_path or clip.name) not in unreadable]
            found, untold = check_motion(readable)
            findings += found + describe_untold(untold)
        findings += find_leaks(scenes, same_scene_bits(config))
    counts = {split: count(clips[split]) for split in SPLITS}
    logger.info(render_table(build_counts(clips)))
    findings.sort(key=lambda f: not f.is_error)
    for finding in findings[:SHOWN]:
        line = f"{'ERROR' if finding.is_error else 'look'}  {finding.kind}: {finding.where}: {finding.message}"
        logger.info(shorten(line, LINE))
    if len(findings) > SHOWN:
        errors = sum(f.is_error for f in findings[SHOWN:])
        logger.info(f"… and {len(findings) - SHOWN} more, {errors} of them errors: --json FILE holds all.")
    if not findings:
        logger.info("Nothing found.")
    if any(clips.values()):
        draw_contact_sheet(clips, config, sheet)
        logger.info(f"wrote {sheet}")
    return {"counts": counts, "findings": [asdict(f) for f in findings], "sheet": str(sheet)}


def describe_untold(clips: list[Clip]) -> list[Finding]:
    """Name the clips of too few labels to tell whether they lie on what moves."""
    labeled = [c.name for c in clips if any(label.xy_image is not None for label in c.labels.values())]
    if not labeled:
        return []
    names = ", ".join(labeled[:5]) + (f", … ({len(labeled)} clips)" if len(labeled) > 5 else "")
    message = (
        f"fewer than {FEWEST} labels of a ball that moves between frames; whether they belong to these frames "
        "cannot be told."
    )
    return [Finding("too few labels", False, names, message)]


def count(clips: list[Clip]) -> dict[str, int]:
    """Count frames and labels of clips."""
    labels = [label for clip in clips for label in clip.labels.values()]
    frames = sum(clip.num_frames for clip in clips)
    by_class = {f"visibility_{v}": sum(label.visibility == v for label in labels) for v in range(4)}
    events = {name: sum(label.event == v for label in labels) for name, v in (("hits", 1), ("bounces", 2))}
    return {
        "games": len({c.game for c in clips}),
        "clips": len(clips),
        "frames": frames,
        "unlabeled": frames - len(labels),
        **by_class,
        **events,
    }


def build_counts(clips: Mapping[Split, list[Clip]]) -> Table:
    """Build the table of counts by split and game."""
    names = ("clips", "frames", "unlabeled", "absent", "visible", "hard", "occluded", "hits", "bounces")
    whole = list(count([c for of_split in clips.values() for c in of_split]).values())[1:]
    shown = [i for i, total in enumerate(whole) if total or i < 2]
    table = Table(title="Frames", title_justify="left")
    for column in ("split", "game", *(names[i] for i in shown)):
        table.add_column(column, justify="left" if column in ("split", "game") else "right", no_wrap=True)
    for split, of_split in clips.items():
        games = list(dict.fromkeys(c.game for c in of_split))
        for game in games if len(games) <= 12 else []:
            values = list(count([c for c in of_split if c.game == game]).values())[1:]
            table.add_row(split, printable(game), *(str(values[i]) for i in shown))
        values = list(count(of_split).values())[1:]
        table.add_row(split, f"all {len(games)}", *(str(values[i]) for i in shown), style="bold", end_section=True)
    return table

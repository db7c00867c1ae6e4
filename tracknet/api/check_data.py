"""Dataset check: counts, findings and a contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from tracknet.data.checks import (
    ClipHashes,
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
from tracknet.data.labels import Clip
from tracknet.data.motion_checks import FEWEST, check_motion
from tracknet.data.splits import open_dataset, read_mix, resolve_splits
from tracknet.errors import UserError, printable, shorten
from tracknet.progress import track
from tracknet.reporting.console import render_table
from tracknet.reporting.report import draw_contact_sheet

logger = logging.getLogger(__name__)

SHOWN = 40  # maximum number of printed findings, about a screen
LINE = 600  # maximum number of characters per printed finding


def check(config: DataConfig, fast: bool, sheet: Path) -> dict:
    """Check a dataset, log the findings and draw a contact sheet.

    Args:
        config: data section of the configuration.
        fast: whether to run only the checks that ``tracknet train`` runs: labels and a few frames.
        sheet: path of the contact sheet (PNG).

    Returns:
        ``counts`` by split (see ``count``), ``findings`` as dictionaries, and ``sheet``, the path of the sheet.

    Raises:
        UserError: if no clip can be read, or the splits contain no game.
    """
    # Read all clips. An unreadable game becomes a finding, so that the others are still checked.
    dataset = open_dataset(config)
    clips, findings = read_skipping_errors(dataset, resolve_splits(config, dataset), config.sequence.length)
    mixed = [clip for mixed_clips in read_mix(config) for clip in mixed_clips]
    entries = [(split, clip) for split in SPLITS for clip in clips[split]] + [("train", clip) for clip in mixed]
    if not entries and findings:
        raise UserError("No clip of the dataset can be read. " + " ".join(f.message for f in findings))
    if not entries:
        raise UserError(
            "The splits contain no game, so nothing would be checked: set data.split.train_games=[…], val_games and"
            f" test_games. The dataset contains {', '.join(dataset.games)}."
        )
    # Check labels, then frames, motion and leaks between splits.
    if fast:
        findings += check_fast(clips, mixed, same_scene_bits(config), needs_motion_check(config))
    else:
        findings += check_labels([clip for _, clip in entries])
        hashes_by_clip = []
        # Threads check several clips at once: OpenCV and PyAV release the GIL while they decode.
        with ThreadPoolExecutor() as pool:
            results = pool.map(lambda entry: check_frames(entry[1]), entries)
            tracked = track(results, "Checking frames", len(entries))
            for (split, clip), (frame_findings, hashes) in zip(entries, tracked):
                findings += frame_findings
                if len(hashes):
                    hashes_by_clip.append(ClipHashes(split, clip, hashes))
        if config.check_motion:
            # Clips whose frames could not be decoded have no motion to compare the labels with.
            unreadable = {f.where for f in findings if f.kind == "unreadable"}
            readable = [clip for _, clip in entries if str(clip.labels_path or clip.name) not in unreadable]
            motion_findings, undecided = check_motion(readable)
            findings += motion_findings + describe_untold(undecided)
        findings += find_leaks(hashes_by_clip, same_scene_bits(config))
    # Report. Errors come first, because only the first findings are printed.
    counts = {split: count(clips[split]) for split in SPLITS}
    logger.info(render_table(build_counts(clips)))
    findings.sort(key=lambda f: not f.is_error)
    for finding in findings[:SHOWN]:
        line = f"{'ERROR' if finding.is_error else 'look'}  {finding.kind}: {finding.where}: {finding.message}"
        logger.info(shorten(line, LINE))
    if len(findings) > SHOWN:
        errors = sum(f.is_error for f in findings[SHOWN:])
        logger.info(f"… and {len(findings) - SHOWN} more, {errors} of them errors: --json FILE writes all of them.")
    if not findings:
        logger.info("Nothing found.")
    if any(clips.values()):
        draw_contact_sheet(clips, config, sheet)
        logger.info(f"wrote {sheet}")
    return {"counts": counts, "findings": [asdict(f) for f in findings], "sheet": str(sheet)}


def describe_untold(clips: list[Clip]) -> list[Finding]:
    """Return a finding that lists the clips with too few labels for the motion check; empty if none has labels.

    Args:
        clips: clips for which ``check_motion`` could not decide whether the labels are on a moving object.
    """
    labeled = [c.name for c in clips if any(label.xy_image is not None for label in c.labels.values())]
    if not labeled:
        return []
    names = ", ".join(labeled[:5]) + (f", … ({len(labeled)} clips)" if len(labeled) > 5 else "")
    message = (
        f"fewer than {FEWEST} labels of a ball that moves between frames, too few to check whether the labels belong "
        "to these frames."
    )
    return [Finding("too few labels", False, names, message)]


def count(clips: list[Clip]) -> dict[str, int]:
    """Count the frames and labels of clips.

    Returns:
        ``games``, ``clips``, ``frames``, ``unlabeled`` (frames without a label), ``visibility_0`` to ``visibility_3``
        (labels by visibility class), ``hits`` and ``bounces`` (labels by event).
    """
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
    """Return the table of counts by split and game; splits of more than 12 games show their total only."""
    # Column titles of the values of `count`, in order, without its first one (`games`).
    names = ("clips", "frames", "unlabeled", "absent", "visible", "hard", "occluded", "hits", "bounces")
    totals = list(count([c for split_clips in clips.values() for c in split_clips]).values())[1:]
    # Columns that are zero everywhere are hidden, except clips and frames.
    columns = [i for i, total in enumerate(totals) if total or i < 2]
    table = Table(title="Frames", title_justify="left")
    for column in ("split", "game", *(names[i] for i in columns)):
        table.add_column(column, justify="left" if column in ("split", "game") else "right", no_wrap=True)
    for split, split_clips in clips.items():
        games = list(dict.fromkeys(c.game for c in split_clips))
        for game in games if len(games) <= 12 else []:
            values = list(count([c for c in split_clips if c.game == game]).values())[1:]
            table.add_row(split, printable(game), *(str(values[i]) for i in columns))
        values = list(count(split_clips).values())[1:]
        table.add_row(split, f"all {len(games)}", *(str(values[i]) for i in columns), style="bold", end_section=True)
    return table

"""Checks of a dataset before training: labels, frames, and leaks between splits.

Every problem is reported as a ``Finding``. ``check_fast`` runs the checks that decode few frames;
``validate_dataset`` runs them before training and stops on errors.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.data.config import SPLITS, DataConfig, Split
from tracknet.data.findings import Finding
from tracknet.data.frames import open_frames
from tracknet.data.labels import Clip
from tracknet.data.layouts.reading import format_numbers
from tracknet.data.motion_checks import check_motion
from tracknet.data.splits import DatasetOnDisk, check_stills, open_dataset, resolve_splits
from tracknet.errors import UserError

logger = logging.getLogger(__name__)

HASH_WH = (17, 16)  # width and height that frames are shrunk to for hashing; 16 comparisons in each of 16 rows
# Largest number of differing bits, of 256, between the hashes of one scene. Frames of one court and camera differ by up
# to 33 bits, however many rallies apart they are; frames of different courts differ by 49 and more (33 broadcast clips
# of tennis, badminton and volleyball).
SAME_SCENE_BITS = 40
# Smallest movement between two frames that counts as a jump, as a fraction of the frame width. The fastest serve, seen
# from a camera behind the court, moves by a tenth.
JUMP = 0.15
# Clips, evenly spaced, whose motion is checked before training; one takes half a second. check_data checks all clips.
MOTION_CLIPS = 96


@dataclass(frozen=True)
class ClipHashes:
    """Appearance of a clip.

    Attributes:
        split: name of the split that the clip belongs to.
        clip: the clip itself.
        hashes: difference hashes of a few of its frames, bool ``[n, 256]``.
    """

    split: str
    clip: Clip
    hashes: np.ndarray


def read_skipping_errors(
    dataset: DatasetOnDisk, entries: dict[Split, list[str]], num_frames: int
) -> tuple[dict[Split, list[Clip]], list[Finding]]:
    """Read the clips of all splits and report errors as findings instead of raising them.

    Args:
        dataset: dataset to read from.
        entries: names of games or clips by split.
        num_frames: number of frames per window. If it exceeds one, splits of single images are a finding.

    Returns:
        Clips that can be read, by split, and findings.
    """
    clips: dict[Split, list[Clip]] = {split: [] for split in entries}
    findings = []
    for split, names in entries.items():
        for entry in names:
            try:
                clips[split] += dataset.read(entry)
            except UserError as error:
                findings.append(Finding("unreadable", True, str(entry), str(error)))
        try:
            check_stills(clips[split], num_frames)
        except UserError as error:
            findings.append(Finding("stills", True, split, str(error)))
    return clips, findings


def check_labels(clips: Sequence[Clip]) -> list[Finding]:
    """Find mistakes in labels without decoding frames."""
    findings = []
    # Checks of each clip.
    for clip in clips:
        where = str(clip.labels_path or clip.name)
        balls = {i: label.xy_image for i, label in sorted(clip.labels.items()) if label.xy_image is not None}
        if not clip.labels:
            findings.append(
                Finding("unlabeled", False, where, "no frame of this clip is labeled; training learns nothing from it.")
            )
        elif not balls:
            findings.append(
                Finding(
                    "no ball", False, where, "no label of this clip has a ball; check whether all positions are blank."
                )
            )
        if ignored := [i for i, label in clip.labels.items() if label.has_ignored_position]:
            findings.append(
                Finding(
                    "absent with a position",
                    False,
                    where,
                    f"{len(ignored)} frames without a ball have a position ({format_numbers(ignored)}), which is"
                    " ignored. If these frames have a ball, set their visibility to a value other than 0; for layout"
                    " csv, data.csv.visibility=null uses the positions alone.",
                )
            )
        if corner := [i for i, xy in balls.items() if xy == (0, 0)]:
            findings.append(
                Finding(
                    "ball in the corner",
                    False,
                    where,
                    f"frames {format_numbers(corner)} have a visible ball at (0, 0). If they have no ball, set their "
                    "visibility to 0, or for layout csv set data.csv.absent_xy=[0,0].",
                )
            )
        # Balls in the corner have their own finding; they are excluded from the checks below.
        balls = {i: xy for i, xy in balls.items() if xy != (0, 0)}
        if jumps := find_jumps(balls, clip.size_wh[0]):
            findings.append(
                Finding(
                    "jump",
                    False,
                    where,
                    f"the ball jumps away and back in frames {format_numbers(jumps)}; check for a label on another"
                    " object or a slip of the mouse.",
                )
            )
        if len(balls) >= 50:
            reach = np.array(list(balls.values())).max(axis=0) / clip.size_wh
            if (reach < 0.55).all():
                findings.append(
                    Finding(
                        "another resolution",
                        False,
                        where,
                        f"all {len(balls)} balls are in the upper left {reach[0]:.0%} x {reach[1]:.0%} of the"
                        f" {clip.size_wh[0]}x{clip.size_wh[1]} frames; check whether the labels were made on smaller"
                        " frames.",
                    )
                )
    # Checks between clips: identical labels, different frame sizes.
    by_labels: dict[tuple, Clip] = {}
    for clip in clips:
        positions = tuple(sorted((i, label.xy_image) for i, label in clip.labels.items() if label.xy_image is not None))
        if len(positions) >= 5 and positions in by_labels:
            findings.append(
                Finding(
                    "same labels",
                    True,
                    clip.name,
                    f"its labels are identical to those of {by_labels[positions].name}; one of the two clips is a "
                    "copy, or has the label file of the other.",
                )
            )
        by_labels.setdefault(positions, clip)
    sizes = {clip.size_wh for clip in clips}
    if len(sizes) > 1:
        names = ", ".join(f"{w}x{h} ({sum(c.size_wh == (w, h) for c in clips)} clips)" for w, h in sorted(sizes))
        findings.append(
            Finding(
                "sizes",
                False,
                "dataset",
                f"clips differ in frame size: {names}. Each clip is resized separately; no change is needed if this"
                " is intended.",
            )
        )
    return findings


def find_jumps(balls: dict[int, tuple[float, float]], width: int) -> list[int]:
    """Return the frames in which the ball jumps away and comes back in the next frame.

    The ball moves by more than ``JUMP`` times the frame width both to and from such a frame, while the positions before
    and after it are less than half as far from each other.

    Args:
        balls: ball positions in pixels, by frame index.
        width: frame width in pixels.
    """
    jumps = []
    for i in balls:
        if i - 1 in balls and i + 1 in balls:
            before, current, after = (np.array(balls[j]) for j in (i - 1, i, i + 1))
            away, back = np.linalg.norm(current - before), np.linalg.norm(after - current)
            if min(away, back) > JUMP * width and np.linalg.norm(after - before) < min(away, back) / 2:
                jumps.append(i)
    return jumps


def hash_frame(image: np.ndarray) -> np.ndarray | None:
    """Return the difference hash of an image.

    Each of the 256 bits tells whether the image gets brighter from left to right in one cell of a 16x16 grid.

    Args:
        image: RGB image uint8 ``[3, h, w]``, or gray image uint8 ``[h, w]``.

    Returns:
        Hash bool ``[256]``, or ``None`` for an image without content, such as the first frame of a fade-in.
    """
    gray = image if image.ndim == 2 else image.mean(axis=0).astype(np.uint8)
    small = cv2.resize(gray, HASH_WH, interpolation=cv2.INTER_AREA).astype(int)
    return (small[:, 1:] > small[:, :-1]).ravel() if small.std() >= 5 else None


def hash_frames(images: Iterable[np.ndarray]) -> np.ndarray:
    """Return the hashes, bool ``[n, 256]``, of the images that have content."""
    hashes = [h for h in map(hash_frame, images) if h is not None]
    return np.stack(hashes) if hashes else np.zeros((0, 256), bool)


def hash_clips(clips: dict[Split, list[Clip]]) -> tuple[list[ClipHashes], list[Finding]]:
    """Hash a few frames of each clip: two of a video, three of an image sequence.

    Args:
        clips: clips by split.

    Returns:
        Scenes of the clips that can be decoded, and a finding for each clip that cannot.
    """
    hashes_by_clip, findings = [], []
    for split, split_clips in clips.items():
        for clip in split_clips:
            picked = sorted({0, clip.num_frames // 2, *([clip.num_frames - 1] if clip.video is None else [])})
            frames = open_frames(clip, (128, 72))
            try:
                hashes_by_clip.append(ClipHashes(split, clip, hash_frames(frames[i] for i in picked)))
            except UserError as error:
                findings.append(Finding("unreadable", True, clip.name, str(error)))
    return hashes_by_clip, findings


def same_scene_bits(config: DataConfig) -> int:
    """Return the largest number of differing bits between the hashes of one scene.

    For rendered games it is 0: each game is a separate scene, even if two of many happen to look alike.
    """
    return SAME_SCENE_BITS if config.synthetic is None else 0


def find_leaks(hashes_by_clip: Sequence[ClipHashes], most_bits: int) -> list[Finding]:
    """Find pairs of splits that share a scene: the same court and camera, or even the same frames.

    Args:
        hashes_by_clip: hashes of the clips of all splits.
        most_bits: largest number of differing bits between the hashes of one scene.

    Returns:
        At most one finding for each pair of splits, about its most similar frames.
    """
    findings = []
    stacked = {split: _stack([s for s in hashes_by_clip if s.split == split]) for split in SPLITS}
    for split_a, split_b in itertools.combinations(SPLITS, 2):
        (hashes_a, owners_a), (hashes_b, owners_b) = stacked[split_a], stacked[split_b]
        if not owners_a or not owners_b:
            continue
        # The dot product of two sign vectors is the number of equal bits minus the number of differing bits, so that
        # one matrix product compares all pairs of hashes.
        bits = (256 - hashes_a @ hashes_b.T) / 2
        i, j = np.unravel_index(bits.argmin(), bits.shape)
        if bits[i, j] <= most_bits:
            shared = "the same frames" if bits[i, j] == 0 else "the same court and camera"
            findings.append(
                Finding(
                    "leak",
                    True,
                    f"{split_a} and {split_b}",
                    f"{owners_a[i].name} ({split_a}) and {owners_b[j].name} ({split_b}) show {shared}"
                    f" ({bits[i, j]:.0f} of 256 bits differ), so scores would not measure how well unseen games are"
                    " tracked. Put both clips into one split, or set data.allow_leaks=true.",
                )
            )
    return findings


def _stack(hashes_by_clip: Sequence[ClipHashes]) -> tuple[np.ndarray, list[Clip]]:
    """Return all hashes as signs, float32 ``[n, 256]`` of 1 and -1, and the clip of each hash."""
    owners = [item.clip for item in hashes_by_clip for _ in item.hashes]
    hashes = np.concatenate([np.zeros((0, 256), bool), *(item.hashes for item in hashes_by_clip)])
    return np.where(hashes, 1, -1).astype(np.float32), owners


def check_fast(
    clips: dict[Split, list[Clip]],
    mixed: Sequence[Clip] = (),
    most_bits: int = SAME_SCENE_BITS,
    with_motion: bool = False,
) -> list[Finding]:
    """Run the checks that decode few frames: labels, leaks between splits and, if requested, motion.

    Args:
        clips: clips by split.
        mixed: clips of further training datasets; they are checked for leaks and motion.
        most_bits: largest number of differing bits between the hashes of one scene, see ``same_scene_bits``.
        with_motion: whether to check that labels are on moving objects, in at most ``MOTION_CLIPS`` clips.
    """
    all_clips = [clip for split_clips in clips.values() for clip in split_clips]
    with_mixed = {**clips, "train": [*clips.get("train", []), *mixed]}
    hashes_by_clip, findings = hash_clips(with_mixed)
    findings += check_labels(all_clips)
    if with_motion:
        readable = [item.clip for item in hashes_by_clip]
        picked = np.linspace(0, len(readable) - 1, min(len(readable), MOTION_CLIPS)).round().astype(int)
        findings += check_motion([readable[i] for i in picked])[0]
    return findings + find_leaks(hashes_by_clip, most_bits)


def needs_motion_check(config: DataConfig) -> bool:
    """Return whether training checks that labels are on moving objects; labels of rendered rallies always are."""
    return config.check_motion and config.synthetic is None


def validate_dataset(config: DataConfig, clips: dict[Split, list[Clip]], mixed: Sequence[Clip]) -> None:
    """Run the fast checks before training and log the findings as warnings.

    The clips of the test split are included as far as they are on disk.

    Args:
        config: data section of the configuration.
        clips: clips of the training and validation splits.
        mixed: clips of further training datasets.

    Raises:
        UserError: if a finding makes training or scores meaningless. Leaks count only without ``data.allow_leaks``.
    """
    dataset = open_dataset(config)
    tests = resolve_splits(config, dataset, needed=())["test"]
    found, _ = read_skipping_errors(dataset, {"test": tests}, config.sequence.length)
    findings = check_fast({**clips, **found}, mixed, same_scene_bits(config), needs_motion_check(config))
    errors = [f for f in findings if f.is_error and not (config.allow_leaks and f.kind in ("leak", "same labels"))]
    if errors:
        raise UserError(f"{errors[0].kind}: {errors[0].where}: {errors[0].message}")
    for finding in findings[:3]:
        logger.warning(f"{finding.kind}: {finding.where}: {finding.message}")
    if len(findings) > 3:
        logger.warning(
            f"… and {len(findings) - 3} more. Run 'tracknet check_data' with the same --data and data.* settings to"
            " list all of them."
        )

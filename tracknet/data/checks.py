"""What is wrong with a dataset, before the first epoch: in its labels, in its frames, and between its splits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.data.config import SPLITS, DataConfig, Split
from tracknet.data.findings import Finding
from tracknet.data.frames import open_source
from tracknet.data.layouts.reading import some
from tracknet.data.motion_checks import check_motion
from tracknet.data.splits import Dataset, check_stills, open_dataset, resolve_splits
from tracknet.errors import UserError
from tracknet.labels import Clip

logger = logging.getLogger(__name__)

HASH_WH = (17, 16)
# Of 256 bits of the hash. Frames of one court and camera differ by up to 33, however many rallies lie between them,
# other courts by 49 and more (33 broadcast clips of tennis, badminton and volleyball).
SAME_SCENE_BITS = 40
# Of the picture's width, within one frame: the fastest serve from a camera behind the court moves by a tenth.
JUMP = 0.15
MOTION_CLIPS = 96  # of which training looks at the motion, spread evenly, half a second each; check_data looks at all


@dataclass(frozen=True)
class Scene:
    """What a clip looks like: hashes of some of its frames, ``[n, 256]`` bool."""

    split: str
    clip: Clip
    hashes: np.ndarray


def read_skipping_errors(
    dataset: Dataset, entries: dict[Split, list[str]], num_frames: int
) -> tuple[dict[Split, list[Clip]], list[Finding]]:
    """Read the games of splits; what cannot be read, and single pictures, become a finding instead of an end."""
    clips: dict[Split, list[Clip]] = {split: [] for split in entries}
    findings = []
    for split, of_split in entries.items():
        for entry in of_split:
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
    """Look for mistakes in labels alone."""
    findings = []
    for clip in clips:
        where = str(clip.labels_path or clip.name)
        balls = {i: label.xy_image for i, label in sorted(clip.labels.items()) if label.xy_image is not None}
        if not clip.labels:
            findings.append(Finding("unlabeled", False, where, "no frame of this clip is labeled; it teaches nothing."))
        elif not balls:
            findings.append(
                Finding("no ball", False, where, "no frame of this clip shows a ball; are all positions blank?")
            )
        if ignored := [i for i, label in clip.labels.items() if label.has_ignored_position]:
            findings.append(
                Finding(
                    "absent with a position",
                    False,
                    where,
                    f"{len(ignored)} frames without a ball carry a position all the same ({some(ignored)}), which is"
                    " not read. If there is a ball, its visibility is not 0; of layout csv, data.csv.visibility=null"
                    " lets the positions count.",
                )
            )
        if corner := [i for i, xy in balls.items() if xy == (0, 0)]:
            findings.append(
                Finding(
                    "ball in the corner",
                    False,
                    where,
                    f"frames {some(corner)} have a visible ball at (0, 0); where there is none, "
                    "visibility is 0, or of layout csv data.csv.absent_xy=[0,0].",
                )
            )
        # Of those in the corner nothing else is to be told.
        balls = {i: xy for i, xy in balls.items() if xy != (0, 0)}
        if jumps := find_jumps(balls, clip.size_wh[0]):
            findings.append(
                Finding(
                    "jump",
                    False,
                    where,
                    f"the ball leaps away and back in frames {some(jumps)}; another object, or a slip of the mouse?",
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
                        f" {clip.size_wh[0]}x{clip.size_wh[1]} picture; are the labels those of smaller frames?",
                    )
                )
    by_labels: dict[tuple, Clip] = {}
    for clip in clips:
        positions = tuple(sorted((i, label.xy_image) for i, label in clip.labels.items() if label.xy_image is not None))
        if len(positions) >= 5 and positions in by_labels:
            findings.append(
                Finding(
                    "same labels",
                    True,
                    clip.name,
                    f"its labels are those of {by_labels[positions].name}, number for number; one of "
                    "the two is a copy, or has another's label file.",
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
                f"clips differ in size: {names}. Each is resized by itself; fine, if it is meant.",
            )
        )
    return findings


def find_jumps(balls: dict[int, tuple[float, float]], width: int) -> list[int]:
    """Return frames in which the ball is far from where it is both before and after, which are near each other."""
    jumps = []
    for i in balls:
        if i - 1 in balls and i + 1 in balls:
            before, at, after = (np.array(balls[j]) for j in (i - 1, i, i + 1))
            away, back = np.linalg.norm(at - before), np.linalg.norm(after - at)
            if min(away, back) > JUMP * width and np.linalg.norm(after - before) < min(away, back) / 2:
                jumps.append(i)
    return jumps


def hash_frame(image: np.ndarray) -> np.ndarray | None:
    """Return 256 bits of a picture: whether it brightens from left to right in each cell of a 16x16 grid (the
    "difference hash").

    Args:
        image: uint8 ``[3, h, w]``, or gray ``[h, w]``.

    Returns:
        Bool ``[256]``; ``None`` of a picture that shows nothing, such as one that fades in.
    """
    gray = image if image.ndim == 2 else image.mean(axis=0).astype(np.uint8)
    small = cv2.resize(gray, HASH_WH, interpolation=cv2.INTER_AREA).astype(int)
    return (small[:, 1:] > small[:, :-1]).ravel() if small.std() >= 5 else None


def hash_frames(images: Iterable[np.ndarray]) -> np.ndarray:
    """Return the hashes ``[n, 256]`` of those pictures that show something."""
    hashes = [h for h in map(hash_frame, images) if h is not None]
    return np.stack(hashes) if hashes else np.zeros((0, 256), bool)


def hash_scenes(clips: dict[Split, list[Clip]]) -> tuple[list[Scene], list[Finding]]:
    """Decode a few frames of each clip: of a video two, of images three. What cannot be decoded is a finding."""
    scenes, findings = [], []
    for split, of_split in clips.items():
        for clip in of_split:
            picked = sorted({0, clip.num_frames // 2, *([clip.num_frames - 1] if clip.video is None else [])})
            frames = open_source(clip, (128, 72))
            try:
                scenes.append(Scene(split, clip, hash_frames(frames[i] for i in picked)))
            except UserError as error:
                findings.append(Finding("unreadable", True, clip.name, str(error)))
    return scenes, findings


def same_scene_bits(config: DataConfig) -> int:
    """Return how many bits the hashes of one scene differ in at most. Rendered games are scenes of their own however
    alike two of many happen to be."""
    return SAME_SCENE_BITS if config.synthetic is None else 0


def find_leaks(scenes: Sequence[Scene], most_bits: int) -> list[Finding]:
    """Look for splits that show one scene: the same court from the same camera, or even the same frames."""
    findings = []
    stacked = {split: _stack([s for s in scenes if s.split == split]) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        (hashes_a, owners_a), (hashes_b, owners_b) = stacked[one], stacked[other]
        if not owners_a or not owners_b:
            continue
        # Of signs, a product counts agreements less differences: all pairs at once.
        bits = (256 - hashes_a @ hashes_b.T) / 2
        i, j = np.unravel_index(bits.argmin(), bits.shape)
        if bits[i, j] <= most_bits:
            what = "the same frames" if bits[i, j] == 0 else "the same court and camera"
            findings.append(
                Finding(
                    "leak",
                    True,
                    f"{one} and {other}",
                    f"{owners_a[i].name} ({one}) and {owners_b[j].name} ({other}) show {what} ({bits[i, j]:.0f} of 256"
                    " bits differ): scores would not tell how well games never seen are followed. Put both into one"
                    " split, or say data.allow_leaks=true.",
                )
            )
    return findings


def _stack(scenes: Sequence[Scene]) -> tuple[np.ndarray, list[Clip]]:
    """Return all hashes as signs ``[n, 256]``, and the clip of each."""
    owners = [scene.clip for scene in scenes for _ in scene.hashes]
    hashes = np.concatenate([np.zeros((0, 256), bool), *(scene.hashes for scene in scenes)])
    return np.where(hashes, 1, -1).astype(np.float32), owners


def check_fast(
    clips: dict[Split, list[Clip]],
    mixed: Sequence[Clip] = (),
    most_bits: int = SAME_SCENE_BITS,
    with_motion: bool = False,
) -> list[Finding]:
    """Run what needs few frames: labels, two or three pictures of each clip, and some around its labels.

    Args:
        clips: by split.
        mixed: clips of further datasets to train on.
        most_bits: see ``same_scene_bits``.
        with_motion: whether to look if labels lie on what moves, of ``MOTION_CLIPS`` clips at most.
    """
    everything = [clip for of_split in clips.values() for clip in of_split]
    together = {**clips, "train": [*clips.get("train", []), *mixed]}
    scenes, findings = hash_scenes(together)
    findings += check_labels(everything)
    if with_motion:
        seen = [scene.clip for scene in scenes]
        picked = np.linspace(0, len(seen) - 1, min(len(seen), MOTION_CLIPS)).round().astype(int)
        findings += check_motion([seen[i] for i in picked])[0]
    return findings + find_leaks(scenes, most_bits)


def needs_motion_check(config: DataConfig) -> bool:
    """Return whether training looks if labels lie on what moves. Those of rendered rallies do."""
    return config.check_motion and config.synthetic is None


def validate_dataset(config: DataConfig, clips: dict[Split, list[Clip]], mixed: Sequence[Clip]) -> None:
    """Run the fast checks before training: on its clips, and on what of the test games lies beside them; say what was
    found.

    Raises:
        UserError: something that makes training or scores meaningless; a leak only without ``data.allow_leaks``.
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
            f"… and {len(findings) - 3} more: tracknet check_data with the same --data and data.… shows all."
        )

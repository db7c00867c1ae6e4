"""What moves in a clip around its labels: in a few short runs of frames, with the camera's own motion taken out."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.data.frames import Frames, open_source
from tracknet.labels import Clip, Visibility

LOOK_WH = (512, 288)
RUNS = 3  # stretches of a clip that are looked at
LABELS_PER_RUN = 8  # neighbors share the frames that are decoded for them
# Frames on either side of a label: its neighbor, another where that repeats it, and one where a label is a frame off.
MARGIN = 3
# A ball that labels move by less than this, in pixels of a frame of LOOK_WH, may rest; nothing is asked of it.
MOVES = 1.5
NEIGHBOR = 5  # frames apart at most, between which labels tell how fast a ball is
# A video brought to another frame rate repeats frames, which differ by compression alone: in the pixel that changes
# most by less than this share of what others differ by (up to 0.11 in broadcast clips, against 0.3 and more).
REPEATS = 0.12
# Where a ball is, something changes by at least so many gray levels, and is among the largest changes of the picture.
LEAST_CHANGE = 8
MOVING_SHARE = 1 / 200
REACH = 1  # pixels around a label


@dataclass(frozen=True)
class Motion:
    """What moves in some frames of a clip.

    Attributes:
        changes: by frame, how much each pixel differs from the frame before or from the one after, whichever is less,
            uint8 ``[h, w]``.
        balls: by frame, where the labels that are looked at have the ball, in pixels of the clip.
        size_wh: of the clip's frames.
    """

    changes: dict[int, np.ndarray]
    balls: dict[int, np.ndarray]
    size_wh: tuple[int, int]

    def moves_at(self, frame: int, xy_image: np.ndarray) -> bool | None:
        """Return whether something moves at a place of a frame; ``None`` where it was not compared with others."""
        if frame not in self.changes:
            return None
        changes = self.changes[frame]
        h, w = changes.shape
        x, y = np.round((xy_image + 0.5) * (w, h) / np.array(self.size_wh) - 0.5).astype(int)
        if not (0 <= x < w and 0 <= y < h):
            return False
        rank = round(w * h * MOVING_SHARE)
        least = max(LEAST_CHANGE, np.partition(changes.ravel(), -rank)[-rank])
        return bool(changes[max(0, y - REACH) : y + REACH + 1, max(0, x - REACH) : x + REACH + 1].max() >= least)


def see_motion(clip: Clip) -> Motion:
    """Decode a few runs of a clip's frames around labels of a ball that moves, and compare neighbors.

    Args:
        clip: with its labels.

    Returns:
        What moves in those frames; nothing where too little is labeled.

    Raises:
        UserError: a frame cannot be decoded.
    """
    balls = {
        i: np.array(label.xy_image)
        for i, label in sorted(clip.labels.items())
        if label.xy_image not in (None, (0, 0)) and label.visibility is not Visibility.OCCLUDED  # a corner is no ball
    }
    # The first and the last frame have no neighbor to compare with.
    moving = [i for i in _choose_moving(balls, clip.size_wh) if 0 < i < clip.num_frames - 1]
    chosen = _choose_runs(moving)
    frames = open_source(clip, LOOK_WH)
    changes: dict[int, np.ndarray] = {}
    for first, last in _join_runs(chosen, clip.num_frames):
        wanted = {j for i in chosen if first <= i <= last for j in (i - 1, i, i + 1)}
        changes |= _compare(_decode(frames, first, last), wanted)
    return Motion(changes, {i: balls[i] for i in chosen}, clip.size_wh)


def _choose_moving(balls: dict[int, np.ndarray], size_wh: tuple[int, int]) -> list[int]:
    """Return the frames in which, as the labels have it, the ball moves, or in which nothing tells whether it does."""
    if balls and max(float(xy.max()) for xy in balls.values()) <= 1:  # fractions of the picture rather than pixels
        return list(balls)
    scale = np.array(LOOK_WH) / size_wh
    labeled, moving = list(balls), []
    for k, i in enumerate(labeled):
        speeds = [
            np.linalg.norm((balls[i] - balls[j]) * scale) / abs(i - j)
            for j in (*labeled[max(0, k - 1) : k], *labeled[k + 1 : k + 2])
            if abs(i - j) <= NEIGHBOR
        ]
        if not speeds or max(speeds) >= MOVES:
            moving.append(i)
    return moving


def _choose_runs(labeled: list[int]) -> list[int]:
    """Choose runs of neighboring labels from evenly spaced parts of a clip."""
    if len(labeled) <= RUNS * LABELS_PER_RUN:
        return labeled
    starts = [int((run + 0.5) * len(labeled) / RUNS - LABELS_PER_RUN / 2) for run in range(RUNS)]
    return sorted({labeled[start + k] for start in starts for k in range(LABELS_PER_RUN)})


def _join_runs(chosen: list[int], num_frames: int) -> list[tuple[int, int]]:
    """Return the stretches of frames to decode, first and last: labels with their margins, joined where these meet."""
    stretches: list[tuple[int, int]] = []
    for i in chosen:
        first, last = max(0, i - MARGIN), min(num_frames - 1, i + MARGIN)
        if stretches and first <= stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], last)
        else:
            stretches.append((first, last))
    return stretches


def _decode(frames: Frames, first: int, last: int) -> dict[int, np.ndarray]:
    """Decode a stretch of frames in gray."""
    return {
        i: cv2.cvtColor(np.ascontiguousarray(frames[i].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        for i in range(first, last + 1)
    }


def _compare(gray: dict[int, np.ndarray], wanted: set[int]) -> dict[int, np.ndarray]:
    """Return what changes in some frames of a stretch; frames that repeat one another count as one."""
    numbers = list(gray)
    differences = [int(cv2.absdiff(gray[i], gray[i - 1]).max()) for i in numbers[1:]]
    bound = REPEATS * float(np.quantile(differences, 0.9)) if differences else 0.0
    groups = [numbers[:1]]
    for i, difference in zip(numbers[1:], differences):
        if difference <= bound:
            groups[-1].append(i)
        else:
            groups.append([i])
    changes: dict[int, np.ndarray] = {}
    for before, now, after in zip(groups, groups[1:], groups[2:]):
        if wanted.isdisjoint(now):
            continue
        picture = gray[now[0]]
        change = np.minimum(
            *(cv2.absdiff(picture, _follow_camera(gray[other[0]], picture)) for other in (before, after))
        )
        changes |= dict.fromkeys(wanted.intersection(now), change)
    return changes


def _follow_camera(image: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Shift, turn and scale a picture as most of it moves toward another."""
    corners = cv2.goodFeaturesToTrack(image, 200, 0.01, 8)
    if corners is None or len(corners) < 12:
        return image
    moved, found, _ = cv2.calcOpticalFlowPyrLK(image, to, corners, None)
    found = found.ravel().astype(bool)
    if found.sum() < 12:
        return image
    matrix, _ = cv2.estimateAffinePartial2D(corners[found], moved[found], method=cv2.RANSAC, ransacReprojThreshold=1.0)
    if matrix is None:
        return image
    h, w = image.shape
    edges = np.array([[0, 0, 1], [w, 0, 1], [0, h, 1], [w, h, 1]], float)
    if np.abs(edges @ matrix.T - edges[:, :2]).max() < 0.3:  # a camera at rest: no need to blur
        return image
    return cv2.warpAffine(image, matrix, (w, h), borderMode=cv2.BORDER_REPLICATE)

"""Motion detection around the labels of a clip.

A few short runs of frames are compared with their neighbors after the motion of the camera has been compensated.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.data.frames import Frames, open_frames
from tracknet.data.labels import Clip, Visibility

LOOK_WH = (512, 288)  # width and height at which frames are compared, in pixels
RUNS = 3  # runs of labels that are checked per clip
LABELS_PER_RUN = 8  # labels per run; neighboring labels share the decoded frames
# Frames decoded on either side of a label: its neighbor, one more in case the neighbor repeats it, and one more for
# labels that are off by one frame.
MARGIN = 3
# Smallest speed of a moving ball, in pixels of LOOK_WH per frame. A ball whose labels move less may be at rest and is
# not checked.
MOVES = 1.5
NEIGHBOR = 5  # largest distance, in frames, between two labels from which the speed of the ball is computed
# Threshold for repeated frames. A video converted to another frame rate contains repeats that differ only by
# compression: their largest pixel difference is below this fraction of that of other frames (up to 0.11 in broadcast
# clips, against 0.3 and more for distinct frames).
REPEATS = 0.12
# A moving ball changes its pixels by at least this many gray levels, and these changes are among the largest of the
# frame: within this fraction of its pixels.
LEAST_CHANGE = 8
MOVING_SHARE = 1 / 200
REACH = 1  # pixels around a label that are searched for motion, at LOOK_WH


@dataclass(frozen=True)
class Motion:
    """Motion in selected frames of a clip.

    Attributes:
        changes: differences in gray levels to the previous or the next frame, whichever is smaller, for each pixel,
            uint8 ``[h, w]`` by frame index.
        balls: ball positions of the labels to check, in pixels of the clip, float ``[2]`` by frame index.
        size_wh: width and height of the clip's frames in pixels.
    """

    changes: dict[int, np.ndarray]
    balls: dict[int, np.ndarray]
    size_wh: tuple[int, int]

    def moves_at(self, frame: int, xy_image: np.ndarray) -> bool | None:
        """Return whether something moves at a position of a frame.

        Args:
            frame: frame index.
            xy_image: position in pixels of the clip, ``[2]``.

        Returns:
            Whether there is motion; ``None`` if the frame was not compared with its neighbors.
        """
        if frame not in self.changes:
            return None
        changes = self.changes[frame]
        h, w = changes.shape
        # From pixels of the clip to pixels of LOOK_WH, both with pixel centers at integers.
        x, y = np.round((xy_image + 0.5) * (w, h) / np.array(self.size_wh) - 0.5).astype(int)
        if not (0 <= x < w and 0 <= y < h):
            return False
        # The change at the position must reach both the absolute threshold and the frame's own quantile.
        rank = round(w * h * MOVING_SHARE)
        least = max(LEAST_CHANGE, np.partition(changes.ravel(), -rank)[-rank])
        return bool(changes[max(0, y - REACH) : y + REACH + 1, max(0, x - REACH) : x + REACH + 1].max() >= least)


def see_motion(clip: Clip) -> Motion:
    """Detect motion in a few runs of frames around the labels of a moving ball.

    Args:
        clip: clip with its labels.

    Returns:
        Motion in the frames of these labels and in their neighbors; empty if too few frames are labeled.

    Raises:
        UserError: if a frame cannot be decoded.
    """
    # (0, 0) is a placeholder rather than a ball, and an occluded ball cannot be seen to move.
    balls = {
        i: np.array(label.xy_image)
        for i, label in sorted(clip.labels.items())
        if label.xy_image not in (None, (0, 0)) and label.visibility is not Visibility.OCCLUDED
    }
    # The first and the last frame of a clip lack one of the two neighbors to compare with.
    moving = [i for i in _choose_moving(balls, clip.size_wh) if 0 < i < clip.num_frames - 1]
    chosen = _choose_runs(moving)
    frames = open_frames(clip, LOOK_WH)
    changes: dict[int, np.ndarray] = {}
    for first, last in _join_runs(chosen, clip.num_frames):
        # Include the neighbors of each label, which tests whether labels are off by one frame.
        wanted = {j for i in chosen if first <= i <= last for j in (i - 1, i, i + 1)}
        changes |= _compare(_decode(frames, first, last), wanted)
    return Motion(changes, {i: balls[i] for i in chosen}, clip.size_wh)


def _choose_moving(balls: dict[int, np.ndarray], size_wh: tuple[int, int]) -> list[int]:
    """Return the frames in which the ball moves according to its labels, or in which its speed is unknown."""
    # Positions of at most 1 are fractions of the frame rather than pixels; they give no speed in pixels.
    if balls and max(float(xy.max()) for xy in balls.values()) <= 1:
        return list(balls)
    scale = np.array(LOOK_WH) / size_wh
    labeled, moving = list(balls), []
    for k, i in enumerate(labeled):
        # Speeds, in pixels of LOOK_WH per frame, from the previous label and to the next one.
        speeds = [
            np.linalg.norm((balls[i] - balls[j]) * scale) / abs(i - j)
            for j in (*labeled[max(0, k - 1) : k], *labeled[k + 1 : k + 2])
            if abs(i - j) <= NEIGHBOR
        ]
        if not speeds or max(speeds) >= MOVES:
            moving.append(i)
    return moving


def _choose_runs(labeled: list[int]) -> list[int]:
    """Choose ``RUNS`` evenly spaced runs of ``LABELS_PER_RUN`` neighboring labels, or all labels if they are fewer."""
    if len(labeled) <= RUNS * LABELS_PER_RUN:
        return labeled
    starts = [int((run + 0.5) * len(labeled) / RUNS - LABELS_PER_RUN / 2) for run in range(RUNS)]
    return sorted({labeled[start + k] for start in starts for k in range(LABELS_PER_RUN)})


def _join_runs(chosen: list[int], num_frames: int) -> list[tuple[int, int]]:
    """Return the ranges of frames to decode, each as its first and last frame.

    A range consists of labels with ``MARGIN`` frames on either side; ranges that touch or overlap are joined.
    """
    ranges: list[tuple[int, int]] = []
    for i in chosen:
        first, last = max(0, i - MARGIN), min(num_frames - 1, i + MARGIN)
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
    return ranges


def _decode(frames: Frames, first: int, last: int) -> dict[int, np.ndarray]:
    """Decode a range of frames to gray images, uint8 ``[h, w]`` by frame index."""
    return {
        i: cv2.cvtColor(np.ascontiguousarray(frames[i].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        for i in range(first, last + 1)
    }


def _compare(gray: dict[int, np.ndarray], wanted: set[int]) -> dict[int, np.ndarray]:
    """Compare the wanted frames of a range with their neighbors; repeated frames count as one.

    Args:
        gray: consecutive gray images by frame index.
        wanted: indices of the frames to compare; those without a neighbor on either side are skipped.

    Returns:
        Changes by frame index, see ``Motion.changes``.
    """
    # Group frames that repeat one another: their differences are small compared to the largest ones of the range.
    numbers = list(gray)
    differences = [int(cv2.absdiff(gray[i], gray[i - 1]).max()) for i in numbers[1:]]
    bound = REPEATS * float(np.quantile(differences, 0.9)) if differences else 0.0
    groups = [numbers[:1]]
    for i, difference in zip(numbers[1:], differences):
        if difference <= bound:
            groups[-1].append(i)
        else:
            groups.append([i])
    # Compare each group with both of its neighbors. A moving ball differs from both, whereas what it uncovers or covers
    # differs from one of them alone, so take the minimum.
    changes: dict[int, np.ndarray] = {}
    for before, current, after in zip(groups, groups[1:], groups[2:]):
        if wanted.isdisjoint(current):
            continue
        image = gray[current[0]]
        change = np.minimum(
            *(cv2.absdiff(image, _compensate_camera(gray[other[0]], image)) for other in (before, after))
        )
        changes |= dict.fromkeys(wanted.intersection(current), change)
    return changes


def _compensate_camera(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Align a gray image with another one by the camera motion between them.

    The motion is a translation, rotation and scaling, estimated from tracked corners with RANSAC, so that moving
    objects do not affect it. The image is returned unchanged if too few corners are found or the camera is at rest.
    """
    corners = cv2.goodFeaturesToTrack(image, 200, 0.01, 8)
    if corners is None or len(corners) < 12:
        return image
    moved, found, _ = cv2.calcOpticalFlowPyrLK(image, target, corners, None)
    found = found.ravel().astype(bool)
    if found.sum() < 12:
        return image
    matrix, _ = cv2.estimateAffinePartial2D(corners[found], moved[found], method=cv2.RANSAC, ransacReprojThreshold=1.0)
    if matrix is None:
        return image
    h, w = image.shape
    edges = np.array([[0, 0, 1], [w, 0, 1], [0, h, 1], [w, h, 1]], float)
    # With a camera at rest no corner of the frame moves; do not interpolate then, which would blur the image.
    if np.abs(edges @ matrix.T - edges[:, :2]).max() < 0.3:
        return image
    return cv2.warpAffine(image, matrix, (w, h), borderMode=cv2.BORDER_REPLICATE)

"""Whether labels lie on what moves: in a few short runs of a clip's frames, spread over its labelled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from tracknet.data.frames import open_source
from tracknet.labels import Clip, Visibility

LOOK_WH = (512, 288)
RUNS = 8  # of neighbouring frames
LABELS_PER_RUN = 4
MARGIN = 2  # frames on either side of a label: its neighbours, and theirs where it may mean a neighbour
STANDS_STILL = 2  # grey levels by which a repeated frame differs at most, after video compression
# Where a ball is there is a change of at least so many grey levels, which is among the largest of the picture.
LEAST_CHANGE = 6
MOVING_SHARE = 1 / 200

Guess = Callable[[int, np.ndarray, np.ndarray], tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Motion:
    """What moves in some frames of a clip.

    Attributes:
        from_one: by frame, how much each pixel differs from the neighbour from which it differs more, uint8 ``[h, w]``; the camera's own
            motion is taken out. A ball that comes to rest, or is slow, shows here.
        from_both: the same of the neighbour from which it differs less: what was in its place in this frame alone, and so in which frame.
        balls: by frame, where labels have the ball, in pixels of the clip.
        size_wh: of the clip's frames.
    """

    from_one: dict[int, np.ndarray]
    from_both: dict[int, np.ndarray]
    balls: dict[int, np.ndarray]
    size_wh: tuple[int, int]

    def share_on_motion(self) -> tuple[float, int]:
        """Return the share of the labels that lie on something that moves, and how many labels that is of."""
        hits = list(_hits(self, self.from_one, as_labelled).values())
        return float(np.mean(hits)) if hits else 1.0, len(hits)

    def hits_in_frame(self, guess: Guess) -> dict[int, bool]:
        """Return by label whether, under a guess, something is at its place that was not there a frame before nor a frame after."""
        return _hits(self, self.from_both, guess)


def _hits(motion: Motion, maps: dict[int, np.ndarray], guess: Guess) -> dict[int, bool]:
    size = np.array(motion.size_wh)
    hits = {}
    for i, xy in motion.balls.items():
        frame, at = guess(i, xy, size)
        if frame not in maps:
            continue
        changes = maps[frame]
        h, w = changes.shape
        x, y = np.round((at + 0.5) * (w, h) / size - 0.5).astype(int)
        hits[i] = False
        if 0 <= x < w and 0 <= y < h:
            rank = round(w * h * MOVING_SHARE)
            least = max(LEAST_CHANGE, np.partition(changes.ravel(), -rank)[-rank])
            hits[i] = bool(changes[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].max() >= least)
    return hits


def as_labelled(frame: int, xy: np.ndarray, size_wh: np.ndarray) -> tuple[int, np.ndarray]:
    """Take a label as it is."""
    return frame, xy


def see_motion(clip: Clip, runs: int = RUNS) -> Motion:
    """Decode a few runs of a clip's frames around labelled balls and compare neighbours.

    Raises:
        UserError: a frame cannot be decoded.
    """
    balls = {
        i: np.array(label.xy_image)
        for i, label in clip.labels.items()
        if label.xy_image is not None and label.visibility is not Visibility.OCCLUDED
    }
    chosen = _choose(sorted(i for i in balls if MARGIN <= i < clip.num_frames - MARGIN), runs)
    wanted = sorted({j for i in chosen for j in range(i - MARGIN, i + MARGIN + 1)})
    frames = open_source(clip, LOOK_WH)
    grey: dict[int, np.ndarray] = {}
    from_one: dict[int, np.ndarray] = {}
    from_both: dict[int, np.ndarray] = {}
    for j in wanted:
        grey[j] = cv2.cvtColor(np.ascontiguousarray(frames[j].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        if j - 1 in grey and j - 2 in grey:
            changes = _compare(grey[j - 2], grey[j - 1], grey[j])
            if changes is not None:
                from_one[j - 1], from_both[j - 1] = np.maximum(*changes), np.minimum(*changes)
        grey.pop(j - 3, None)
    return Motion(from_one, from_both, {i: balls[i] for i in chosen}, clip.size_wh)


def _choose(labelled: list[int], runs: int) -> list[int]:
    """Choose runs of neighbouring labels, spread evenly; neighbours share the frames that are decoded for them."""
    if len(labelled) <= runs * LABELS_PER_RUN:
        return labelled
    starts = np.linspace(0, len(labelled) - LABELS_PER_RUN, runs).round().astype(int)
    return sorted({labelled[s + k] for s in starts for k in range(LABELS_PER_RUN)})


def _compare(before: np.ndarray, now: np.ndarray, after: np.ndarray) -> list[np.ndarray] | None:
    """Return what differs from either neighbour, once it is brought to where the camera looks now; ``None`` where one repeats it."""
    if min(cv2.absdiff(now, other).max() for other in (before, after)) <= STANDS_STILL:
        return None
    return [cv2.absdiff(now, _follow_camera(other, now)) for other in (before, after)]


def _follow_camera(image: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Shift, turn and scale a picture as most of it moves towards another."""
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

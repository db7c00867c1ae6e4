"""Which of a frame's peaks is the ball: the one that lies on the path of something that flies.

A heatmap's highest peak is judged by its own frame alone; on the other side of the net a shoe or a racket is often higher than the ball.
Here every frame offers a few peaks, and the ball is a hidden state that is one of them or none. Its probability given the
frames before and some after is computed exactly (forward-backward; Rabiner, 1989), with states of two neighbouring frames, so
that a path is judged by its change of velocity: little in flight, a lot in a hit or a bounce, which is allowed at a price.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PEAKS = 5  # that a frame offers
LAG = 16  # frames that are looked ahead; a path is settled within a few
BLOCK = 16  # frames that are settled together
# Standard deviations in image widths: of a change of velocity, and of a step where the one before is not known.
ACCELERATION, STEP = 0.008, 0.04
STRAY = 0.02  # probability of a step that follows no path: a hit, a bounce, another ball


class Choice(NamedTuple):
    """The ball of a frame.

    Attributes:
        peak: which of the frame's.
        confidence: probability that the ball is there, in ``[0, 1]``.
    """

    peak: int
    confidence: float


class Trajectory:
    """Chooses frame by frame, in order; a choice is made when ``LAG`` frames or more after it are known.

    Frames are settled in blocks that begin at the clip's first, so a stream is settled like a clip.

    Args:
        image_wh: size of the image in pixels.
    """

    def __init__(self, image_wh: tuple[int, int]):
        self._width, self._area = image_wh[0], image_wh[1] / image_wh[0]
        self._places: list[np.ndarray] = []  # of the frames that are not settled, and of two before them
        self._known = 0  # of these, settled
        self._forward: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        self._own: list[np.ndarray] = []

    def add(self, xy_image: np.ndarray, confidence: np.ndarray) -> list[Choice]:
        """Take the next frame's peaks, ``[peak, 2]`` pixels and ``[peak]`` heights; return the choices that are settled now, in order."""
        height = np.clip(confidence.astype(np.float64), 1e-6, 1 - 1e-6)
        self._places.append(xy_image.astype(np.float64) / self._width)
        # What the frame itself says of each of its peaks, against none being the ball.
        self._own.append(np.append(np.log(height / (1 - height)), 0.0))
        self._steps.append(self._judge_steps())
        if self._forward:
            self._forward.append(_logsumexp(self._forward[-1][:, :, None] + self._steps[-1], 0) + self._own[-1])
        else:
            before = np.full((len(height) + 1,) * 2, -np.inf)
            before[-1] = self._own[-1]  # nothing was seen before the first frame
            self._forward.append(before)
        return self._settle(BLOCK) if len(self._places) - self._known >= BLOCK + LAG else []

    def finish(self) -> list[Choice]:
        """Return the choices of all frames that are left."""
        return self._settle(len(self._places) - self._known)

    def _judge_steps(self) -> np.ndarray:
        """Log of how much likelier than anywhere the newest frame's peaks are: ``[before last, last, newest]``, the last index of each = none."""
        new = self._places[-1]
        n = len(new)
        judged = np.zeros((n + 1,) * 3)
        if len(self._places) > 1:
            last = self._places[-2]
            judged[:, :n, :n] = self._nearness(new[None] - last[:, None], STEP)
            if len(self._places) > 2:
                before = self._places[-3]
                judged[:n, :n, :n] = self._nearness(new - 2 * last[None, :, None] + before[:, None, None], ACCELERATION)
                judged[:n, n, :n] = self._nearness(new[None] - before[:, None], 2 * STEP)
        return judged

    def _nearness(self, distance: np.ndarray, deviation: float) -> np.ndarray:
        gauss = np.exp(-0.5 * (distance**2).sum(-1) / deviation**2) / (2 * np.pi * deviation**2)
        return np.log((1 - STRAY) * self._area * gauss + STRAY)

    def _settle(self, number: int) -> list[Choice]:
        choices: list[Choice] = []
        backward = np.zeros(())
        for i in reversed(range(self._known, len(self._places))):
            if i < len(self._places) - 1:
                backward = _logsumexp(self._steps[i + 1] + self._own[i + 1] + backward, 2)
            both = self._forward[i] + backward
            probability = np.exp(both - both.max()).sum(axis=0)
            probability /= probability.sum()
            peak = int(probability[:-1].argmax())
            choices.append(Choice(peak, float(probability[peak])))
        self._known += number
        drop = max(0, self._known - 2)
        for kept in (self._places, self._forward, self._steps, self._own):
            del kept[:drop]
        self._known -= drop
        return choices[::-1][:number]


def _logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return (np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top).squeeze(axis)

"""Which of a frame's peaks is the ball: the one that lies on the path of something that flies.

A heatmap's highest peak is judged by its own frame alone; on the other side of the net a shoe or a racket is often
higher than the ball. Here every frame offers a few peaks, and the ball is a hidden state that is one of them or none.
Its probability given the frames before and some after is computed exactly (forward-backward; Rabiner, 1989), with
states of two neighboring frames, so that a path is judged by its change of velocity: little in flight, a lot in a hit
or a bounce, which is allowed at a price.

What is false likes to stay: the end of a line, a ball that lies about, a player who waits. Such a place is a perfect
path at rest. So a peak is weighed against the false peaks that the clip has there in other frames: where there are
many, one more is no news.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PEAKS = 5  # that a frame offers
LAG = 16  # frames that a path is looked ahead; it is settled within a few
BLOCK = 16  # frames that are settled together
AROUND = 16  # frames before, and after, whose false peaks are counted
SPREAD = 0.004  # standard deviation of a false peak that stays, in image widths
ANYWHERE = 1.0  # false peaks a frame that turn up anywhere
# Standard deviations in image widths: of a change of velocity, and of a step where the one before is not known.
ACCELERATION, STEP = 0.008, 0.04
STRAY = 0.02  # probability of a step that follows no path: a hit, a bounce, another ball
CHANGE = 0.1  # probability that the ball comes, or goes, from one frame to the next
ODDS = 0.45  # of each peak to be the ball, before anything is known of it


class Choice(NamedTuple):
    """The ball of a frame.

    Attributes:
        peak: which of the frame's.
        confidence: probability that the ball is there, in ``[0, 1]``.
    """

    peak: int
    confidence: float


class _Peaks(NamedTuple):
    """A frame's peaks: places ``[peak, 2]`` in image widths, heights ``[peak]`` between 0 and 1."""

    places: np.ndarray
    heights: np.ndarray


class _Frame(NamedTuple):
    """What is known of a frame; an index of a state is the peak's, or one more for none.

    Attributes:
        places: ``[peak, 2]`` in image widths.
        own: ``[state]`` log of what speaks for each of its peaks but its path, against none being the ball.
        steps: see ``Trajectory._judge_steps``.
        forward: ``[state before, state]`` log probability given all frames up to this one, but for a constant.
    """

    places: np.ndarray
    own: np.ndarray
    steps: np.ndarray
    forward: np.ndarray


class Trajectory:
    """Chooses frame by frame, in order; a choice is made when ``LAG + AROUND`` frames or more after it are known.

    Frames are settled in blocks that begin at the clip's first, so a stream is settled like a clip.

    Args:
        image_wh: size of the image in pixels.
    """

    def __init__(self, image_wh: tuple[int, int]):
        self._width, self._area = image_wh[0], image_wh[1] / image_wh[0]
        self._peaks: list[_Peaks] = []  # of the frames around the next that is judged
        self._next = 0  # which of these that is
        self._frames: list[_Frame] = []  # judged: those that are not settled, and two before them
        self._known = 0  # of these, settled

    def add(self, xy_image: np.ndarray, confidence: np.ndarray) -> list[Choice]:
        """Take the next frame's peaks, ``[peak, 2]`` pixels and ``[peak]`` heights; return the choices that are settled
        now, in order."""
        heights = np.clip(confidence.astype(np.float64), 1e-6, 1 - 1e-6)
        self._peaks.append(_Peaks(xy_image.astype(np.float64) / self._width, heights))
        if len(self._peaks) - self._next > AROUND:
            self._judge_next()
        return self._settle(BLOCK) if len(self._frames) - self._known >= BLOCK + LAG else []

    def finish(self) -> list[Choice]:
        """Return the choices of all frames that are left."""
        while self._next < len(self._peaks):
            self._judge_next()
        return self._settle(len(self._frames) - self._known)

    def _judge_next(self) -> None:
        places, heights = self._peaks[self._next]
        own = np.append(np.log(ODDS * heights / (1 - heights)) - np.log(self._false_peaks()), 0.0)
        steps = self._judge_steps(places)
        if self._frames:
            forward = _logsumexp(self._frames[-1].forward[:, :, None] + steps, 0) + own
        else:
            forward = np.full((len(own),) * 2, -np.inf)
            forward[-1] = own  # nothing was seen before the first frame
        self._frames.append(_Frame(places, own, steps, forward))
        self._next += 1
        if self._next > AROUND:
            del self._peaks[0]
            self._next -= 1

    def _false_peaks(self) -> np.ndarray:
        """How many false peaks a frame the frames around have at the next one's places, ``[peak]``; spread evenly over
        the image, one a frame is 1."""
        others = self._peaks[: self._next] + self._peaks[self._next + 1 :]
        if not others:
            return np.full(len(self._peaks[self._next].places), ANYWHERE)
        places = np.concatenate([p.places for p in others])
        false = 1 - np.concatenate([p.heights for p in others])  # the higher a peak, the likelier it is the ball
        return ANYWHERE + self._gauss(self._peaks[self._next].places[:, None] - places, SPREAD) @ false / len(others)

    def _judge_steps(self, new: np.ndarray) -> np.ndarray:
        """Log of how likely a step is: ``[before last, last, next]``, the last index of each = none; of places, against
        being anywhere."""
        n = len(new)
        judged = np.zeros((n + 1,) * 3)
        if self._frames:
            last = self._frames[-1].places
            judged[:, :n, :n] = self._nearness(new[None] - last[:, None], STEP)
            if len(self._frames) > 1:
                before = self._frames[-2].places
                judged[:n, :n, :n] = self._nearness(new - 2 * last[None, :, None] + before[:, None, None], ACCELERATION)
                judged[:n, n, :n] = self._nearness(new[None] - before[:, None], 2 * STEP)
            there = np.arange(len(last) + 1) < len(last), np.arange(n + 1) < n
            judged += np.log(np.where(np.equal.outer(*there), 1 - CHANGE, CHANGE))
        return judged

    def _nearness(self, distance: np.ndarray, deviation: float) -> np.ndarray:
        return np.log((1 - STRAY) * self._gauss(distance, deviation) + STRAY)

    def _gauss(self, distance: np.ndarray, deviation: float) -> np.ndarray:
        """Density of ``[..., 2]``, where an even one over the image is 1."""
        return self._area * np.exp(-0.5 * (distance**2).sum(-1) / deviation**2) / (2 * np.pi * deviation**2)

    def _settle(self, number: int) -> list[Choice]:
        choices: list[Choice] = []
        backward = np.zeros(())
        later: _Frame | None = None
        for frame in reversed(self._frames[self._known :]):
            if later is not None:
                backward = _logsumexp(later.steps + later.own + backward, 2)
            both = frame.forward + backward
            probability = np.exp(both - both.max()).sum(axis=0)
            probability /= probability.sum()
            peak = int(probability[:-1].argmax())
            choices.append(Choice(peak, float(probability[peak])))
            later = frame
        settled = self._known + number
        self._known = min(settled, 2)
        del self._frames[: settled - self._known]
        return choices[::-1][:number]


def _logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return (np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top).squeeze(axis)

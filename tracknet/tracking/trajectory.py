"""Choice of the ball among the heatmap peaks of each frame, by its trajectory over time.

The highest peak of a heatmap depends on a single frame, and on the far side of the net a shoe or a racket often has a
higher peak than the ball. Here each frame contributes a few candidate peaks. The hidden state of a frame is one of its
peaks or none, and its probability given all earlier frames and some later ones is computed exactly with the
forward-backward algorithm (Rabiner, 1989). The model is second-order: transitions depend on the states of two
consecutive frames, so a path is scored by its change of velocity. The change is small in flight and large at a hit or a
bounce, which has a low but positive probability.

Static false detections (line ends, a ball at rest, a waiting player) persist over time and form a perfect path at rest.
Therefore the evidence for a peak is divided by the density of false peaks at its position in the surrounding frames:
the more false peaks there are, the less evidence another peak provides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PEAKS = 5  # candidate peaks per frame
LAG = 16  # look-ahead in frames before a path is final; it is usually certain within a few
BLOCK = 16  # frames whose choices are made together
AROUND = 16  # frames before a frame, and after it, in which false peaks are counted
SPREAD = 0.004  # standard deviation of the position of a static false peak, in image widths
ANYWHERE = 1.0  # expected false peaks per frame at random positions
# Standard deviations in image widths: change of velocity per frame, and step per frame if the velocity is unknown.
ACCELERATION, STEP = 0.008, 0.04
STRAY = 0.02  # probability of a step that follows no path: a hit, a bounce, another ball
CHANGE = 0.1  # probability that the ball appears or disappears from one frame to the next
ODDS = 0.45  # prior odds of each peak to be the ball


class Choice(NamedTuple):
    """Ball of one frame.

    Attributes:
        peak: index of the chosen peak among the frame's peaks.
        confidence: probability in ``[0, 1]`` that this peak is the ball.
    """

    peak: int
    confidence: float


class _Peaks(NamedTuple):
    """Peaks of one frame.

    Attributes:
        positions: positions ``[peak, 2]`` in image widths.
        heights: peak confidences ``[peak]``, strictly between 0 and 1.
    """

    positions: np.ndarray
    heights: np.ndarray


class _Frame(NamedTuple):
    """Terms of the forward-backward algorithm for one frame.

    A state is the index of a peak, or the number of peaks for "no ball".

    Attributes:
        positions: positions ``[peak, 2]`` in image widths.
        log_evidence: log odds ``[state]`` of each state against "no ball", regardless of the path; 0 for "no ball".
        steps: log likelihood of steps ``[state two frames before, previous state, state]``, see
            ``Trajectory._score_steps``.
        forward: log probability ``[previous state, state]`` given all frames up to this one, up to a constant.
    """

    positions: np.ndarray
    log_evidence: np.ndarray
    steps: np.ndarray
    forward: np.ndarray


class Trajectory:
    """Online choice of the ball among each frame's peaks, in frame order.

    The choice for a frame is made once at least ``LAG + AROUND`` later frames are known. Choices are made in blocks
    that are aligned to the clip's first frame, so a stream gives the same choices as a clip.

    Args:
        image_wh: width and height of the source images in pixels.
    """

    def __init__(self, image_wh: tuple[int, int]):
        # All lengths are in image widths, in which the image has an area of height / width.
        self._width, self._area = image_wh[0], image_wh[1] / image_wh[0]
        self._peaks: list[_Peaks] = []  # peaks of the next frame to score and of the frames around it
        self._next = 0  # index in _peaks of the next frame to score
        self._frames: list[_Frame] = []  # scored frames without a choice, preceded by up to two with one
        self._num_chosen = 0  # frames at the start of _frames that already have a choice

    def add(self, xy_image: np.ndarray, confidence: np.ndarray) -> list[Choice]:
        """Add the peaks of the next frame.

        Args:
            xy_image: positions of the peaks ``[peak, 2]`` in pixels.
            confidence: heights of the peaks ``[peak]`` in ``[0, 1]``.

        Returns:
            Choices that have become final, in frame order.
        """
        # The log odds of a height of exactly 0 or 1 would be infinite.
        heights = np.clip(confidence.astype(np.float64), 1e-6, 1 - 1e-6)
        self._peaks.append(_Peaks(xy_image.astype(np.float64) / self._width, heights))
        # A frame is scored when the AROUND frames after it are known.
        if len(self._peaks) - self._next > AROUND:
            self._score_next_frame()
        return self._choose(BLOCK) if len(self._frames) - self._num_chosen >= BLOCK + LAG else []

    def finish(self) -> list[Choice]:
        """Return the choices of all remaining frames, in frame order."""
        while self._next < len(self._peaks):
            self._score_next_frame()
        return self._choose(len(self._frames) - self._num_chosen)

    def _score_next_frame(self) -> None:
        """Compute the evidence and the forward message of the next frame, and append it to the scored frames."""
        positions, heights = self._peaks[self._next]
        log_evidence = np.append(np.log(ODDS * heights / (1 - heights)) - np.log(self._count_false_peaks()), 0.0)
        steps = self._score_steps(positions)
        # Forward recursion. Axis 0 is the state two frames before, which is summed out.
        if self._frames:
            forward = _logsumexp(self._frames[-1].forward[:, :, None] + steps, 0) + log_evidence
        else:
            forward = np.full((len(log_evidence),) * 2, -np.inf)
            forward[-1] = log_evidence  # before the first frame, the only possible state is "no ball"
        self._frames.append(_Frame(positions, log_evidence, steps, forward))
        self._next += 1
        # Drop the oldest frame when it is outside the neighborhood of all frames to come.
        if self._next > AROUND:
            del self._peaks[0]
            self._next -= 1

    def _count_false_peaks(self) -> np.ndarray:
        """Estimate the density of false peaks at the peaks of the next frame.

        Returns:
            Density ``[peak]`` per frame of the surrounding frames, relative to the uniform density over the image: one
            false peak per frame, spread evenly over the image, gives 1.
        """
        frames = self._peaks[: self._next] + self._peaks[self._next + 1 :]
        if not frames:
            return np.full(len(self._peaks[self._next].positions), ANYWHERE)
        xy = np.concatenate([p.positions for p in frames])
        # The higher a peak, the more likely it is the ball, so each peak counts as false with a weight of 1 - height.
        false = 1 - np.concatenate([p.heights for p in frames])
        # Constant density of random false peaks, plus a Gaussian kernel density estimate of the static ones.
        return ANYWHERE + self._gaussian(self._peaks[self._next].positions[:, None] - xy, SPREAD) @ false / len(frames)

    def _score_steps(self, positions: np.ndarray) -> np.ndarray:
        """Compute the log likelihood of all steps from the two last scored frames to the next frame.

        Args:
            positions: positions of the next frame's peaks ``[peak, 2]`` in image widths.

        Returns:
            Log likelihood ``[state two frames before, previous state, state]``, in which the last index of each axis is
            "no ball"; positions are measured against the uniform density over the image.
        """
        n = len(positions)
        log_likelihood = np.zeros((n + 1,) * 3)
        if self._frames:
            previous = self._frames[-1].positions
            # Ball in the previous frame only: the velocity is unknown, so score the length of the step.
            log_likelihood[:, :n, :n] = self._log_density(positions[None] - previous[:, None], STEP)
            if len(self._frames) > 1:
                earlier = self._frames[-2].positions
                # Ball in both frames: score the change of velocity, which is the second difference of the positions.
                log_likelihood[:n, :n, :n] = self._log_density(
                    positions - 2 * previous[None, :, None] + earlier[:, None, None], ACCELERATION
                )
                # Ball missing in the previous frame only: score a step over two frames.
                log_likelihood[:n, n, :n] = self._log_density(positions[None] - earlier[:, None], 2 * STEP)
            # Probability that the ball appears, disappears, stays, or stays away.
            is_ball = np.arange(len(previous) + 1) < len(previous), np.arange(n + 1) < n
            log_likelihood += np.log(np.where(np.equal.outer(*is_ball), 1 - CHANGE, CHANGE))
        return log_likelihood

    def _log_density(self, distance: np.ndarray, deviation: float) -> np.ndarray:
        """Return the log density of vectors ``[..., 2]`` under a Gaussian mixed with a share ``STRAY`` of uniform."""
        return np.log((1 - STRAY) * self._gaussian(distance, deviation) + STRAY)

    def _gaussian(self, distance: np.ndarray, deviation: float) -> np.ndarray:
        """Return the Gaussian density of vectors ``[..., 2]``, relative to the uniform density over the image."""
        return self._area * np.exp(-0.5 * (distance**2).sum(-1) / deviation**2) / (2 * np.pi * deviation**2)

    def _choose(self, number: int) -> list[Choice]:
        """Choose the peaks of the next ``number`` frames, by a backward pass over all scored frames without a choice.

        Frames that are not needed any more are dropped.
        """
        choices: list[Choice] = []
        backward = np.zeros(())  # log probability [previous state, state] of all later frames
        later: _Frame | None = None
        for frame in reversed(self._frames[self._num_chosen :]):
            if later is not None:
                backward = _logsumexp(later.steps + later.log_evidence + backward, 2)
            log_posterior = frame.forward + backward
            # Subtract the maximum before exponentiating to avoid underflow, and sum out the previous state.
            probability = np.exp(log_posterior - log_posterior.max()).sum(axis=0)
            probability /= probability.sum()
            peak = int(probability[:-1].argmax())
            choices.append(Choice(peak, float(probability[peak])))
            later = frame
        # Keep two frames with a choice: the steps to the next frame depend on the two frames before it.
        num_chosen = self._num_chosen + number
        self._num_chosen = min(num_chosen, 2)
        del self._frames[: num_chosen - self._num_chosen]
        return choices[::-1][:number]


def _logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    """Return ``log(sum(exp(x)))`` along an axis, without overflow or underflow."""
    maximum = x.max(axis=axis, keepdims=True)
    return (np.log(np.exp(x - maximum).sum(axis=axis, keepdims=True)) + maximum).squeeze(axis)

"""Check that labels are on moving objects, and diagnosis of labels that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tracknet.data.findings import Finding
from tracknet.data.labels import Clip
from tracknet.data.motion import Motion, see_motion
from tracknet.errors import UserError
from tracknet.progress import track

FEWEST = 6  # smallest number of labels of a moving ball that can be judged
# Smallest fraction of the labels of a moving ball that are on motion; docs/data.md describes the clips it was chosen on
# and how it performs.
FLOOR = 0.4
# Evidence required to report a guess: fraction of all labels that are on motion under it, and number of labels that are
# on motion under it alone.
GUESS_FLOOR = 0.6
GUESS_GAINS = 5

# Another interpretation of the labels: maps frame index, position and frame size (both in pixels) of a label to the
# frame index and the position in pixels that it would then mean. The names below complete the message in ``judge``.
Guess = Callable[[int, np.ndarray, np.ndarray], tuple[int, np.ndarray]]
GUESSES: dict[str, Guess] = {
    "if they were one frame earlier (frames count from 1 in the labels)": lambda i, xy, wh: (i - 1, xy),
    "if they were one frame later": lambda i, xy, wh: (i + 1, xy),
    "with x and y swapped": lambda i, xy, wh: (i, xy[::-1]),
    "if they were for 1920x1080": lambda i, xy, wh: (i, xy * wh / (1920, 1080)),
    "if they were for 1280x720": lambda i, xy, wh: (i, xy * wh / (1280, 720)),
    "if they were for 640x360": lambda i, xy, wh: (i, xy * wh / (640, 360)),
    "if they were for 512x288": lambda i, xy, wh: (i, xy * wh / (512, 288)),
    "as fractions of the image size": lambda i, xy, wh: (i, xy * wh),
}


@dataclass(frozen=True)
class Score:
    """Number of labels that are on motion under a guess, compared with the labels as they are.

    Attributes:
        number: number of labels that can be compared.
        hits: number of them that are on motion under the guess.
        gained: number of them that are on motion under the guess, but not as they are.
        lost: number of them that are on motion as they are, but not under the guess.
    """

    number: int = 0
    hits: int = 0
    gained: int = 0
    lost: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.number + other.number, self.hits + other.hits, self.gained + other.gained, self.lost + other.lost
        )

    @property
    def share(self) -> float:
        """Fraction of the labels that are on motion, in ``[0, 1]``."""
        return self.hits / max(self.number, 1)


Scores = dict[str, Score]  # by guess; the key AS_THEY_ARE is for unchanged labels
AS_THEY_ARE = "as they are"


def score_labels(motion: Motion) -> Scores:
    """Score the labels of a clip as they are and under each guess."""
    size = np.array(motion.size_wh)
    as_they_are = {i: motion.moves_at(i, xy) for i, xy in motion.balls.items()}
    scores = {}
    for name, guess in {AS_THEY_ARE: lambda i, xy, wh: (i, xy), **GUESSES}.items():
        judged = [(as_they_are[i], motion.moves_at(*guess(i, xy, size))) for i, xy in motion.balls.items()]
        # Both frames must have been compared with their neighbors.
        pairs = [(actual, guessed) for actual, guessed in judged if actual is not None and guessed is not None]
        scores[name] = Score(
            len(pairs),
            sum(guessed for _, guessed in pairs),
            sum(guessed and not actual for actual, guessed in pairs),
            sum(actual and not guessed for actual, guessed in pairs),
        )
    return scores


def check_motion(clips: Sequence[Clip]) -> tuple[list[Finding], list[Clip]]:
    """Check that the labels of clips are on moving objects.

    Clips with fewer than ``FEWEST`` labels of a moving ball are judged together with other such clips of their game.

    Args:
        clips: clips with their labels.

    Returns:
        Findings, and the clips that have too few labels to be judged even together.
    """
    findings: list[Finding] = []
    sparse: dict[str, list[tuple[Clip, Scores]]] = {}
    with ThreadPoolExecutor() as pool:
        for clip, scores in zip(clips, track(pool.map(_score_clip, clips), "Checking labels", len(clips))):
            if isinstance(scores, Finding):
                findings.append(scores)
            elif scores[AS_THEY_ARE].number >= FEWEST:
                findings += judge(scores, str(clip.labels_path or clip.name))
            else:
                sparse.setdefault(clip.game, []).append((clip, scores))
    # Add up the scores of clips with few labels by game.
    undecided = []
    for game, scored_clips in sparse.items():
        combined = {name: sum((scores[name] for _, scores in scored_clips), Score()) for name in scored_clips[0][1]}
        if combined[AS_THEY_ARE].number >= FEWEST:
            findings += judge(combined, f"{game}, {len(scored_clips)} clips of few labels taken together")
        else:
            undecided += [clip for clip, _ in scored_clips]
    return findings, undecided


def _score_clip(clip: Clip) -> Scores | Finding:
    """Score the labels of a clip; return a finding if its frames cannot be read."""
    try:
        return score_labels(see_motion(clip))
    except UserError as error:
        return Finding("unreadable", True, str(clip.labels_path or clip.name), str(error))


def judge(scores: Scores, where: str) -> list[Finding]:
    """Return a finding if labels are not on motion, or if another interpretation clearly fits better.

    Args:
        scores: scores of at least ``FEWEST`` labels, by guess.
        where: clip or game that the labels belong to.

    Returns:
        One finding, or none if the labels are plausible.
    """
    actual = scores[AS_THEY_ARE]
    best = max(GUESSES, key=lambda name: (scores[name].gained, -scores[name].lost))
    guess = scores[best]
    # The guess applies either to all labels, or to a part of them: then it gains some labels, loses others, and the
    # labels that are on motion one way or the other are nearly all labels.
    of_all = guess.share >= GUESS_FLOOR and guess.gained >= 5 * guess.lost
    of_part = guess.gained >= guess.number / 4 and actual.hits + guess.gained >= 0.9 * guess.number
    checked = f"of the {actual.number} labels that were checked"
    if guess.gained >= GUESS_GAINS and (of_all or of_part):
        message = (
            f"{actual.hits} {checked} ({actual.share:.0%}) are on something that moves, and {guess.gained} others"
            f" would be {best}. Correct the labels. If they are right nevertheless, set data.check_motion=false."
        )
        return [Finding("misaligned", True, where, message)]
    if actual.share < FLOOR:
        message = (
            f"{actual.share:.0%} {checked} are on something that moves; labels of a ball reach {FLOOR:.0%} or more. "
            "Check whether they belong to another video or to another part of this one. If they are right, and the ball"
            " is at rest or too faint for its motion to be detected, set data.check_motion=false."
        )
        return [Finding("not on the ball", True, where, message)]
    return []

"""Whether labels lie on what moves; and if they do not, what they might mean instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tracknet.data.findings import Finding
from tracknet.data.motion import Motion, see_motion
from tracknet.errors import UserError
from tracknet.labels import Clip
from tracknet.progress import track

FEWEST = 6  # labels of a moving ball of which something can be told
# Share of the labels of a moving ball that lie on what moves; docs/data.md says which clips chose it and how it holds.
FLOOR = 0.4
# What another meaning must bring to be named: share of all labels on what moves, and labels that only it brings there.
GUESS_FLOOR = 0.6
GUESS_GAINS = 5

# What labels might be instead: frame and position (in pixels, given the size) that a label would then mean.
Guess = Callable[[int, np.ndarray, np.ndarray], tuple[int, np.ndarray]]
GUESSES: dict[str, Guess] = {
    "if they were one frame earlier (frames count from 1 in the labels)": lambda i, xy, wh: (i - 1, xy),
    "if they were one frame later": lambda i, xy, wh: (i + 1, xy),
    "with x and y swapped": lambda i, xy, wh: (i, xy[::-1]),
    "if they were for 1920x1080": lambda i, xy, wh: (i, xy * wh / (1920, 1080)),
    "if they were for 1280x720": lambda i, xy, wh: (i, xy * wh / (1280, 720)),
    "if they were for 640x360": lambda i, xy, wh: (i, xy * wh / (640, 360)),
    "if they were for 512x288": lambda i, xy, wh: (i, xy * wh / (512, 288)),
    "as fractions of the picture": lambda i, xy, wh: (i, xy * wh),
}


@dataclass(frozen=True)
class Score:
    """How labels fare under a guess, each against itself as it is.

    Attributes:
        number: labels that can be compared.
        hits: of them, those that lie on what moves under the guess.
        gained: those that do under the guess alone.
        lost: those that do as they are alone.
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
        """Share of the labels that lie on what moves."""
        return self.hits / max(self.number, 1)


Scores = dict[str, Score]  # by guess; of labels as they are under AS_THEY_ARE
AS_THEY_ARE = "as they are"


def score_labels(motion: Motion) -> Scores:
    """Score a clip's labels as they are and under each guess."""
    size = np.array(motion.size_wh)
    as_they_are = {i: motion.moves_at(i, xy) for i, xy in motion.balls.items()}
    scores = {}
    for name, guess in {AS_THEY_ARE: lambda i, xy, wh: (i, xy), **GUESSES}.items():
        judged = [(as_they_are[i], motion.moves_at(*guess(i, xy, size))) for i, xy in motion.balls.items()]
        pairs = [(now, then) for now, then in judged if now is not None and then is not None]
        scores[name] = Score(
            len(pairs),
            sum(then for _, then in pairs),
            sum(then and not now for now, then in pairs),
            sum(now and not then for now, then in pairs),
        )
    return scores


def check_motion(clips: Sequence[Clip]) -> tuple[list[Finding], list[Clip]]:
    """Look whether the labels of clips lie on what moves.

    Clips of too few labels are judged together with the others of their game.

    Args:
        clips: with their labels.

    Returns:
        Findings, and the clips of which nothing can be told.
    """
    findings: list[Finding] = []
    unclear: dict[str, list[tuple[Clip, Scores]]] = {}
    with ThreadPoolExecutor() as pool:
        for clip, scores in zip(clips, track(pool.map(_see, clips), "Looking at labels", len(clips))):
            if isinstance(scores, Finding):
                findings.append(scores)
            elif scores[AS_THEY_ARE].number >= FEWEST:
                findings += judge(scores, str(clip.labels_path or clip.name))
            else:
                unclear.setdefault(clip.game, []).append((clip, scores))
    untold = []
    for game, of_game in unclear.items():
        together = {name: sum((scores[name] for _, scores in of_game), Score()) for name in of_game[0][1]}
        if together[AS_THEY_ARE].number >= FEWEST:
            findings += judge(together, f"{game}, {len(of_game)} clips of few labels taken together")
        else:
            untold += [clip for clip, _ in of_game]
    return findings, untold


def _see(clip: Clip) -> Scores | Finding:
    """Score a clip, or say why its frames cannot be read."""
    try:
        return score_labels(see_motion(clip))
    except UserError as error:
        return Finding("unreadable", True, str(clip.labels_path or clip.name), str(error))


def judge(scores: Scores, where: str) -> list[Finding]:
    """Say what is wrong with labels that lie on nothing that moves, or that clearly mean something else.

    Args:
        scores: of at least ``FEWEST`` labels.
        where: clip or game.
    """
    now = scores[AS_THEY_ARE]
    best = max(GUESSES, key=lambda name: (scores[name].gained, -scores[name].lost))
    guess = scores[best]
    # Either all labels mean something else, or a part does: some are gained, some lost, and together they are all.
    of_all = guess.share >= GUESS_FLOOR and guess.gained >= 5 * guess.lost
    of_part = guess.gained >= guess.number / 4 and now.hits + guess.gained >= 0.9 * guess.number
    looked_at = f"of the {now.number} labels looked at"
    if guess.gained >= GUESS_GAINS and (of_all or of_part):
        message = (
            f"{now.hits} {looked_at} ({now.share:.0%}) lie on something that moves, and {guess.gained} others would "
            f"{best}. Mend the labels; if they are right all the same, say data.check_motion=false."
        )
        return [Finding("misaligned", True, where, message)]
    if now.share < FLOOR:
        message = (
            f"{now.share:.0%} {looked_at} lie on something that moves; of labels on a ball it is {FLOOR:.0%} and more. "
            "Are they of another video, or of another part of this one? If they are right, and the ball is at rest or "
            "too faint to be seen to move, say data.check_motion=false."
        )
        return [Finding("not on the ball", True, where, message)]
    return []

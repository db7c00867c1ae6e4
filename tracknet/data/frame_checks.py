"""What is wrong with the frames of a clip, and whether its labels lie on what moves in them."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from tracknet.data.checks import Finding, hash_frames
from tracknet.data.frames import open_source
from tracknet.data.layouts.reading import some
from tracknet.data.motion import LOOK_WH, RUNS, as_labelled, see_motion
from tracknet.errors import UserError
from tracknet.labels import Clip

LOOKED_AT = 200  # frames of a clip that are compared one by one, at most
FEWEST = 6  # labelled balls of which something can be told
# Share of a clip's labels on what moves. Of 17 clips of tennis and badminton that chose it, own labels have 0.66 and more, those of another clip 0.41
# and less, those shifted by a tenth of the picture 0.19 and less; of 15 further ones of other courts and sports 0.75 and 0.31 and 0.19.
FLOOR = 0.4
FLOOR_OF_FEW = 0.25  # of fewer than 20 labels, which may all be of one stretch


def check_frames(clip: Clip, motion: bool = True) -> tuple[list[Finding], np.ndarray]:
    """Decode the beginning of a clip and compare its frames with each other, and what moves with its labels.

    Args:
        clip: with its labels.
        motion: whether to look at the labels.

    Returns:
        Findings, and hashes ``[n, 256]`` of every eighth frame.
    """
    number = min(clip.num_frames, LOOKED_AT)
    frames = open_source(clip, LOOK_WH)
    where = str(clip.labels_path or clip.name)
    try:
        grey = np.stack(
            [
                cv2.cvtColor(np.ascontiguousarray(frames[i].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
                for i in range(number)
            ]
        )
    except UserError as error:
        return [Finding("unreadable", True, where, str(error))], np.zeros((0, 256), bool)
    findings = []
    same = [i for i in range(1, number) if cv2.absdiff(grey[i], grey[i - 1]).max() <= 2]
    if same:
        findings.append(Finding("duplicate frames", False, where, f"frames {some(same)} repeat the one before; a ball cannot stand still in the air: "
                                "was the video brought to another frame rate?"))  # fmt: skip
    return findings + (check_motion(clip) if motion else []), hash_frames(grey[::8])


def check_motion(clip: Clip, runs: int = RUNS) -> list[Finding]:
    """Look whether a clip's labels lie on what moves, and if not, what they might mean instead.

    Args:
        clip: with its labels; one of few labelled balls passes, because nothing can be told of it.
        runs: of neighbouring frames to decode.
    """
    where = str(clip.labels_path or clip.name)
    try:
        motion = see_motion(clip, runs)
    except UserError as error:
        return [Finding("unreadable", True, where, str(error))]
    share, number = motion.share_on_motion()
    if number < FEWEST:
        return []
    as_they_are = motion.hits_in_frame(as_labelled)
    others = {name: motion.hits_in_frame(guess) for name, guess in GUESSES.items()}
    best = max(others, key=lambda name: _mean(others[name]))
    if _is_clearly_better(others[best], as_they_are):
        return [Finding("misaligned", True, where, f"labels are on something that moves in {_mean(as_they_are):.0%} of the {number} frames looked at, "
                        f"and would be in {_mean(others[best]):.0%} {best}.")]  # fmt: skip
    floor = FLOOR if number >= 20 else FLOOR_OF_FEW
    if share < floor:
        return [Finding("not on the ball", True, where, f"{share:.0%} of the {number} labels looked at lie on something that moves; of labels on the ball "
                        f"it is {floor:.0%} and more. Are they of another video, or of another part of this one? If the ball is at rest, say "
                        "data.check_motion=false.")]  # fmt: skip
    return []


def _mean(hits: dict[int, bool]) -> float:
    return sum(hits.values()) / max(len(hits), 1)


def _is_clearly_better(guess: dict[int, bool], as_they_are: dict[int, bool]) -> bool:
    """Whether a guess explains labels so much better that it is no chance."""
    if len(as_they_are) >= 20:
        return _mean(guess) > max(0.3, 1.4 * _mean(as_they_are))
    # Of few labels: it explains nearly all, several that are wrong as they are, and loses none.
    gained = sum(hit and not as_they_are.get(i, False) for i, hit in guess.items())
    lost = sum(hit and not guess.get(i, False) for i, hit in as_they_are.items())
    return _mean(guess) >= 0.9 and gained >= 5 and lost == 0


# What labels might be instead: frame and position (in pixels, given the size) that a label would then mean.
GUESSES: dict[str, Callable] = {
    "if they were one frame earlier: frames count from 1 in the labels": lambda i, xy, wh: (i - 1, xy),
    "if they were one frame later": lambda i, xy, wh: (i + 1, xy),
    "with x and y swapped": lambda i, xy, wh: (i, xy[::-1]),
    "if they were for 1920x1080": lambda i, xy, wh: (i, xy * wh / (1920, 1080)),
    "if they were for 1280x720": lambda i, xy, wh: (i, xy * wh / (1280, 720)),
    "if they were for 640x360": lambda i, xy, wh: (i, xy * wh / (640, 360)),
    "if they were for 512x288": lambda i, xy, wh: (i, xy * wh / (512, 288)),
    "as fractions of the picture": lambda i, xy, wh: (i, xy * wh),
}

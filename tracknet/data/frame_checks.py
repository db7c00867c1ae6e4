"""What is wrong with the frames of a clip, and whether its labels lie on what moves in them."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from tracknet.data.checks import Finding, hash_frames
from tracknet.data.frames import open_source
from tracknet.data.layouts.reading import some
from tracknet.errors import UserError
from tracknet.labels import Clip, Visibility

LOOKED_AT = 200  # frames of a clip that are decoded, at most
LOOK_WH = (512, 288)


def check_frames(clip: Clip) -> tuple[list[Finding], np.ndarray]:
    """Decode the beginning of a clip and compare frames with each other and with the labels.

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
    moved = _motion(grey)
    balls = {
        i: np.array(x.xy_image)
        for i, x in clip.labels.items()
        if x.xy_image is not None and x.visibility is not Visibility.OCCLUDED
    }
    shares = {name: _share_on_motion(balls, moved, guess, clip.size_wh) for name, guess in GUESSES.items()}
    as_they_are = shares.pop("as they are")
    best = max(shares, key=shares.get)
    if len(balls) >= 20 and shares[best] > max(0.3, 1.4 * as_they_are):
        findings.append(Finding("misaligned", True, where, f"labels are on something that moves in {as_they_are:.0%} of the frames, and would be in "
                                f"{shares[best]:.0%} {best}."))  # fmt: skip
    return findings, hash_frames(grey[::8])


def _motion(grey: np.ndarray) -> np.ndarray:
    """Return what differs from both neighbours, ``[n, h, w]``; the first and the last frame have none."""
    moved = np.zeros_like(grey)
    for i in range(1, len(grey) - 1):
        moved[i] = np.minimum(cv2.absdiff(grey[i], grey[i - 1]), cv2.absdiff(grey[i], grey[i + 1]))
    return moved


# What labels might be instead: frame and position (in pixels, given the size) that a label would then mean.
GUESSES: dict[str, Callable] = {
    "as they are": lambda i, xy, wh: (i, xy),
    "if they were one frame earlier: frames count from 1 in the labels": lambda i, xy, wh: (i - 1, xy),
    "if they were one frame later": lambda i, xy, wh: (i + 1, xy),
    "with x and y swapped": lambda i, xy, wh: (i, xy[::-1]),
    "if they were for 1920x1080": lambda i, xy, wh: (i, xy * wh / (1920, 1080)),
    "if they were for 1280x720": lambda i, xy, wh: (i, xy * wh / (1280, 720)),
    "if they were for 640x360": lambda i, xy, wh: (i, xy * wh / (640, 360)),
    "if they were for 512x288": lambda i, xy, wh: (i, xy * wh / (512, 288)),
    "as fractions of the picture": lambda i, xy, wh: (i, xy * wh),
}


def _share_on_motion(
    balls: dict[int, np.ndarray], moved: np.ndarray, guess: Callable, size_wh: tuple[int, int]
) -> float:
    """Return the share of the labels around which, under a guess, something moves as little else in the frame does."""
    hits = total = 0
    h, w = moved.shape[1:]
    for i, xy in balls.items():
        if not 1 < i < len(moved) - 2:
            continue
        frame, at = guess(i, xy, np.array(size_wh))
        x, y = np.round((at + 0.5) * (w, h) / np.array(size_wh) - 0.5).astype(int)
        total += 1
        if 0 <= x < w and 0 <= y < h:
            around = moved[frame, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].max()
            hits += around >= max(10, np.partition(moved[frame].ravel(), -w * h // 400)[-w * h // 400])
    return hits / total if total else 0.0

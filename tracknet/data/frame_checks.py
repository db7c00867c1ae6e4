"""Checks of the frames of a clip: unreadable and repeated frames."""

from __future__ import annotations

import cv2
import numpy as np

from tracknet.data.checks import hash_frames
from tracknet.data.findings import Finding
from tracknet.data.frames import open_frames
from tracknet.data.labels import Clip
from tracknet.data.layouts.reading import format_numbers
from tracknet.data.motion import LOOK_WH
from tracknet.errors import UserError

LOOKED_AT = 200  # largest number of frames that are decoded and compared per clip


def check_frames(clip: Clip) -> tuple[list[Finding], np.ndarray]:
    """Decode the first ``LOOKED_AT`` frames of a clip and find frames that repeat the frame before.

    Args:
        clip: clip to check.

    Returns:
        Findings, and the difference hashes of every eighth frame, bool ``[n, 256]``. If a frame cannot be decoded, the
        only finding is that error and there are no hashes.
    """
    number = min(clip.num_frames, LOOKED_AT)
    frames = open_frames(clip, LOOK_WH)
    where = str(clip.labels_path or clip.name)
    try:
        gray = np.stack(
            [
                cv2.cvtColor(np.ascontiguousarray(frames[i].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
                for i in range(number)
            ]
        )
    except UserError as error:
        return [Finding("unreadable", True, where, str(error))], np.zeros((0, 256), bool)
    findings = []
    # Frames that differ by at most 2 gray levels in every pixel count as equal.
    repeated = [i for i in range(1, number) if cv2.absdiff(gray[i], gray[i - 1]).max() <= 2]
    if repeated:
        findings.append(
            Finding(
                "duplicate frames",
                False,
                where,
                f"frames {format_numbers(repeated)} repeat the frame before, although a ball in the air cannot stand "
                "still; check whether the video was converted to another frame rate.",
            )
        )
    return findings, hash_frames(gray[::8])

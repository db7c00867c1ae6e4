"""What is wrong with the frames of a clip."""

from __future__ import annotations

import cv2
import numpy as np

from tracknet.data.checks import hash_frames
from tracknet.data.findings import Finding
from tracknet.data.frames import open_source
from tracknet.data.layouts.reading import some
from tracknet.data.motion import LOOK_WH
from tracknet.errors import UserError
from tracknet.labels import Clip

LOOKED_AT = 200  # frames of a clip that are compared one by one, at most


def check_frames(clip: Clip) -> tuple[list[Finding], np.ndarray]:
    """Decode the beginning of a clip and compare its frames with each other.

    Args:
        clip: any.

    Returns:
        Findings, and hashes ``[n, 256]`` of every eighth frame.
    """
    number = min(clip.num_frames, LOOKED_AT)
    frames = open_source(clip, LOOK_WH)
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
    same = [i for i in range(1, number) if cv2.absdiff(gray[i], gray[i - 1]).max() <= 2]
    if same:
        findings.append(
            Finding(
                "duplicate frames",
                False,
                where,
                f"frames {some(same)} repeat the one before; a ball cannot stand still in the air: "
                "was the video brought to another frame rate?",
            )
        )
    return findings, hash_frames(gray[::8])

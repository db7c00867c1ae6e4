"""Pictures of detections."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

BALL_RGB, TRUTH_RGB = (255, 60, 60), (60, 255, 60)


class Trail:
    """Draws the ball and where it has been onto the frames of a video, in order."""

    def __init__(self, length: int = 10):
        self._past: deque[tuple[float, float] | None] = deque(maxlen=length)

    def draw(self, image: np.ndarray, xy: tuple[float, float] | None) -> np.ndarray:
        """Return a copy of RGB ``[h, w, 3]`` with the ball (``None`` = not seen) and its trail.

        The trail is broken where the ball was not seen: nothing is drawn that was not detected.
        """
        self._past.append(xy)
        out = image.copy()
        unit = max(1, round(image.shape[1] / 640))
        points = list(self._past)
        for i, (a, b) in enumerate(zip(points, points[1:]), start=1):
            if a is not None and b is not None:
                strength = i / len(points)
                overlay = out.copy()
                begin, end = _sub_pixel(np.array([a, b]))
                cv2.line(overlay, begin, end, BALL_RGB, unit, cv2.LINE_AA, 4)
                cv2.addWeighted(overlay, strength, out, 1 - strength, 0, dst=out)
        if xy is not None:
            center = _sub_pixel(np.array([xy]))[0]
            cv2.circle(out, center, 5 * unit * 16, BALL_RGB, unit, cv2.LINE_AA, 4)
        return out


def draw_frame(
    image: np.ndarray, truth: tuple[float, float] | None, ball: tuple[float, float] | None, caption: str
) -> np.ndarray:
    """Return a copy with the label (green circle), the detection (red cross), and a caption in a bar above."""
    out = image.copy()
    if truth is not None:
        cv2.circle(out, _whole(truth), 9, TRUTH_RGB, 1, cv2.LINE_AA)
    if ball is not None:
        cv2.drawMarker(out, _whole(ball), BALL_RGB, cv2.MARKER_TILTED_CROSS, 11, 2, cv2.LINE_AA)
    bar = np.zeros((16, image.shape[1], 3), np.uint8)
    cv2.putText(bar, caption, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([bar, out])


def _whole(xy: tuple[float, float]) -> tuple[int, int]:
    return round(xy[0]), round(xy[1])


def _sub_pixel(points: np.ndarray) -> list[tuple[int, int]]:
    """OpenCV draws at 1/16 pixel when coordinates are given with 4 fractional bits."""
    return [tuple(p) for p in np.round(points * 16).astype(int).tolist()]

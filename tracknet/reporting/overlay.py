"""Drawing of detections and labels onto images."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

BALL_RGB, TRUTH_RGB = (255, 60, 60), (60, 255, 60)


class Trail:
    """Overlay of the ball and its recent path on the frames of a video, in order.

    Args:
        length: number of frames that the trail covers, including the current one.
    """

    def __init__(self, length: int = 10):
        self._past: deque[tuple[float, float] | None] = deque(maxlen=length)

    def draw(self, image: np.ndarray, xy: tuple[float, float] | None, confidence: float | None = None) -> np.ndarray:
        """Draw the ball and its trail on a copy of a frame.

        The trail has a gap at every frame without a detection, so that only detections are drawn.

        Args:
            image: RGB image ``[h, w, 3]``, uint8.
            xy: position of the ball in pixels, ``None`` if it is not detected.
            confidence: confidence of the detection in [0, 1], written beside it; ``None`` to leave it out.

        Returns:
            RGB image ``[h, w, 3]``, uint8.
        """
        self._past.append(xy)
        out = image.copy()
        unit = max(1, round(image.shape[1] / 640))  # line width in pixels, larger in large images
        points = list(self._past)
        for i, (a, b) in enumerate(zip(points, points[1:]), start=1):
            if a is not None and b is not None:
                # OpenCV draws opaque lines only. Draw on a copy and blend it in, so that older segments are fainter.
                opacity = i / len(points)
                overlay = out.copy()
                begin, end = _to_fixed_point(np.array([a, b]))
                cv2.line(overlay, begin, end, BALL_RGB, unit, cv2.LINE_AA, 4)
                cv2.addWeighted(overlay, opacity, out, 1 - opacity, 0, dst=out)
        if xy is not None:
            center = _to_fixed_point(np.array([xy]))[0]
            # The radius has 4 fractional bits, too.
            cv2.circle(out, center, 5 * unit * 16, BALL_RGB, unit, cv2.LINE_AA, 4)
            if confidence is not None:
                _write_beside(out, f"{confidence:.2f}", xy, unit)
        return out


def draw_frame(
    image: np.ndarray, truth: tuple[float, float] | None, ball: tuple[float, float] | None, caption: str
) -> np.ndarray:
    """Draw a label and a detection on a copy of a frame, with a caption in a bar above.

    Args:
        image: RGB image ``[h, w, 3]``, uint8.
        truth: labeled position in pixels, drawn as a green circle, or ``None``.
        ball: detected position in pixels, drawn as a red cross, or ``None``.
        caption: text of the bar.

    Returns:
        RGB image ``[h + 16, w, 3]``, uint8.
    """
    out = image.copy()
    if truth is not None:
        cv2.circle(out, _round_xy(truth), 9, TRUTH_RGB, 1, cv2.LINE_AA)
    if ball is not None:
        cv2.drawMarker(out, _round_xy(ball), BALL_RGB, cv2.MARKER_TILTED_CROSS, 11, 2, cv2.LINE_AA)
    bar = np.zeros((16, image.shape[1], 3), np.uint8)
    cv2.putText(bar, caption, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([bar, out])


def _write_beside(image: np.ndarray, text: str, xy: tuple[float, float], unit: int) -> None:
    """Write a text to the right of a point, or to the left of it at the right edge of the image; in place."""
    font, scale, gap = cv2.FONT_HERSHEY_SIMPLEX, 0.4 * unit, 8 * unit
    (width, height), _ = cv2.getTextSize(text, font, scale, unit)
    x, y = _round_xy(xy)
    x = x + gap if x + gap + width <= image.shape[1] else x - gap - width
    origin = (x, min(max(y + height // 2, height), image.shape[0] - 1))
    # A dark outline keeps the text legible on any background.
    for color, thickness in (((0, 0, 0), 3 * unit), (BALL_RGB, unit)):
        cv2.putText(image, text, origin, font, scale, color, thickness, cv2.LINE_AA)


def _round_xy(xy: tuple[float, float]) -> tuple[int, int]:
    return round(xy[0]), round(xy[1])


def _to_fixed_point(points: np.ndarray) -> list[tuple[int, int]]:
    """Convert points ``[n, 2]`` to OpenCV's fixed-point format with 4 fractional bits, which draws at 1/16 pixel."""
    return [tuple(p) for p in np.round(points * 16).astype(int).tolist()]

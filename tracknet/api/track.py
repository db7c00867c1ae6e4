"""Track of the ball in a video: an iterable of detections, with export to a table and an overlay video."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tracknet.data.video import VideoWriter
from tracknet.errors import UserError
from tracknet.files import new_file
from tracknet.progress import track as with_progress
from tracknet.reporting.overlay import Trail
from tracknet.tracking.predictor import EvaluationConfig, Predictor
from tracknet.tracking.records import Detection
from tracknet.tracking.stream import Source, follow
from tracknet.tracking.table import TableWriter, columns_of, to_dicts

if TYPE_CHECKING:
    import pandas


class Track:
    """Detections of the ball for every frame of a video, computed lazily during iteration.

    The video is read and the model is run only once, on demand. Detections are kept, so that a second iteration and
    the methods below do not run the model again.

    Args:
        source: frames of a video or of a folder of images.
        predictor: predictor of the model.
        num_frames: number of frames per window.
        input_wh: width and height of the model's input in pixels.
        settings: evaluation settings: stride of the windows and selection of the ball.

    Attributes:
        source: frames of a video or of a folder of images.
        threshold: minimum confidence of a visible ball, in ``[0, 1]``.
        columns: columns of the table.
    """

    def __init__(
        self,
        source: Source,
        predictor: Predictor,
        num_frames: int,
        input_wh: tuple[int, int],
        settings: EvaluationConfig,
    ):
        self.source, self.threshold = source, settings.threshold
        names = [path.name for path in source.images]
        self.columns = columns_of(predictor.model.has_events, names)
        self._found: list[Detection] = []
        self._frames = follow(source, predictor, num_frames, input_wh, settings)
        self._is_done = False

    def __iter__(self) -> Iterator[Detection]:
        """Yield one detection per frame, in order."""
        # Several iterations may be active at once: each has its own index and extends the shared list where it ends.
        index = 0
        while index < len(self._found) or self._advance() is not None:
            yield self._found[index]
            index += 1

    def __len__(self) -> int:
        """Return the number of frames, after reading the video to its end."""
        return sum(1 for _ in self)

    def _advance(self) -> np.ndarray | None:
        """Detect the ball in the next frame; return the image ``[h, w, 3]``, or ``None`` at the end of the video."""
        if self._is_done:
            return None
        detection, image = next(self._frames, (None, None))
        if detection is None:
            self._is_done = True
            return None
        self._found.append(detection)
        return image

    def _with_images(self) -> Iterator[tuple[Detection, np.ndarray]]:
        """Yield every detection with its image ``[h, w, 3]``, in order.

        Images are not kept in memory. Those of frames that were already iterated over are decoded again.
        """
        num_detected = len(self._found)
        if num_detected:
            for detection, (_, image) in zip(list(self._found), self.source):
                yield detection, image
        while (next_image := self._advance()) is not None:
            yield self._found[-1], next_image

    def is_seen(self, detection: Detection) -> bool:
        """Return whether the confidence of a detection reaches the threshold (``evaluation.threshold``)."""
        return detection.confidence >= self.threshold

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the table of ``ball.csv`` with unrounded values, as a pandas data frame.

        Raises:
            UserError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_dataframe() requires pandas: run pip install pandas, or use to_csv().") from error
        rows = to_dicts(self, self.columns, self.threshold)
        return pandas.DataFrame(rows, columns=[column.name for column in self.columns])

    def to_csv(self, path: str | Path) -> Path:
        """Write the table to a CSV file and return its path; an error leaves no partial file."""
        self.save(csv=path)
        return Path(path)

    def save_overlay(self, path: str | Path) -> Path:
        """Write an MP4 video with the ball and its trail drawn in, and return its path."""
        self.save(overlay=path)
        return Path(path)

    def save(self, csv: str | Path | None = None, overlay: str | Path | None = None) -> None:
        """Write the table and the overlay video in one pass over the frames; an error leaves neither.

        Args:
            csv: path of the table; ``None`` writes no table.
            overlay: path of the video; ``None`` writes no video.
        """
        # A third of a second of trail, at least five frames: ten frames at 30 frames per second.
        trail = Trail(max(5, round(float(self.source.fps) / 3)))
        with contextlib.ExitStack() as stack:
            table = None
            if csv is not None:
                # Entered first, therefore left last: the table gets its final name only after the video was completed.
                work = stack.enter_context(new_file(Path(csv)))
            video = None
            if overlay is not None:
                video = stack.enter_context(VideoWriter(Path(overlay), self.source.size_wh, self.source.fps))
            if csv is not None:
                file = stack.enter_context(work.open("w", newline="", encoding="utf-8"))
                table = TableWriter(file, self.columns, self.threshold)
            # Images are needed for drawing only; without a video, frames that have a detection are not decoded again.
            rows = self._with_images() if video is not None else ((d, None) for d in self)
            for detection, image in with_progress(rows, "Tracking the ball", self.source.num_frames):
                if table is not None:
                    table.write(detection)
                if video is not None and image is not None:
                    xy = detection.xy_image if self.is_seen(detection) else None
                    video.write(trail.draw(image, xy, detection.confidence))

"""Ball of every frame of a video: an iterator of records that can be written as a table and as a video."""

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
    """Ball of every frame of a video, found while it is iterated over.

    The video is read and the model is run once, on demand; detections are kept, so that a second iteration and the
    methods below cost nothing more.

    Args:
        source: frames of a video or a folder of images.
        predictor: runs the model.
        num_frames: frames per window.
        input_wh: size that the model sees frames at.
        settings: how windows lie and how the ball is chosen.

    Attributes:
        source: as given.
        threshold: least confidence of a ball that is seen.
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
        """Yield a detection for every frame, in order."""
        number = 0
        while number < len(self._found) or self._advance() is not None:
            yield self._found[number]
            number += 1

    def __len__(self) -> int:
        """Return the number of frames; reads the video to its end."""
        return sum(1 for _ in self)

    def _advance(self) -> np.ndarray | None:
        """Find the ball of one more frame; return the frame, ``None`` at the end."""
        if self._is_done:
            return None
        detection, image = next(self._frames, (None, None))
        if detection is None:
            self._is_done = True
            return None
        self._found.append(detection)
        return image

    def _with_images(self) -> Iterator[tuple[Detection, np.ndarray]]:
        """Yield detections with their frames; frames that were passed already are read again."""
        begin = len(self._found)
        if begin:
            for detection, (_, image) in zip(list(self._found), self.source):
                yield detection, image
        while (new := self._advance()) is not None:
            yield self._found[-1], new

    def is_seen(self, detection: Detection) -> bool:
        """Whether a detection's confidence reaches the threshold (``evaluation.threshold``)."""
        return detection.confidence >= self.threshold

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the table of ``ball.csv``, unrounded, as a pandas data frame.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_dataframe() needs pandas: pip install pandas. Or use to_csv().") from error
        rows = to_dicts(self, self.columns, self.threshold)
        return pandas.DataFrame(rows, columns=[column.name for column in self.columns])

    def to_csv(self, path: str | Path) -> Path:
        """Write the table, whole or not at all; return its path."""
        self.save(csv=path)
        return Path(path)

    def save_overlay(self, path: str | Path) -> Path:
        """Write a video (MP4) with the ball and its trail drawn in; return its path."""
        self.save(overlay=path)
        return Path(path)

    def save(self, csv: str | Path | None = None, overlay: str | Path | None = None) -> None:
        """Write table and video while reading the frames once, each whole or not at all: an error leaves neither.

        Args:
            csv: where the table goes.
            overlay: where the video goes.
        """
        # Three frames of trail at 10 frames a second, ten at 30.
        trail = Trail(max(5, round(float(self.source.fps) / 3)))
        with contextlib.ExitStack() as stack:
            table = None
            if csv is not None:
                # Entered first, so that the table stands once the overlay does.
                work = stack.enter_context(new_file(Path(csv)))
            video = None
            if overlay is not None:
                video = stack.enter_context(VideoWriter(Path(overlay), self.source.size_wh, self.source.fps))
            if csv is not None:
                file = stack.enter_context(work.open("w", newline="", encoding="utf-8"))
                table = TableWriter(file, self.columns, self.threshold)
            # Frames are needed where they are drawn; without them what is known already is not read again.
            rows = self._with_images() if video is not None else ((d, None) for d in self)
            for detection, image in with_progress(rows, "Following the ball", self.source.num_frames):
                if table is not None:
                    table.write(detection)
                if video is not None and image is not None:
                    video.write(trail.draw(image, detection.xy_image if self.is_seen(detection) else None))

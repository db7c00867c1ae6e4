"""TensorBoard logs, progress bar and log lines of a training run."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tracknet.data.clips import WindowDataset
from tracknet.progress import ProgressBar
from tracknet.tracking.predictor import Predictor

logger = logging.getLogger(__name__)


class Monitor:
    """TensorBoard writer and progress bar of a training run, as a context manager.

    If the files cannot be written, TensorBoard is turned off with a warning and training continues.

    Args:
        log_dir: folder of the TensorBoard files.
        total_steps: number of steps of the whole run.
        start_step: number of steps that the run has completed already.
        quiet: whether to write no TensorBoard files, as in all processes but the first.

    Attributes:
        f1: F1 of the latest validation, ``None`` before the first.
        board: TensorBoard writer, or ``None`` if it is turned off.
    """

    f1: float | None = None

    def __init__(self, log_dir: Path, total_steps: int, start_step: int, quiet: bool = False):
        # A killed run may have written events after its last checkpoint. `purge_step` hides them, because the resumed
        # run writes these steps again.
        purge = start_step + 1 if start_step else None
        self._bar = ProgressBar("train", total_steps, start_step)
        self.board: SummaryWriter | None = None
        if not quiet:
            with self._disabling_board_on_error():
                self.board = SummaryWriter(str(log_dir), purge_step=purge)

    def __enter__(self) -> Monitor:
        self._bar.__enter__()
        # TensorBoard writes in a thread. An error there is raised again by the next write, which logs one line, so the
        # thread's own traceback is suppressed.
        self._excepthook = threading.excepthook
        threading.excepthook = self._ignore_writer_thread
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)
        self._write(lambda board: board.close())
        threading.excepthook = self._excepthook

    def _ignore_writer_thread(self, args: threading.ExceptHookArgs) -> None:
        """Handle an uncaught exception of a thread, except those of TensorBoard's writer."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._excepthook(args)

    def step(self, status: str) -> None:
        """Advance the progress bar by one step.

        Args:
            status: text shown after the bar.
        """
        self._bar.advance(status=status)

    @property
    def shown_f1(self) -> str:
        """F1 of the latest validation as text, ``-`` before the first."""
        return "-" if self.f1 is None else f"{self.f1:.3f}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars, given by their TensorBoard names."""
        self._write(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an RGB image, uint8 ``[h, w, 3]``."""
        self._write(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        """Call ``write`` with the TensorBoard writer, unless it is turned off."""
        if self.board is not None:
            with self._disabling_board_on_error():
                write(self.board)

    @contextlib.contextmanager
    def _disabling_board_on_error(self) -> Iterator[None]:
        """Turn TensorBoard off if writing fails in this context: a full disk must not end the training."""
        try:
            yield
        except OSError as error:
            self.board = None
            logger.warning(
                f"TensorBoard files cannot be written ({error.strerror or error}): training continues without them."
            )


def draw_predictions(frames: Tensor, logits: Tensor, xy: Tensor, visible: Tensor) -> np.ndarray:
    """Draw windows as rows of frames, each blended with its heatmap (red) and marked with its label (green circle).

    Args:
        frames: RGB frames, uint8 ``[batch, frame, 3, h, w]``.
        logits: heatmap logits ``[batch, frame, h / s, w / s]`` with the heatmap stride ``s``.
        xy: ball positions in pixels of the frames, ``[batch, frame, 2]``.
        visible: whether a frame shows the ball, bool ``[batch, frame]``.

    Returns:
        RGB image, uint8 ``[batch * h, frame * w, 3]``.
    """
    h, w = frames.shape[-2:]
    heat = torch.nn.functional.interpolate(logits.sigmoid().float(), size=(h, w), mode="bilinear").cpu().numpy()
    rows = []
    for b in range(len(frames)):
        row = []
        for t in range(frames.shape[1]):
            image = frames[b, t].permute(1, 2, 0).cpu().numpy().astype(np.float32)
            # Blend pure red over the frame, with the probability as opacity.
            red = heat[b, t][..., None]
            image = np.ascontiguousarray((image * (1 - red) + np.array([255.0, 0, 0]) * red).astype(np.uint8))
            if visible[b, t]:
                center = tuple(round(v) for v in xy[b, t].tolist())
                cv2.circle(image, center, 7, (0, 255, 0), 1, cv2.LINE_AA)
            row.append(image)
        rows.append(np.hstack(row))
    return np.vstack(rows)


def show_validation(
    monitor: Monitor, step: int, epoch: int, loss: float, scores: dict, predictor: Predictor, val_set: WindowDataset
) -> None:
    """Write the scores of a validation and four of its windows to TensorBoard, and log one line.

    Args:
        monitor: monitor to write to.
        step: number of steps completed.
        epoch: number of the epoch, from 1.
        loss: loss of the last step, or NaN if it is unknown.
        scores: scores from ``tracking.metrics.score``.
        predictor: predictor of the model.
        val_set: validation windows.
    """
    # Scores. The median error is missing if no ball was found.
    median = scores["median_error_px"]
    values = {f"val/{k}": scores[k] for k in ("precision", "recall", "recall_strict", "f1", "f1_strict", "ap")}
    monitor.scalars(step, {**values, **({"val/median_error_px": median} if median is not None else {})})
    # Up to four windows, evenly spaced over the validation set.
    items = [val_set[i] for i in torch.linspace(0, len(val_set) - 1, min(4, len(val_set))).long().tolist()]
    frames, xy, visible = (torch.stack([item[k] for item in items]) for k in ("frames", "xy", "visible"))
    monitor.picture(step, "val/predictions", draw_predictions(frames, predictor.run(frames)[0], xy, visible))
    # One line for the console.
    error = "-" if median is None else f"{median:.1f} px"
    shown_loss = "      -" if math.isnan(loss) else f"{loss:7.3f}"  # NaN if the run was resumed after this epoch
    logger.info(
        f"epoch {epoch:3d}  step {step:5d}  loss {shown_loss}  val F1 {scores['f1_strict']:.3f} (strict, "
        f"{scores['tolerance_px']:g} px)  precision {scores['precision']:.3f}  recall {scores['recall_strict']:.3f}  "
        f"median error {error}"
    )

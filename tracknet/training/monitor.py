"""What a person sees while a model trains: TensorBoard, a progress bar, one line per epoch."""

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
    """Writes scalars and pictures to TensorBoard and draws the progress bar; ``quiet``, it does nothing.

    Attributes:
        f1: of the latest validation, ``None`` before the first.
    """

    f1: float | None = None

    def __init__(self, log_dir: Path, total_steps: int, start_step: int, quiet: bool = False):
        # purge_step: what a killed run wrote after its last checkpoint is shown no more once it is resumed.
        purge = start_step + 1 if start_step else None
        self._bar = ProgressBar("train", total_steps, start_step)
        self.board: SummaryWriter | None = None
        if not quiet:
            with self._going_on_without_board():
                self.board = SummaryWriter(str(log_dir), purge_step=purge)

    def __enter__(self) -> Monitor:
        self._bar.__enter__()
        # TensorBoard writes in a thread; what fails there comes up with the next write, which says it in one line.
        self._excepthook = threading.excepthook
        threading.excepthook = self._pass_by_writer
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)
        self._write(lambda board: board.close())
        threading.excepthook = self._excepthook

    def _pass_by_writer(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._excepthook(args)

    def step(self, status: str) -> None:
        """Move the bar by one step."""
        self._bar.advance(status=status)

    @property
    def shown_f1(self) -> str:
        """The F1 as a person reads it."""
        return "-" if self.f1 is None else f"{self.f1:.3f}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars by their TensorBoard names."""
        self._write(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an RGB picture ``[h, w, 3]``."""
        self._write(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard, as long as that is possible."""
        if self.board is not None:
            with self._going_on_without_board():
                write(self.board)

    @contextlib.contextmanager
    def _going_on_without_board(self) -> Iterator[None]:
        """Let a disk that is full end the curves, not the training."""
        try:
            yield
        except OSError as error:
            self.board = None
            logger.warning(
                f"TensorBoard's files cannot be written ({error.strerror or error}): the training goes on without them."
            )


def draw_predictions(frames: Tensor, logits: Tensor, xy: Tensor, visible: Tensor) -> np.ndarray:
    """Draw windows as rows: the frame with its label (green circle), blended with the heatmap (red).

    Args:
        frames: uint8 ``[batch, frame, 3, h, w]``.
        logits: ``[batch, frame, ·, ·]``.
        xy: ``[batch, frame, 2]`` in pixels of the frames.
        visible: ``[batch, frame]``.
    """
    h, w = frames.shape[-2:]
    heat = torch.nn.functional.interpolate(logits.sigmoid().float(), size=(h, w), mode="bilinear").cpu().numpy()
    rows = []
    for b in range(len(frames)):
        row = []
        for t in range(frames.shape[1]):
            image = frames[b, t].permute(1, 2, 0).cpu().numpy().astype(np.float32)
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
    """Write a validation's scores and four of its windows to TensorBoard, and print a line."""
    median = scores["median_error_px"]
    values = {f"val/{k}": scores[k] for k in ("precision", "recall", "recall_strict", "f1", "f1_strict", "ap")}
    monitor.scalars(step, {**values, **({"val/median_error_px": median} if median is not None else {})})
    items = [val_set[i] for i in torch.linspace(0, len(val_set) - 1, min(4, len(val_set))).long().tolist()]
    frames, xy, visible = (torch.stack([item[k] for item in items]) for k in ("frames", "xy", "visible"))
    monitor.picture(step, "val/predictions", draw_predictions(frames, predictor.run(frames)[0], xy, visible))
    error = "-" if median is None else f"{median:.1f} px"
    shown_loss = "      -" if math.isnan(loss) else f"{loss:7.3f}"  # of an epoch that another process trained
    logger.info(
        f"epoch {epoch:3d}  step {step:5d}  loss {shown_loss}  val F1 {scores['f1_strict']:.3f} (strict, "
        f"{scores['tolerance_px']:g} px)  precision {scores['precision']:.3f}  recall {scores['recall_strict']:.3f}  "
        f"median error {error}"
    )

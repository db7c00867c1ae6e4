"""Python API of a trained run: load, detect, track, evaluate, train and plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracknet.api.evaluate import evaluate_split
from tracknet.api.plan import plan_mode
from tracknet.api.track import Track
from tracknet.api.train import new_run, train_run
from tracknet.config import Config, compose_data
from tracknet.data.config import Split
from tracknet.data.labels import Clip
from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.planning.estimate import MemoryEstimate
from tracknet.runs.load import load_run, locate_run, report_folder
from tracknet.runs.transfer import swap_adapter as swap_model_adapter
from tracknet.tracking.predictor import Predictor
from tracknet.tracking.records import Detection
from tracknet.tracking.stream import follow, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Frames:
    """Source of frames in memory, for ``follow``.

    Attributes:
        images: uint8 RGB frames, ``[t, h, w, 3]``.
    """

    images: np.ndarray

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the frames in pixels."""
        return self.images.shape[2], self.images.shape[1]

    def __iter__(self) -> Iterator[tuple[None, np.ndarray]]:
        """Yield frames ``[h, w, 3]`` in order, without a time."""
        for image in self.images:
            yield None, image


class Run:
    """Trained model with its configuration, in the quantization and with the adapters it was trained with.

    Use ``load`` or ``train`` to create one.

    Attributes:
        path: folder of the run.
        config: configuration of the run.
        model: the model, in evaluation mode, on ``device``.
        device: device of the model.
        report_dir: folder in which ``evaluate`` writes ``report/``.
    """

    def __init__(
        self, path: Path, config: Config, model: HeatmapModel, device: torch.device, report_dir: Path | None = None
    ):
        self.path, self.config, self.model, self.device = path, config, model, device
        self.report_dir = report_dir or path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.config.model.name}, {self.device})"

    def __call__(self, frames: Tensor) -> Tensor:
        """Compute the heatmap logits of windows of frames.

        Gradients are recorded unless the call is under ``torch.no_grad()``.

        Args:
            frames: uint8 RGB windows ``[batch, frame, 3, h, w]``, at the size that the model was trained with.

        Returns:
            Float32 logits ``[batch, frame, h / s, w / s]``, where ``s`` is the stride of the heatmap.
        """
        return self.model(frames)

    def detect(self, frames: np.ndarray) -> list[Detection]:
        """Detect the ball in consecutive frames.

        Args:
            frames: uint8 RGB frames ``[t, h, w, 3]`` of any size; they are resized to the input size of the model.

        Returns:
            One detection per frame, in pixels of the given frames. Compare its ``confidence`` with
            ``config.evaluation.threshold`` to decide whether the ball is visible, as scoring and ``track`` do.

        Raises:
            UserError: if the frames have another dtype, shape or channel order.
        """
        source = _Frames(check_images(frames))
        return [detection for detection, _ in self._follow(source)]

    def track(self, video: str | Path, fps: float = 30.0, strict: bool = False) -> Track:
        """Track the ball through a video, frame by frame, in bounded memory.

        Args:
            video: video file, or folder of images, which are read in the order of their numbers.
            fps: frame rate of a folder of images, in frames per second.
            strict: whether to refuse a damaged video; otherwise every decodable frame is kept and a warning is logged.

        Returns:
            An iterable of detections, with ``to_dataframe``, ``to_csv`` and ``save_overlay``.

        Raises:
            UserError: if the video does not exist or cannot be read.
        """
        source = open_source(Path(video), fps, None if strict else warn_of_damage)
        config = self.config
        return Track(
            source, self._predictor(), config.data.sequence.length, config.data.preprocess.resize, config.evaluation
        )

    def evaluate(
        self,
        split: Split = "test",
        data: str | None = None,
        overrides: Sequence[str] = (),
        out: str | Path | None = None,
        clips: Sequence[Clip] | None = None,
    ) -> dict:
        """Score the run on a split and write a report.

        Args:
            split: ``train``, ``val`` or ``test``.
            data: name of another dataset (a file in ``configs/data``); ``None`` uses the run's dataset.
            overrides: ``data.key=value`` settings of the other dataset, such as ``data.root``.
            out: folder for the report; ``None`` uses the folder of the run, or ``outputs/hub/`` for one that was
                downloaded or ships with this package.
            clips: own clips to score instead of a split; see ``make_clip``.

        Returns:
            The scores, as written by ``tracknet evaluate --json``.

        Raises:
            UserError: if ``overrides`` are given without ``data``, or the dataset cannot be read.
        """
        config = self.config
        if data is None and overrides:
            raise UserError(
                "evaluate(overrides=…) applies to another dataset: name it with data=, such as data='tracknet'."
            )
        # Another dataset is resized and windowed like the training data, because the model was trained for that input.
        dataset = config.data if data is None else compose_data(data, overrides, None).seen_as(config.data)
        folder = self.report_dir if out is None else Path(out)
        name = "run" if data is None else data
        return evaluate_split(
            config, dataset, split, self._predictor(), folder, name, render=data is not None, clips=clips
        )

    def _predictor(self) -> Predictor:
        """Return a predictor with the batch size of ``config.evaluation``."""
        batch_size = self.config.evaluation.batch_size
        return Predictor(self.model, self.device, self.config.training.micro_batching(batch_size))

    def _follow(self, source: _Frames) -> Iterator[tuple[Detection, np.ndarray]]:
        """Yield the detection and the image of every frame of a source."""
        config = self.config
        return follow(
            source, self._predictor(), config.data.sequence.length, config.data.preprocess.resize, config.evaluation
        )


def load(
    run: str | Path,
    checkpoint: str = "best",
    device: str = "auto",
    revision: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Load a trained run in the quantization and with the adapters it was trained with.

    On the same device, the outputs are bit-equal to those of the trained model.

    Args:
        run: folder of a run or of an export, a hub id ``owner/name``, or ``embedded/NAME``.
        checkpoint: ``best`` or ``last``.
        device: ``auto``, ``cuda`` or ``cpu``.
        revision: commit, tag or branch of a hub id.
        overrides: ``section.key=value`` overrides of the run's configuration, such as ``["training.precision=fp16"]``
            for a GPU without bf16, or ``["evaluation.threshold=0.3"]``.

    Raises:
        UserError: if the run or the checkpoint does not exist, or its files do not fit together.
    """
    path = locate_run(run, revision)
    config, model, resolved_device = load_run(path, checkpoint, [f"training.device={device}", *overrides], "")
    return Run(path, config, model, resolved_device, report_folder(run, path))


def train(
    config: Config,
    output_dir: str | Path = "outputs",
    name: str = "run",
    clips: Mapping[Split, Sequence[Clip]] | None = None,
) -> Run:
    """Train the model that a configuration describes.

    Args:
        config: configuration, as returned by ``compose``.
        output_dir: folder for ``runs/<time>-<name>`` and ``logs/``.
        name: suffix of the run's name, after the time.
        clips: own clips for ``train`` and ``val`` instead of those of ``config.data``; see ``make_clip``.

    Returns:
        The run with its best checkpoint loaded; ``metrics.json`` in its ``path`` contains the measurements of training.
    """
    result = train_run(config, new_run(Path(output_dir), name), clips=clips)
    return load(result["run"], device=config.training.device)


def plan(config: Config, device: str = "cuda") -> MemoryEstimate:
    """Estimate the memory of a training step, without weights and without a GPU.

    Args:
        config: configuration, as returned by ``compose``.
        device: ``cuda`` or ``cpu``.

    Returns:
        An estimate with ``peak_bytes(windows)``, ``bytes_by_kind(windows)`` and ``largest_micro_batch(bytes, batch)``,
        at the level of checkpointing that fits the budget of the configuration.
    """
    return plan_mode(config, device).estimate


def swap_adapter(run: Run, other: str | Path, checkpoint: str = "best", revision: str | None = None) -> None:
    """Replace the adapters and the decoder of a loaded run by those of another run; the base stays in memory.

    Args:
        run: loaded run, changed in place; unchanged if an error is raised.
        other: run with the same settings on the same base, for example of another venue or another sport.
        checkpoint: ``best`` or ``last``.
        revision: commit, tag or branch of a hub id.

    Raises:
        UserError: if the runs differ in model, mode, input or base, or the loaded run contains no base.
    """
    swap_model_adapter(run.model, other, checkpoint, revision)
    run.path, run.config = locate_run(other, revision), run.model.config


def warn_of_damage(problem: str) -> None:
    """Log a warning about a damaged video whose decodable frames are used."""
    logger.warning(f"{problem} The decodable frames are used.")


def check_images(frames: np.ndarray) -> np.ndarray:
    """Check that frames are uint8 RGB ``[t, h, w, 3]``, and return them.

    Other inputs could be scored without an error but would be misread as other pictures, so they are refused.

    Args:
        frames: frames to check.

    Raises:
        UserError: if the type, dtype or shape differs; the message contains the remedy.
    """
    expected = "detect() expects uint8 RGB frames [t, height, width, 3]"
    if not isinstance(frames, np.ndarray):
        raise UserError(f"{expected} as a numpy array, but got a {type(frames).__name__}.")
    if frames.dtype != np.uint8:
        scale = "(frames * 255).round().astype('uint8') for values from 0 to 1"
        raise UserError(f"{expected}, but got dtype {frames.dtype}: pass {scale}, or frames.astype('uint8').")
    shape = list(frames.shape)
    if frames.ndim == 3 and shape[-1] == 3:
        raise UserError(
            f"{expected}, but got a single image {shape}: the ball is found by its motion across frames; pass"
            " frames[None] for a sequence of one."
        )
    if frames.ndim != 4 or 0 in shape:
        raise UserError(f"{expected}, but got shape {shape}.")
    if shape[-1] != 3:
        remedy = "; channels must be last: use frames.transpose(0, 2, 3, 1)" if shape[1] == 3 else ""
        raise UserError(f"{expected}, but got shape {shape}{remedy}.")
    return frames

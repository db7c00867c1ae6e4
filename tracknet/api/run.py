"""A trained run in Python: load it, find balls, follow videos, score it; or train one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracknet.api.evaluate import evaluate_split
from tracknet.api.plan import planner_of
from tracknet.api.track import Track
from tracknet.api.train import new_run, train_run
from tracknet.config import Config, compose_data
from tracknet.data.config import Split
from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.planning.estimate import MemoryEstimate
from tracknet.runs.load import load_run, locate_run
from tracknet.runs.transfer import swap_adapter as swap_model_adapter
from tracknet.tracking.predictor import Predictor
from tracknet.tracking.records import Detection
from tracknet.tracking.stream import follow, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Frames:
    """Frames in memory, as a source to follow the ball in."""

    images: np.ndarray

    @property
    def size_wh(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[1]

    def __iter__(self) -> Iterator[tuple[None, np.ndarray]]:
        for image in self.images:
            yield None, image


class Run:
    """Trained model with its configuration, exactly as it was trained: same quantization, same adapters.

    Made by ``load`` or ``train``.

    Attributes:
        path: folder of the run.
        config: configuration of the run.
        model: in evaluation mode, on ``device``.
        device: where the model is.
    """

    def __init__(self, path: Path, config: Config, model: HeatmapModel, device: torch.device):
        self.path, self.config, self.model, self.device = path, config, model, device

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.config.model.name}, {self.device})"

    def __call__(self, frames: Tensor) -> Tensor:
        """Return float32 logits ``[batch, frame, h / s, w / s]`` of uint8 RGB windows ``[batch, frame, 3, h, w]``.

        The frames have the size that the model was trained at; gradients flow where they are asked for.
        """
        return self.model(frames)

    def detect(self, frames: np.ndarray) -> list[Detection]:
        """Find the ball in frames that follow each other.

        Args:
            frames: uint8 RGB ``[t, h, w, 3]`` of any size; they are resized as the model was trained to see them.

        Returns:
            One detection for each frame, in pixels of the frames given. Whether the ball is seen is a matter of
            ``confidence``: ``config.evaluation.threshold`` is where scoring and ``track`` draw the line.

        Raises:
            UserError: the frames have another dtype, shape or channel order.
        """
        source = _Frames(check_images(frames))
        return [detection for detection, _ in self._follow(source)]

    def track(self, video: str | Path, fps: float = 30.0, strict: bool = False) -> Track:
        """Follow the ball through a video, frame by frame, in bounded memory.

        Args:
            video: video file, or folder of images in the order of their numbers.
            fps: frame rate of a folder of images.
            strict: refuse a damaged video; else every frame that can be decoded is kept, and a warning says so.

        Returns:
            An iterator of detections, with ``to_dataframe``, ``to_csv`` and ``save_overlay``.

        Raises:
            UserError: there is no such video, or it cannot be read.
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
    ) -> dict:
        """Score the run on a split and write a report.

        Args:
            split: ``train``, ``val`` or ``test``.
            data: name of another dataset (a file in ``configs/data``); ``None`` = the run's own.
            overrides: ``data.key=value`` settings of the other dataset, such as ``data.root``.
            out: folder for the report; ``None`` = the run's.

        Returns:
            Scores as ``tracknet evaluate --json`` writes them.
        """
        config = self.config
        if data is None and overrides:
            raise UserError(
                "evaluate(overrides=…) changes another dataset: name it with data=, such as data='tracknet'."
            )
        dataset = config.data if data is None else compose_data(data, overrides, None).seen_as(config.data)
        folder = self.path if out is None else Path(out)
        name = "run" if data is None else data
        return evaluate_split(config, dataset, split, self._predictor(), folder, name, render=data is not None)

    def _predictor(self) -> Predictor:
        batch_size = self.config.evaluation.batch_size
        return Predictor(self.model, self.device, self.config.training.micro_batching(batch_size))

    def _follow(self, source: _Frames) -> Iterator[tuple[Detection, np.ndarray]]:
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
    """Load a trained run: same quantization, same adapters, bit-equal outputs on the same device.

    Args:
        run: folder of a run or of an export, a hub id ``owner/name``, or ``embedded/NAME``.
        checkpoint: ``best`` or ``last``.
        device: ``auto``, ``cuda`` or ``cpu``.
        revision: commit, tag or branch, of a hub id.
        overrides: such as ``["training.precision=fp16"]`` for a GPU without bf16, or ``["evaluation.threshold=0.3"]``.

    Raises:
        UserError: no such run or checkpoint, or its files do not fit together.
    """
    path = locate_run(run, revision)
    config, model, used = load_run(path, checkpoint, [f"training.device={device}", *overrides], "")
    return Run(path, config, model, used)


def train(config: Config, output_dir: str | Path = "outputs", name: str = "run") -> Run:
    """Train what a configuration describes.

    Args:
        config: as ``compose`` gives it.
        output_dir: folder for ``runs/<time>-<name>`` and ``logs/``.
        name: end of the run's name.

    Returns:
        The run in its best state; ``metrics.json`` in ``path`` has what training measured.
    """
    result = train_run(config, new_run(Path(output_dir), name))
    return load(result["run"], device=config.training.device)


def plan(config: Config, device: str = "cuda") -> MemoryEstimate:
    """Estimate the memory of a training step, without weights and without a GPU.

    Args:
        config: as ``compose`` gives it.
        device: ``cuda`` or ``cpu``.

    Returns:
        An estimate: ``peak_bytes(windows)``, ``bytes_by_kind(windows)``, ``largest_micro_batch(bytes, batch)``.
    """
    return planner_of(config, device).estimate


def swap_adapter(run: Run, other: str | Path, checkpoint: str = "best", revision: str | None = None) -> None:
    """Put another run's adapters and decoder onto the base of a loaded run; the base itself stays where it is.

    Args:
        run: changed in place, or not at all.
        other: run of the same settings on the same base: another venue, another sport.
        checkpoint: ``best`` or ``last``.
        revision: commit, tag or branch, of a hub id.

    Raises:
        UserError: the two differ in model, mode, input or base, or the loaded run holds no base.
    """
    swap_model_adapter(run.model, other, checkpoint, revision)
    run.path, run.config = locate_run(other, revision), run.model.config


def warn_of_damage(problem: str) -> None:
    """Log what is wrong with a video whose readable frames are used."""
    logger.warning(f"{problem} The frames that can be decoded are used.")


def check_images(frames: np.ndarray) -> np.ndarray:
    """Refuse frames that would be scored as other pictures.

    Args:
        frames: to be uint8 RGB ``[t, h, w, 3]``.

    Raises:
        UserError: they are not; names the remedy.
    """
    wanted = "detect() takes uint8 RGB frames [t, height, width, 3]"
    if not isinstance(frames, np.ndarray):
        raise UserError(f"{wanted} as a numpy array, and this is a {type(frames).__name__}.")
    if frames.dtype != np.uint8:
        scale = "(frames * 255).round().astype('uint8') for values from 0 to 1"
        raise UserError(f"{wanted}, and these are {frames.dtype}: give {scale}, or frames.astype('uint8').")
    shape = list(frames.shape)
    if frames.ndim == 3 and shape[-1] == 3:
        raise UserError(
            f"{wanted}, and this is one picture {shape}: a ball is found by its motion; frames[None] is one."
        )
    if frames.ndim != 4 or 0 in shape:
        raise UserError(f"{wanted}, and these are {shape}.")
    if shape[-1] != 3:
        remedy = ": channels come last: frames.transpose(0, 2, 3, 1)" if shape[1] == 3 else ""
        raise UserError(f"{wanted}, and these are {shape}{remedy}.")
    return frames

"""The trainer: from a model and windows to the best and the last state of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from tracknet.data.clips import WindowDataset
from tracknet.errors import UserError
from tracknet.memory.meter import count_flushes, measure_memory, reset_peak
from tracknet.memory.micro_batch import MicroBatcher, retry_on_oom
from tracknet.memory.step_meter import Peak, StepMeter
from tracknet.memory.streaming import state_to_mmap_
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.storage import split_state_dict
from tracknet.tracking.metrics import score
from tracknet.tracking.predictor import EvaluationConfig, Predictor, score_windows
from tracknet.training.batches import Batch, epoch_batches, load_batches, mix_seed, to_device
from tracknet.training.checkpoint import save_checkpoint
from tracknet.training.collapse import CollapseWatch, PeakCounts
from tracknet.training.config import TrainingConfig
from tracknet.training.distributed import all_reduce_any, broadcast_object, rank, world_size
from tracknet.training.interruption import Terminated, Termination
from tracknet.training.memory_optimizations import apply_memory_optimizations_
from tracknet.training.monitor import Monitor, show_validation
from tracknet.training.optimizer import (
    build_optimizer,
    build_schedule,
    set_learning_rate,
    state_tensors,
    use_paged_state,
)
from tracknet.training.optimizer_state import load_optimizer
from tracknet.training.state import load_state
from tracknet.training.step import TrainingStep

logger = logging.getLogger(__name__)


class Estimate(Protocol):
    """What is known of a step's memory before it is taken."""

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the peak of a step in micro-batches of this many windows."""


class Planner(Protocol):
    """Estimates memory; ``planning.planner.Planner`` is one."""

    @property
    def estimate(self) -> Estimate:
        """Return the estimate of the step as configured."""

    def suggest_settings(self, micro_batch: int) -> str:
        """Return lines for the user on what would make a step smaller."""


@dataclass
class TrainerConfig:
    """Settings of a trainer.

    Attributes:
        training: training section of the configuration.
        evaluation: how validation is scored.
        device: where the model is.
        seed: of order, augmentation and dropout.
        num_workers: number of loading processes.
        start_micro_batch: windows per micro-batch to begin with where the training section leaves it open; ``None`` =
            the batch.
    """

    training: TrainingConfig
    evaluation: EvaluationConfig
    device: torch.device
    seed: int = 0
    num_workers: int = 0
    start_micro_batch: int | None = None


@dataclass
class Progress:
    """Where a run stands; saved with ``last/`` and enough, with the optimizer, to continue exactly.

    Order, augmentation and dropout are functions of the seed and these numbers, so no generator's state is saved.
    """

    step: int = 0
    best_step: int = 0
    stale_validations: int = 0
    pending_validation: int = 0  # 1 where the epoch that ended with this step was saved before its validation


@dataclass
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: mean over the frames of the batch.
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of the decoder's group.
        peaks: counts of the heatmaps' peaks.
        num_windows: windows in the batch of all processes.
    """

    loss: float
    grad_norm: float
    lr: float
    peaks: PeakCounts
    num_windows: int


@dataclass
class _Measured:
    """Memory of one step, counted tensor by tensor, and the micro-batch that it was counted at."""

    peak: Peak | None = None
    micro_batch: int = 0


class Trainer:
    """Trains a model and keeps its best and its last state.

    Args:
        model: with its mode applied, on its device.
        train_set: augmented windows.
        val_set: windows that choose the best state.
        config: settings.
        planner: estimates memory of the step.

    Attributes:
        progress: where the run stands.
        best: scores of the best validation.
        total_steps: number of the last step.
    """

    def __init__(
        self,
        model: HeatmapModel,
        train_set: WindowDataset,
        val_set: WindowDataset,
        config: TrainerConfig,
        planner: Planner,
    ):
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.config, self.training, self.device = config, config.training, config.device
        self.planner = planner
        self.progress = Progress()
        self.best: dict[str, Any] = {}
        self._measured = _Measured()
        training = config.training
        # The model computes under its own autocast; what fp16 needs besides is the scaling of gradients.
        uses_fp16 = model.compute_dtype == torch.float16
        self.accelerator = Accelerator(mixed_precision="fp16" if uses_fp16 else "no", cpu=self.device.type == "cpu")
        offloads = training.memory_optimization.offloads
        optimizer_config = use_paged_state(training.optimizer, offloads, self.device)
        self._optimizer = build_optimizer(model, optimizer_config, self.device, config.seed)
        steps = math.ceil(train_set.windows_per_epoch / training.batch_size)
        self.steps_per_epoch = min(steps, training.limit_train_batches or steps)
        every_epoch = training.epochs * self.steps_per_epoch
        self.total_steps = min(every_epoch, training.max_steps or every_epoch)
        self._schedule = build_schedule(training.scheduler, self.total_steps, training.epochs)

    def fit(self, open_run: Callable[[], Path], resume_from: Path | None = None) -> dict:
        """Train to the end.

        Args:
            open_run: makes the run's folder, once all is sound, and returns it; TensorBoard files go to
                ``../../logs/<name>``.
            resume_from: checkpoint to continue; the model holds its weights already.

        Returns:
            ``steps``, ``epochs``, ``duration_s``, ``peak_gb``, ``peak_bytes`` of one step with ``bytes_by_kind`` and
            ``planned_peak_bytes``, ``micro_batch_size``, ``best_step`` and the best validation's scores as ``val_*``.
            Processes but the first return the same without the peak.

        Raises:
            UserError: nothing is left to do, memory runs out where nothing helps, or training diverges.
            Terminated: SIGTERM came; what was trained is saved.
        """
        micro_batch_state = self._resume(resume_from) if resume_from is not None else None
        self._split = split_state_dict(self.model, self.training.self_contained)
        # One process writes.
        self.run = Path(broadcast_object(str(open_run()) if rank() == 0 else ""))
        self._prepare(micro_batch_state)
        started, self._start_step = time.perf_counter(), self.progress.step
        reset_peak(self.device)

        self._termination = Termination()
        log_dir = self.run.parent.parent / "logs" / self.run.name
        with (
            self._termination.handled(),
            Monitor(log_dir, self.total_steps, self.progress.step, quiet=rank() > 0) as self._monitor,
        ):
            self._monitor.f1 = self.best.get("f1_strict")
            self.model.train()
            loss = math.nan
            # A run that ended in an epoch's validation begins with it.
            if self.progress.pending_validation:
                self.validate(loss)
            while self.progress.step < self.total_steps and not self._is_stale():
                loss = self._train_epoch()
                if self.progress.pending_validation:
                    self.validate(loss)
            self._log_end()
        return self._summarize(time.perf_counter() - started)

    def _resume(self, checkpoint: Path) -> dict | None:
        """Take up a checkpoint; return what it learned about micro-batches."""
        state = load_state(checkpoint)
        load_optimizer(checkpoint, self._optimizer, state)
        # A state of an older version lacks what was added since.
        known = {f.name: state["progress"][f.name] for f in fields(Progress) if f.name in state["progress"]}
        self.progress, self.best = Progress(**known), state["best"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.progress.step >= self.total_steps and not self.progress.pending_validation:
            raise UserError(
                f"The run is at step {self.progress.step} of {self.total_steps}: nothing is left to do. Raise "
                "training.epochs or training.max_steps to train on."
            )
        return state.get("micro_batch")

    def _prepare(self, micro_batch_state: dict | None) -> None:
        """Apply checkpointing and offload, and put the step together."""
        training, memory = self.training, self.training.memory_optimization
        self._files = self.run.parent.parent / "offload" if memory.use_disk_offload else None
        offload_ctx, offloaded_bytes = apply_memory_optimizations_(self.model, training, self.device, self._files)
        if offloaded_bytes and (self.device.type != "cpu" or self._files is not None):
            place = "files" if self._files else "host memory"
            logger.info(f"{offloaded_bytes / 1e6:,.0f} MB of frozen weights wait in {place} until their block runs.")
        windows = math.ceil(training.batch_size / world_size())
        micro_batch_config = training.micro_batching(windows, self.train_set.config.training_wh)
        micro_batch_config.start_size = micro_batch_config.start_size or self.config.start_micro_batch
        self.micro_batcher = MicroBatcher(
            micro_batch_config,
            partial(all_reduce_any, device=self.device),
            self.planner.suggest_settings,
            partial(count_flushes, self.device),
        )
        self.micro_batcher.restore(micro_batch_state)
        self._predictor = Predictor(self.model, self.device, training.micro_batching(self.config.evaluation.batch_size))
        # The optimizer's state is in place already.
        prepared = self.accelerator.prepare_optimizer(self._optimizer, device_placement=False)
        self._step = TrainingStep(
            self.model, prepared, self.accelerator, self.micro_batcher, offload_ctx, training.loss, training.grad_clip
        )
        self._collapse = CollapseWatch(training.on_collapse)

    def _is_stale(self) -> bool:
        patience = self.training.early_stopping_patience
        return patience is not None and self.progress.stale_validations >= patience

    def _train_epoch(self) -> float:
        """Train to the end of the epoch, from wherever in it the run stands; return the last step's loss."""
        epoch, first = divmod(self.progress.step, self.steps_per_epoch)
        self.train_set.epoch = epoch
        batches = epoch_batches(self.train_set, self.training.batch_size, self.config.seed, epoch)
        batches = batches[first : self.steps_per_epoch][: self.total_steps - self.progress.step]
        loss, tick = math.nan, time.perf_counter()
        with self._termination.held():  # what was computed is saved before SIGTERM ends the run
            loader = load_batches(self.train_set, batches, self.config.num_workers, self.device.type == "cuda")
            for batch in loader:
                result = self.train_step(batch)
                loss = result.loss
                # From the end of one step to the end of the next: waiting for data counts.
                now = time.perf_counter()
                self._log_step(result, images_per_s=result.num_windows * self._num_frames / (now - tick))
                tick = now
                self._save_or_stop()
        return loss

    @property
    def _num_frames(self) -> int:
        return self.train_set.config.sequence.length

    def train_step(self, batch: Batch) -> StepResult:
        """Take one optimizer step.

        Raises:
            UserError: loss or gradient is not finite, or memory runs out where no splitting helps.
        """
        move = partial(to_device, batch.tensors, self.device, self.train_set.config.augment.crop)
        tensors = retry_on_oom(move, "bringing a batch to the device")
        lr = set_learning_rate(self._optimizer, self._schedule(self.progress.step))
        seed = mix_seed(self.config.seed, self.progress.step)
        with self._metering(tensors):
            loss, grad_norm, peaks = self._step.take(tensors, batch.first, self.progress.step + 1, seed, self.device)
        self.progress.step += 1
        if self._files is not None and self.progress.step == self._start_step + 1:
            state_to_mmap_(self._optimizer, self._files)  # the first step has made it
        return StepResult(loss, grad_norm, lr, peaks, batch.size)

    @contextlib.contextmanager
    def _metering(self, tensors: dict[str, Tensor] | None) -> Iterator[None]:
        """Count the bytes of a step once the optimizer has its state, and again when micro-batches change size."""
        size = self.micro_batcher.size
        has_state = self.progress.step > self._start_step or self.total_steps - self._start_step == 1
        if tensors is None or size == self._measured.micro_batch or not has_state:
            yield
            return
        with StepMeter(self.model, state_tensors(self._optimizer), list(tensors.values())) as meter:
            yield
        peak = meter.result()
        self._measured = _Measured(peak, self.micro_batcher.size)
        kinds = {f"memory/step/{kind}_gb": size / 1e9 for kind, size in peak.by_kind.items()}
        self._monitor.scalars(self.progress.step + 1, kinds)

    def _log_step(self, result: StepResult, images_per_s: float) -> None:
        """Write a step's scalars and move the bar."""
        memory = measure_memory(self.device)
        scalars = self._collapse.update(self.progress.step, result.peaks)
        if self.progress.step % self.training.log_every_steps == 0:
            scalars |= {
                "train/loss": result.loss,
                "train/lr": result.lr,
                "train/grad_norm": result.grad_norm,
                "train/images_per_s": images_per_s,
                "train/micro_batch_size": self.micro_batcher.size,
                "memory/allocated_gb": memory["allocated_gb"],
                "memory/cached_gb": memory["cached_gb"],
                "memory/peak_gb": memory["peak_gb"],
            }
            self._monitor.scalars(self.progress.step, scalars)
        self._monitor.step(
            f"loss {result.loss:.3f}  F1 {self._monitor.shown_f1}  {images_per_s:.1f} images/s  "
            f"{memory['peak_gb']:.2f} GB  micro-batch {self.micro_batcher.size}"
        )

    def _save_or_stop(self) -> None:
        """Save ``last/`` where it is due, and end the run where SIGTERM asked for it."""
        step, every = self.progress.step, self.training.checkpoint_every_steps
        ends_epoch = step % self.steps_per_epoch == 0 or step == self.total_steps
        epoch = math.ceil(step / self.steps_per_epoch)
        is_due = epoch % self.training.validate_every_epochs == 0 or step == self.total_steps
        self.progress.pending_validation = int(ends_epoch and is_due)
        # All processes stop after the same step.
        stops = all_reduce_any(self._termination.requested, self.device)
        # The end of an epoch is saved before its validation too, which may take long; a resumed run begins with that.
        if ends_epoch or stops or (every and step % every == 0):
            self.save()
        if stops:
            raise Terminated

    def validate(self, loss: float = math.nan) -> dict:
        """Score the validation windows, keep the state in ``best/`` where it is the best so far, and save ``last/``.

        Args:
            loss: of the last step, for the line that is logged.

        Returns:
            Scores as ``tracking.metrics.score`` gives them.
        """
        evaluation = self.config.evaluation
        scores: dict[str, Any] = {}
        epoch = math.ceil(self.progress.step / self.steps_per_epoch)
        if rank() == 0:
            results = score_windows(
                self._predictor, self.val_set, evaluation, self.config.num_workers, self.training.limit_val_batches
            )
            scores = score(results, evaluation.tolerance_px, evaluation.threshold)
            show_validation(self._monitor, self.progress.step, epoch, loss, scores, self._predictor, self.val_set)
        scores = broadcast_object(scores)
        with self._termination.held():
            # Average precision decides between equals, such as the zeros of the first epochs.
            if (scores["f1_strict"], scores["ap"]) > (self.best.get("f1_strict", -1.0), self.best.get("ap", -1.0)):
                self.progress.best_step, self.progress.stale_validations = self.progress.step, 0
                self.best = {k: v for k, v in scores.items() if k not in ("per_visibility", "sweep", "events")}
                if rank() == 0:
                    state = {"progress": vars(self.progress), "best": self.best}
                    save_checkpoint(self.run / "best", self.model, self._split, state)
            else:
                self.progress.stale_validations += 1
            self.progress.pending_validation = 0
            self.save()
        self._monitor.f1 = scores["f1_strict"]
        return scores

    def save(self) -> None:
        """Save ``last/``, whole or not at all; the first process writes.

        Raises:
            UserError: the weights compute no finite numbers: the state before them is the one to go on from.
        """
        if rank() > 0:
            return
        self._predictor.run(self.val_set[0]["frames"][None])
        scaler = self.accelerator.scaler
        state = {
            "progress": vars(self.progress),
            "best": self.best,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "micro_batch": self.micro_batcher.state(),
        }
        with self._termination.held():
            save_checkpoint(self.run / "last", self.model, self._split, state, self._optimizer)

    def _log_end(self) -> None:
        if self.progress.step < self.total_steps:
            patience = self.training.early_stopping_patience
            logger.info(f"Stopped early: no better F1 in {patience} validations (training.early_stopping_patience).")
        if self._measured.peak is not None:
            size = self._measured.micro_batch
            planned = self.planner.estimate.peak_bytes(size) / 1e6
            peak = self._measured.peak
            logger.info(f"Peak of a step with micro-batches of {size}: {peak}. Planned: {planned:,.0f} MB.")

    def _summarize(self, duration_s: float) -> dict:
        """Return what ``metrics.json`` holds."""
        peak = self._measured.peak
        bytes_of_a_step = {}
        if peak is not None:
            bytes_of_a_step = {
                "peak_bytes": peak.num_bytes,
                "bytes_by_kind": peak.by_kind,
                "planned_peak_bytes": self.planner.estimate.peak_bytes(self._measured.micro_batch),
            }
        return {
            "run": str(self.run),
            "steps": self.progress.step,
            "epochs": math.ceil(self.progress.step / self.steps_per_epoch),
            "duration_s": duration_s,
            "peak_gb": measure_memory(self.device)["peak_gb"],
            **bytes_of_a_step,
            "micro_batch_size": self.micro_batcher.size,
            "best_step": self.progress.best_step,
            **{f"val_{name}": value for name, value in self.best.items()},
        }

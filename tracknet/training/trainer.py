"""Training loop of a run, with validation, checkpoints and logging."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tracknet.data.clips import WindowDataset
from tracknet.errors import UserError
from tracknet.memory.meter import count_flushes, measure_memory, reset_peak
from tracknet.memory.micro_batch import MicroBatcher, retry_on_oom
from tracknet.memory.step_meter import StepMeter
from tracknet.memory.streaming import state_to_mmap_
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.storage import split_state_dict
from tracknet.tracking.metrics import score
from tracknet.tracking.predictor import EvaluationConfig, Predictor, score_windows
from tracknet.training.batches import Batch, epoch_batches, load_batches, mix_seed, to_device
from tracknet.training.checkpoint import save_checkpoint
from tracknet.training.collapse import CollapseWatch
from tracknet.training.config import TrainingConfig
from tracknet.training.cuda_graphs import make_graphs
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
from tracknet.training.records import MeasuredPeak, Planner, Progress, StepResult
from tracknet.training.state import load_state
from tracknet.training.step import TrainingStep

logger = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """Settings of the trainer.

    Attributes:
        training: training section of the configuration.
        evaluation: settings for scoring the validation windows.
        device: device of the model.
        seed: seed of data order, augmentation and dropout.
        num_workers: number of data loading processes.
    """

    training: TrainingConfig
    evaluation: EvaluationConfig
    device: torch.device
    seed: int = 0
    num_workers: int = 0


class Trainer:
    """Training loop that saves the last state of a model in ``last/`` and the best one in ``best/``.

    Args:
        model: model with its mode applied, on its device.
        train_set: augmented windows to train on.
        val_set: windows whose scores select the best state.
        config: settings of the trainer.
        planner: source of memory estimates for the step.

    Attributes:
        progress: position of the run.
        best: scores of the best validation; empty before the first.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the whole run.
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
        self._measured = MeasuredPeak()
        training = config.training
        # The model enters autocast itself. accelerate is used for the optimizer and, in fp16, for gradient scaling.
        uses_fp16 = model.compute_dtype == torch.float16
        self.accelerator = Accelerator(mixed_precision="fp16" if uses_fp16 else "no", cpu=self.device.type == "cpu")

        # Optimizer. With offload on a GPU, its 8-bit state is paged.
        offloads = training.memory_optimization.offloads
        optimizer_config = use_paged_state(training.optimizer, offloads, self.device)
        self._optimizer = build_optimizer(model, optimizer_config, self.device, config.seed)

        # Length of the run. The schedule is a function of the step and the total number of steps.
        steps = math.ceil(train_set.windows_per_epoch / training.batch_size)
        self.steps_per_epoch = min(steps, training.limit_train_batches or steps)
        every_epoch = training.epochs * self.steps_per_epoch
        self.total_steps = min(every_epoch, training.max_steps or every_epoch)
        self._schedule = build_schedule(training.scheduler, self.total_steps, training.epochs)

    def fit(self, open_run: Callable[[], Path], resume_from: Path | None = None) -> dict:
        """Train to the end of the run.

        Args:
            open_run: function that creates the run folder and returns its path, called in the first process once the
                checkpoint was restored. TensorBoard files are written to ``../../logs/<name>``, relative to the folder.
            resume_from: checkpoint folder to continue from; the model must contain its weights already.

        Returns:
            Content of ``metrics.json``: ``run``, ``steps``, ``epochs``, ``duration_s``, ``peak_gb``,
            ``micro_batch_size``, ``best_step``, the scores of the best validation as ``val_*``, and the memory of one
            step as ``peak_bytes``, ``bytes_by_kind`` and ``planned_peak_bytes`` if it was measured.

        Raises:
            UserError: if the run is complete already, memory runs out at the smallest size, or training diverges.
            Terminated: if SIGTERM was received; the trained steps are saved.
        """
        # Restore the checkpoint before `open_run` writes to the run folder, so that an invalid one changes nothing.
        micro_batch_state = self._resume(resume_from) if resume_from is not None else None
        self._split = split_state_dict(self.model, self.training.self_contained)
        # Only the first process writes files; the others learn the path, which may have a number appended.
        self.run = Path(broadcast_object(str(open_run()) if rank() == 0 else ""))
        self._prepare(micro_batch_state)
        started, self._start_step = time.perf_counter(), self.progress.step
        reset_peak(self.device)

        # Train epoch by epoch, with SIGTERM handled and logs open.
        self._termination = Termination()
        log_dir = self.run.parent.parent / "logs" / self.run.name
        with (
            self._termination.handled(),
            Monitor(log_dir, self.total_steps, self.progress.step, quiet=rank() > 0) as self._monitor,
        ):
            self._monitor.f1 = self.best.get("f1_strict")
            self.model.train()
            loss = math.nan
            # A run that stopped during the validation of an epoch resumes with that validation.
            if self.progress.pending_validation:
                self.validate(loss)
            while self.progress.step < self.total_steps and not self._is_stale():
                loss = self._train_epoch()
                if self.progress.pending_validation:
                    self.validate(loss)
            self._log_end()
        return self._summarize(time.perf_counter() - started)

    def _resume(self, checkpoint: Path) -> dict | None:
        """Restore progress, optimizer and gradient scaler from a checkpoint.

        Args:
            checkpoint: folder of the checkpoint.

        Returns:
            State of the micro-batcher, or ``None`` if the checkpoint contains none.

        Raises:
            UserError: if the checkpoint is damaged or does not fit, or if the run is complete.
        """
        state = load_state(checkpoint)
        load_optimizer(checkpoint, self._optimizer, state)
        # A checkpoint of an older version lacks newer fields, which keep their defaults.
        saved_fields = {f.name: state["progress"][f.name] for f in fields(Progress) if f.name in state["progress"]}
        self.progress, self.best = Progress(**saved_fields), state["best"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.progress.step >= self.total_steps and not self.progress.pending_validation:
            raise UserError(
                f"The run is complete: it is at step {self.progress.step} of {self.total_steps}. Increase "
                "training.epochs or training.max_steps to continue training."
            )
        return state.get("micro_batch")

    def _prepare(self, micro_batch_state: dict | None) -> None:
        """Apply the memory optimizations and build the training step.

        Args:
            micro_batch_state: state of the micro-batcher from a checkpoint, or ``None``.
        """
        training, memory = self.training, self.training.memory_optimization
        # Checkpointing, weight streaming and offload of activations.
        self._files = self.run.parent.parent / "offload" if memory.use_disk_offload else None
        offload_ctx, offloaded_bytes = apply_memory_optimizations_(self.model, training, self.device, self._files)
        if offloaded_bytes and (self.device.type != "cpu" or self._files is not None):
            place = "files" if self._files else "host memory"
            logger.info(
                f"{offloaded_bytes / 1e6:,.0f} MB of frozen weights are kept in {place} and copied to the device when"
                " their block runs."
            )

        # Micro-batches. The processes share a batch, and all of them use the same micro-batch size.
        windows = math.ceil(training.batch_size / world_size())
        micro_batch_config = training.micro_batching(windows, self.train_set.config.training_wh)
        self.micro_batcher = MicroBatcher(
            micro_batch_config,
            partial(all_reduce_any, device=self.device),
            self.planner.suggest_settings,
            partial(count_flushes, self.device),
        )
        self.micro_batcher.restore(micro_batch_state)
        # Validation splits its batches independently of training.
        self._predictor = Predictor(self.model, self.device, training.micro_batching(self.config.evaluation.batch_size))

        # The optimizer's state is on its final device already, so accelerate must not move it.
        prepared = self.accelerator.prepare_optimizer(self._optimizer, device_placement=False)
        self._step = TrainingStep(
            self.model,
            prepared,
            self.accelerator,
            self.micro_batcher,
            offload_ctx,
            training.loss,
            training.grad_clip,
            make_graphs(self.model, training, self.device),
        )
        self._collapse = CollapseWatch(training.on_collapse)

    def _is_stale(self) -> bool:
        """Return whether early stopping ends the run."""
        patience = self.training.early_stopping_patience
        return patience is not None and self.progress.stale_validations >= patience

    def _train_epoch(self) -> float:
        """Train from the current step to the end of its epoch; return the loss of the last step."""
        # The order of an epoch depends on seed and epoch only, so a resumed run skips the batches that it has trained.
        epoch, first = divmod(self.progress.step, self.steps_per_epoch)
        self.train_set.epoch = epoch
        batches = epoch_batches(self.train_set, self.training.batch_size, self.config.seed, epoch)
        batches = batches[first : self.steps_per_epoch][: self.total_steps - self.progress.step]
        loss, tick = math.nan, time.perf_counter()
        # While SIGTERM is held, only `_save_or_stop` ends the run, between two steps and after saving.
        with self._termination.held():
            loader = load_batches(self.train_set, batches, self.config.num_workers, self.device.type == "cuda")
            for batch in loader:
                result = self.train_step(batch)
                loss = result.loss
                # The time from the end of one step to the end of the next includes waiting for data.
                now = time.perf_counter()
                self._log_step(result, images_per_s=result.num_windows * self._num_frames / (now - tick))
                tick = now
                self._save_or_stop()
        return loss

    @property
    def _num_frames(self) -> int:
        """Frames per window."""
        return self.train_set.config.sequence.length

    def train_step(self, batch: Batch) -> StepResult:
        """Take one optimizer step.

        Args:
            batch: windows of this process, on the host.

        Raises:
            UserError: if loss or gradient is not finite, or memory runs out at the smallest micro-batch size.
        """
        # Copy the batch to the device and augment it there.
        move = partial(to_device, batch.tensors, self.device, self.train_set.config.augment.crop)
        tensors = retry_on_oom(move, "while copying a batch to the device", self._step.free_memory)
        # Learning rate and random seed are functions of the step, so a resumed run continues with the same values.
        lr = set_learning_rate(self._optimizer, self._schedule(self.progress.step))
        seed = mix_seed(self.config.seed, self.progress.step)
        with self._metering(tensors):
            loss, grad_norm, peaks = self._step.take(tensors, batch.first, self.progress.step + 1, seed, self.device)
        self.progress.step += 1
        # The optimizer creates its state in its first step; with disk offload, move it to files once it exists.
        if self._files is not None and self.progress.step == self._start_step + 1:
            state_to_mmap_(self._optimizer, self._files)
        return StepResult(loss, grad_norm, lr, peaks, batch.size)

    @contextlib.contextmanager
    def _metering(self, tensors: dict[str, Tensor] | None) -> Iterator[None]:
        """Measure the memory of the step that runs in this context, if it needs a measurement.

        A step is measured once the optimizer has its state, and again when the micro-batch size has changed. Other
        steps are not measured, because the meter intercepts every operator, which is slow.

        Args:
            tensors: batch on the device, or ``None`` if this process has no windows; then nothing is measured.
        """
        size = self.micro_batcher.size
        # The first step of a process creates the optimizer's state. It is measured only if no other step follows.
        has_state = self.progress.step > self._start_step or self.total_steps - self._start_step == 1
        if tensors is None or size == self._measured.micro_batch or not has_state:
            yield
            return
        with (
            self._step.eager(),
            StepMeter(self.model, state_tensors(self._optimizer), list(tensors.values())) as meter,
        ):
            yield
        peak = meter.result()
        # Not `size`: micro-batches may have shrunk during the step, and the next step should not measure again.
        self._measured = MeasuredPeak(peak, self.micro_batcher.size)
        kinds = {f"memory/step/{kind}_gb": size / 1e9 for kind, size in peak.by_kind.items()}
        self._monitor.scalars(self.progress.step + 1, kinds)

    def _log_step(self, result: StepResult, images_per_s: float) -> None:
        """Write the scalars of a step to TensorBoard and advance the progress bar.

        Args:
            result: result of the step.
            images_per_s: frames per second of all processes together.

        Raises:
            UserError: if the heatmaps have collapsed and ``training.on_collapse`` is ``stop``.
        """
        memory = measure_memory(self.device)
        # Collapse is checked in every step, whether or not its scalars are written.
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
        """Save ``last/`` if it is due after this step, and stop the run if SIGTERM was received.

        Raises:
            Terminated: if any process received SIGTERM; ``last/`` is saved.
        """
        # Record whether this step ends an epoch that is to be validated.
        step, every = self.progress.step, self.training.checkpoint_every_steps
        ends_epoch = step % self.steps_per_epoch == 0 or step == self.total_steps
        epoch = math.ceil(step / self.steps_per_epoch)
        is_due = epoch % self.training.validate_every_epochs == 0 or step == self.total_steps
        self.progress.pending_validation = int(ends_epoch and is_due)
        # Collective, so that all processes stop after the same step: a process that went on alone would wait forever.
        stops = all_reduce_any(self._termination.requested, self.device)
        # An epoch is saved before its validation, which may take long. A resumed run then starts with the validation.
        if ends_epoch or stops or (every and step % every == 0):
            self.save()
        if stops:
            raise Terminated

    def validate(self, loss: float = math.nan) -> dict:
        """Score the validation windows, save ``best/`` if the scores are the best so far, and save ``last/``.

        Args:
            loss: loss of the last step for the log line, NaN if the epoch ended before the run was resumed.

        Returns:
            Scores as returned by ``tracking.metrics.score``.
        """
        # The first process scores and shows the result; the others wait for the scores.
        evaluation = self.config.evaluation
        scores: dict[str, Any] = {}
        epoch = math.ceil(self.progress.step / self.steps_per_epoch)
        self._step.free_memory()  # validation needs memory of its own
        if rank() == 0:
            results = score_windows(
                self._predictor, self.val_set, evaluation, self.config.num_workers, self.training.limit_val_batches
            )
            scores = score(results, evaluation.tolerance_px, evaluation.threshold)
            show_validation(self._monitor, self.progress.step, epoch, loss, scores, self._predictor, self.val_set)
        scores = broadcast_object(scores)
        # Hold SIGTERM, so that `best/`, `last/` and the progress in both stay consistent.
        with self._termination.held():
            # Average precision breaks ties of F1, such as the zeros of the first epochs.
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
        """Save ``last/`` atomically, in the first process.

        Raises:
            UserError: if the model's output is not finite; the previous checkpoint is kept, to continue from.
        """
        if rank() > 0:
            return
        # Predict one window first: it raises if the weights have diverged, before a good checkpoint is replaced.
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
        """Log an early stop, and the measured and the planned peak memory."""
        if self.progress.step < self.total_steps:
            patience = self.training.early_stopping_patience
            logger.info(
                f"Stopped early: F1 has not improved in {patience} validations (training.early_stopping_patience)."
            )
        if self._measured.peak is not None:
            size = self._measured.micro_batch
            planned = self.planner.estimate.peak_bytes(size) / 1e6
            peak = self._measured.peak
            logger.info(f"Peak of a step with micro-batches of {size}: {peak}. Planned: {planned:,.0f} MB.")

    def _summarize(self, duration_s: float) -> dict:
        """Return the content of ``metrics.json``."""
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

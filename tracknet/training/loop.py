"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tracknet.data.clips import WindowDataset
from tracknet.data.transforms import DRAWN, change_pictures
from tracknet.errors import UserError
from tracknet.memory.advice import Planner
from tracknet.memory.meter import count_flushes, measure_memory, reset_peak
from tracknet.memory.micro_batch import MicroBatcher, retry_on_oom
from tracknet.memory.step_meter import StepMeter
from tracknet.memory.streaming import map_state_
from tracknet.metrics import score
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.predictor import EvaluationConfig, Predictor, score_windows
from tracknet.quantization.storage import divide
from tracknet.training.arrange import arrange_
from tracknet.training.checkpoint import save_checkpoint
from tracknet.training.collapse import CollapseWatch
from tracknet.training.config import TrainingConfig
from tracknet.training.interruption import Terminated, Termination, leave_sigterm_to_parent
from tracknet.training.monitor import Monitor, show_validation
from tracknet.training.optimizer import build_optimizer, build_schedule, paged, set_learning_rate, state_tensors
from tracknet.training.optimizer_state import load_optimizer
from tracknet.training.processes import any_process, from_first, num_processes, rank, share
from tracknet.training.state import load_state
from tracknet.training.step import TrainingStep

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; saved with ``last/`` and enough, with the optimizer, to continue exactly.

    Order, augmentation and dropout are functions of the seed and these numbers, so no generator's state is saved.
    """

    step: int = 0
    best_step: int = 0
    stale_validations: int = 0
    pending_validation: int = 0  # 1 where the epoch that ended with this step was saved before its validation


def fit(
    model: HeatmapModel,
    train_set: WindowDataset,
    val_set: WindowDataset,
    config: TrainingConfig,
    evaluation: EvaluationConfig,
    open_run: Callable[[], Path],
    seed: int,
    device: torch.device,
    num_workers: int,
    planner: Planner,
    first_size: int | None = None,
    resume_from: Path | None = None,
) -> dict:
    """Train a model and keep its best and last state.

    Args:
        model: with its mode applied, on its device.
        train_set: augmented windows.
        val_set: windows that choose the best state.
        config: how.
        evaluation: how validation is scored.
        open_run: makes the run's folder, once all is sound, and returns it; TensorBoard files go to
            ``../../logs/<name>``.
        seed: of order, augmentation and dropout.
        device: where the model is.
        num_workers: loading processes.
        planner: what is known of the step's memory beforehand.
        first_size: windows per micro-batch to begin with, where the configuration leaves it open; ``None`` = the batch.
        resume_from: checkpoint to continue; the model holds its weights already.

    Returns:
        ``steps``, ``epochs``, ``duration_s``, ``peak_gb``, ``peak_bytes`` of one step with ``bytes_by_kind`` and
        ``planned_peak_bytes``, ``micro_batch_size``, ``best_step`` and the best validation's scores as ``val_*``.
        Processes but the first return the same without the peak.
    """
    # The model computes under its own autocast; what fp16 needs besides is the scaling of gradients.
    accelerator = Accelerator(
        mixed_precision="fp16" if model.compute_dtype == torch.float16 else "no", cpu=device.type == "cpu"
    )
    memory = config.memory_optimization
    bare_optimizer = build_optimizer(model, paged(config.optimizer, memory.offloads, device), device, seed)
    steps_per_epoch = math.ceil(train_set.windows_per_epoch / config.batch_size)
    steps_per_epoch = min(steps_per_epoch, config.limit_train_batches or steps_per_epoch)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    schedule = build_schedule(config.scheduler, total_steps, config.epochs)
    progress, best, learned = Progress(), {}, None
    if resume_from is not None:
        progress, best, learned = _resume(resume_from, bare_optimizer, accelerator)
        if progress.step >= total_steps and not progress.pending_validation:
            raise UserError(
                f"The run is at step {progress.step} of {total_steps}: nothing is left to do. Raise training.epochs or "
                "training.max_steps to train on."
            )
    storage = divide(model, config.self_contained)
    # One process writes.
    run = Path(from_first(str(open_run()) if rank() == 0 else None))
    optimizer = accelerator.prepare_optimizer(bare_optimizer, device_placement=False)  # its state is in place already
    files = run.parent.parent / "offload" if memory.use_disk_offload else None
    saving, waiting = arrange_(model, config, device, files)
    started, begun = time.perf_counter(), progress.step
    reset_peak(device)

    termination = Termination()
    with (
        termination.handled(),
        Monitor(run.parent.parent / "logs" / run.name, total_steps, progress.step, quiet=rank() > 0) as monitor,
    ):
        keys = config.micro_batching(math.ceil(config.batch_size / num_processes()), train_set.config.training_wh)
        keys.start_size = keys.start_size or first_size
        micro = MicroBatcher(keys, partial(any_process, device=device), planner.advise, partial(count_flushes, device))
        micro.restore(learned)
        predictor = Predictor(model, device, config.micro_batching(evaluation.batch_size))
        step = TrainingStep(model, optimizer, accelerator, micro, saving, config.loss, config.grad_clip)
        watch = CollapseWatch(config.on_collapse)
        peak, measured_size = None, None
        if waiting and (device.type != "cpu" or files is not None):
            logger.info(
                f"{waiting / 1e6:,.0f} MB of frozen weights wait in {'files' if files else 'host memory'} until their"
                " block runs."
            )
        model.train()

        def save_last() -> None:
            if rank() == 0:
                # Weights that compute no finite numbers are not saved: the state before them is the one to go on from.
                predictor.run(val_set[0]["frames"][None])
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                state = {"progress": vars(progress), "best": best, "scaler": scaler, "micro_batch": micro.state()}
                with termination.held():
                    save_checkpoint(run / "last", model, storage, state, bare_optimizer)

        def validate(loss: float) -> None:
            nonlocal best
            epoch = math.ceil(progress.step / steps_per_epoch)
            scores = None
            if rank() == 0:
                results = score_windows(predictor, val_set, evaluation, num_workers, config.limit_val_batches)
                scores = score(results, evaluation.tolerance_px, evaluation.threshold)
                show_validation(monitor, progress.step, epoch, loss, scores, predictor, val_set)
            scores = from_first(scores)
            with termination.held():
                # Average precision decides between equals, such as the zeros of the first epochs.
                if (scores["f1_strict"], scores["ap"]) > (best.get("f1_strict", -1.0), best.get("ap", -1.0)):
                    progress.best_step, progress.stale_validations = progress.step, 0
                    best = {k: v for k, v in scores.items() if k not in ("per_visibility", "sweep", "events")}
                    if rank() == 0:
                        save_checkpoint(run / "best", model, storage, {"progress": vars(progress), "best": best})
                else:
                    progress.stale_validations += 1
                progress.pending_validation = 0
                save_last()
            monitor.f1 = scores["f1_strict"]

        monitor.f1 = best.get("f1_strict")
        loss = math.nan
        if progress.pending_validation:
            validate(loss)
        patience = config.early_stopping_patience
        while progress.step < total_steps and (patience is None or progress.stale_validations < patience):
            epoch, first = divmod(progress.step, steps_per_epoch)
            train_set.epoch = epoch
            order = epoch_batches(train_set, config.batch_size, seed, epoch)[first:steps_per_epoch]
            order = order[: total_steps - progress.step]
            shares = [share(len(indices)) for indices in order]
            loader = DataLoader(
                train_set,
                batch_sampler=[indices[own] for indices, own in zip(order, shares)],
                num_workers=num_workers,
                pin_memory=device.type == "cuda",
                collate_fn=_collate,
                worker_init_fn=leave_sigterm_to_parent,
            )
            tick = time.perf_counter()
            with termination.held():  # what was computed is saved before SIGTERM ends the run
                for indices, own, batch in zip(order, shares, loader):
                    bring = partial(to_device, batch, device, train_set.config.augment.crop)
                    batch = retry_on_oom(bring, "bringing a batch to the device")
                    lr = set_learning_rate(bare_optimizer, schedule(progress.step))
                    # Measured once the optimizer has its state, and again when micro-batches have another size.
                    measures = micro.size != measured_size and (progress.step > begun or total_steps - begun == 1)
                    with contextlib.ExitStack() as stack:
                        if measures and batch is not None:
                            meter = stack.enter_context(
                                StepMeter(model, state_tensors(bare_optimizer), list(batch.values()))
                            )
                        loss, grad_norm, peaks = step.take(
                            batch, own.start, progress.step + 1, _mix(seed, progress.step), device
                        )
                        progress.step += 1
                    if measures and batch is not None:
                        peak, measured_size = meter.result(), micro.size
                    if files is not None and progress.step == begun + 1:
                        map_state_(bare_optimizer, files)

                    used = measure_memory(device)
                    # From the end of one step to the end of the next: waiting for data counts.
                    now = time.perf_counter()
                    rate, tick = len(indices) * train_set.config.sequence.length / (now - tick), now
                    watched = watch.update(progress.step, peaks)
                    if progress.step % config.log_every_steps == 0:
                        monitor.scalars(
                            progress.step,
                            {
                                **watched,
                                "train/loss": loss,
                                "train/lr": lr,
                                "train/grad_norm": grad_norm,
                                "train/images_per_s": rate,
                                "train/micro_batch_size": micro.size,
                                "memory/allocated_gb": used["allocated_gb"],
                                "memory/cached_gb": used["cached_gb"],
                                "memory/peak_gb": used["peak_gb"],
                            },
                        )
                    if measures and peak is not None:
                        monitor.scalars(
                            progress.step, {f"memory/step/{kind}_gb": size / 1e9 for kind, size in peak.by_kind.items()}
                        )
                    monitor.step(
                        f"loss {loss:.3f}  F1 {monitor.shown_f1}  {rate:.1f} images/s  "
                        f"{used['peak_gb']:.2f} GB  micro-batch {micro.size}",
                    )
                    at_end = progress.step % steps_per_epoch == 0 or progress.step == total_steps
                    done = math.ceil(progress.step / steps_per_epoch)
                    is_due = done % config.validate_every_epochs == 0 or progress.step == total_steps
                    progress.pending_validation = int(at_end and is_due)
                    # All processes stop after the same step.
                    stops = any_process(termination.requested, device)
                    every = config.checkpoint_every_steps
                    # The end of an epoch is saved before its validation too, which may take long; a resumed run begins
                    # with that.
                    if at_end or stops or (every and progress.step % every == 0):
                        save_last()
                    if stops:
                        raise Terminated
            if progress.pending_validation:
                validate(loss)
        if progress.step < total_steps:
            logger.info(f"Stopped early: no better F1 in {patience} validations (training.early_stopping_patience).")
        if peak is not None:
            planned = planner.footprint.peak_bytes(measured_size)
            logger.info(
                f"Peak of a step with micro-batches of {measured_size}: {peak}. Planned: {planned / 1e6:,.0f} MB."
            )

    return {
        "run": str(run),
        "steps": progress.step,
        "epochs": math.ceil(progress.step / steps_per_epoch),
        "duration_s": time.perf_counter() - started,
        "peak_gb": measure_memory(device)["peak_gb"],
        **(
            {"peak_bytes": peak.num_bytes, "bytes_by_kind": peak.by_kind, "planned_peak_bytes": planned}
            if peak is not None
            else {}
        ),
        "micro_batch_size": micro.size,
        "best_step": progress.best_step,
        **{f"val_{name}": value for name, value in best.items()},
    }


def epoch_batches(train_set: WindowDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, in an order that depends on the seed and the epoch alone."""
    order = train_set.epoch_order(_mix(seed, epoch))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _mix(seed: int, number: int) -> int:
    """Combine two numbers into a seed; neighbours give unrelated streams."""
    return (seed * 1_000_003 + number) * 0x9E3779B97F4A7C15 % 2**63


def _collate(windows: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    return default_collate(windows) if windows else None


def to_device(
    batch: dict[str, Tensor] | None, device: torch.device, crop: tuple[int, int] | None
) -> dict[str, Tensor] | None:
    """Bring a batch to the device and change its pictures there; ``None`` stays ``None``."""
    # Draws stay on the host: the pictures are changed by numbers, and reading those from a busy GPU would wait for it.
    moved = batch and {k: v if k in DRAWN else v.to(device, non_blocking=True) for k, v in batch.items()}
    return moved and change_pictures(moved, crop)


def _resume(checkpoint: Path, optimizer, accelerator) -> tuple[Progress, dict, dict | None]:
    state = load_state(checkpoint)
    load_optimizer(checkpoint, optimizer, state)
    # A state of an older version lacks what was added since.
    progress = Progress(**{f.name: state["progress"][f.name] for f in fields(Progress) if f.name in state["progress"]})
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress, state["best"], state.get("micro_batch")

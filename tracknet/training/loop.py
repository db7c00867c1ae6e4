"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from tracknet.data.clips import WindowDataset
from tracknet.errors import UserError
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import measure_memory, reset_peak
from tracknet.memory.micro_batch import MicroBatcher, is_out_of_memory
from tracknet.memory.offload import offload_activations
from tracknet.metrics import score
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.predictor import EvaluationConfig, Predictor, score_windows
from tracknet.quantization.storage import divide
from tracknet.training.checkpoint import load_optimizer, load_state, save_checkpoint
from tracknet.training.config import TrainingConfig
from tracknet.training.losses import LossConfig, heatmap_loss
from tracknet.training.monitor import Monitor, draw_predictions
from tracknet.training.optimizer import build_optimizer, build_schedule, set_learning_rate

REMEDY = (
    "Lower training.optimizer.lr, or use training.precision=bf16 or fp32. What was saved before is in last/ and best/."
)


@dataclass
class Progress:
    """Where a run stands; saved with ``last/`` and enough, with the optimizer, to continue exactly.

    Order, augmentation and dropout are functions of the seed and these numbers, so no generator's state is saved.
    """

    step: int = 0
    best_step: int = 0
    stale_validations: int = 0
    micro_batch: int | None = None
    micro_batch_failed: int | None = None
    micro_batch_clean: int = 0


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
    resume_from: Path | None = None,
) -> dict:
    """Train a model and keep its best and last state.

    Args:
        model: with its mode applied, on its device.
        train_set: augmented windows.
        val_set: windows that choose the best state.
        config: how.
        evaluation: how validation is scored.
        open_run: makes the run's folder, once all is sound, and returns it; TensorBoard files go to ``../../logs/<name>``.
        seed: of order, augmentation and dropout.
        device: where the model is.
        num_workers: loading processes.
        resume_from: checkpoint to continue; the model holds its weights already.

    Returns:
        ``steps``, ``epochs``, ``duration_s``, ``peak_gb``, ``micro_batch_size``, ``best_step`` and the best validation's
        scores as ``val_*``.
    """
    # The model computes under its own autocast; what fp16 needs besides is the scaling of gradients.
    accelerator = Accelerator(
        mixed_precision="fp16" if model.compute_dtype == torch.float16 else "no", cpu=device.type == "cpu"
    )
    if config.memory_optimization.checkpointing != "none":
        checkpoint_(model, config.memory_optimization.checkpointing)
    bare_optimizer = build_optimizer(model, config.optimizer, device, seed)
    steps_per_epoch = math.ceil(len(train_set) / config.batch_size)
    steps_per_epoch = min(steps_per_epoch, config.limit_train_batches or steps_per_epoch)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    schedule = build_schedule(config.scheduler, total_steps, config.epochs)
    progress, best = Progress(), {}
    if resume_from is not None:
        progress, best = _resume(resume_from, bare_optimizer, accelerator)
        if progress.step >= total_steps:
            raise UserError(f"The run is at step {progress.step} of {total_steps}: nothing is left to do. Raise training.epochs or "
                            "training.max_steps to train on.")  # fmt: skip
    storage = divide(model, config.self_contained)
    run = open_run()
    optimizer = accelerator.prepare_optimizer(bare_optimizer, device_placement=False)  # its state is in place already
    trained = [p for p in model.parameters() if p.requires_grad]
    disk_dir = run.parent.parent / "offload" if config.memory_optimization.use_disk_offload else None
    # Entered around every forward: says where activations wait for backward.
    offloads = config.memory_optimization.use_cpu_offload or disk_dir is not None
    saving = offload_activations(model, device, disk_dir) if offloads else nullcontext()
    started = time.perf_counter()
    reset_peak(device)

    with Monitor(run.parent.parent / "logs" / run.name, total_steps, progress.step) as monitor:
        micro = MicroBatcher(config.micro_batching(), monitor.say)
        start_size = micro.size
        if progress.micro_batch is not None and progress.micro_batch < start_size:
            micro.size, micro.failed, micro.clean = (
                progress.micro_batch, progress.micro_batch_failed, progress.micro_batch_clean,
            )  # fmt: skip
        predictor = Predictor(model, device, config.micro_batching(evaluation.batch_size), monitor.say)
        model.train()
        f1 = best.get("f1_strict", 0.0)

        def save_last() -> None:
            # Only what running out of memory taught is remembered; what was configured may be changed.
            learned = micro.size < start_size
            progress.micro_batch = micro.size if learned else None
            progress.micro_batch_failed, progress.micro_batch_clean = micro.failed, micro.clean
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            state = {"progress": vars(progress), "best": best, "scaler": scaler}
            save_checkpoint(run / "last", model, storage, state, bare_optimizer)

        patience = config.early_stopping_patience
        while progress.step < total_steps and (patience is None or progress.stale_validations < patience):
            epoch, first = divmod(progress.step, steps_per_epoch)
            train_set.epoch = epoch
            order = epoch_batches(len(train_set), config.batch_size, seed, epoch)[first:steps_per_epoch]
            order = order[: total_steps - progress.step]
            loader = DataLoader(
                train_set, batch_sampler=order, num_workers=num_workers, pin_memory=device.type == "cuda"
            )
            tick = time.perf_counter()
            for batch in loader:
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                attempt = partial(
                    accumulate_gradients, model, batch, config.loss, micro, saving, accelerator.backward,
                    _mix(seed, progress.step),
                )  # fmt: skip
                loss = micro.run(attempt, reset=partial(optimizer.zero_grad, set_to_none=True))
                if not math.isfinite(loss):
                    raise UserError(f"The loss became {loss} at step {progress.step + 1}. {REMEDY}")
                # Unscales fp16 gradients first; an infinite limit only measures.
                grad_norm = accelerator.clip_grad_norm_(trained, config.grad_clip or math.inf)
                # fp16's scaler skips a step whose gradients overflow; elsewhere one such step would spoil every weight.
                if accelerator.scaler is None and not math.isfinite(float(grad_norm)):
                    raise UserError(
                        f"The gradient is not finite at step {progress.step + 1} (loss {loss:.3g}). {REMEDY}"
                    )
                lr = set_learning_rate(bare_optimizer, schedule(progress.step))
                _update(optimizer, progress.step)
                optimizer.zero_grad(set_to_none=True)
                progress.step += 1

                memory = measure_memory(device)
                # From the end of one step to the end of the next: waiting for data counts.
                now = time.perf_counter()
                rate, tick = len(batch["frames"]) * train_set.config.sequence.length / (now - tick), now
                if progress.step % config.log_every_steps == 0:
                    monitor.scalars(progress.step, {
                        "train/loss": loss, "train/lr": lr, "train/grad_norm": float(grad_norm),
                        "train/images_per_s": rate, "train/micro_batch_size": micro.size,
                        "memory/allocated_gb": memory["allocated_gb"], "memory/cached_gb": memory["cached_gb"],
                        "memory/peak_gb": memory["peak_gb"],
                    })  # fmt: skip
                monitor.step(progress.step, f"loss {loss:.3f}  F1 {f1:.3f}  {rate:.1f} images/s  "
                                            f"{memory['peak_gb']:.2f} GB  micro-batch {micro.size}")  # fmt: skip
                # The last step of an epoch is saved after its validation, or a resumed run would skip that.
                at_end = progress.step % steps_per_epoch == 0 or progress.step == total_steps
                if config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0 and not at_end:
                    save_last()

            done = math.ceil(progress.step / steps_per_epoch)
            if done % config.validate_every_epochs == 0 or progress.step == total_steps:
                results = score_windows(
                    predictor, val_set, evaluation.batch_size, num_workers, config.limit_val_batches
                )
                scores = score(results, evaluation.tolerance_px, evaluation.threshold)
                f1 = scores["f1_strict"]
                _show_validation(monitor, progress.step, done, loss, scores, predictor, val_set)
                # Average precision decides between equals, such as the zeros of the first epochs.
                if (f1, scores["ap"]) > (best.get("f1_strict", -1.0), best.get("ap", -1.0)):
                    progress.best_step, progress.stale_validations = progress.step, 0
                    best = {k: v for k, v in scores.items() if not isinstance(v, (dict, list))}
                    save_checkpoint(run / "best", model, storage, {"progress": vars(progress), "best": best})
                else:
                    progress.stale_validations += 1
            save_last()
        if progress.step < total_steps:
            monitor.say(f"Stopped early: no better F1 in {patience} validations (training.early_stopping_patience).")

    return {
        "run": str(run),
        "steps": progress.step,
        "epochs": math.ceil(progress.step / steps_per_epoch),
        "duration_s": time.perf_counter() - started,
        "peak_gb": measure_memory(device)["peak_gb"],
        "micro_batch_size": micro.size,
        "best_step": progress.best_step,
        **{f"val_{name}": value for name, value in best.items()},
    }


def accumulate_gradients(
    model: HeatmapModel,
    batch: dict[str, Tensor],
    config: LossConfig,
    micro: MicroBatcher,
    saving: AbstractContextManager,
    backward: Callable[[Tensor], None],
    step_seed: int,
) -> float:
    """Run a batch forward and backward, part by part; return its loss.

    Args:
        model: in training.
        batch: on the device.
        config: of the loss.
        micro: says what the parts are.
        saving: entered around each forward.
        backward: scales the loss where fp16 needs it.
        step_seed: of dropout, so that a step that is repeated or resumed draws the same.
    """
    torch.manual_seed(step_seed)
    # One normaliser for the whole batch, known before any part of it is run.
    normaliser = batch["weight"].sum().clamp_min(1)
    total = torch.zeros((), device=normaliser.device)
    for part in micro.parts(len(batch["frames"])):
        chunk = {name: values[part] for name, values in batch.items()}
        with saving:
            loss = heatmap_loss(model(chunk["frames"]), chunk, config) / normaliser
        backward(loss)
        total += loss.detach()
    return total.item()


def _update(optimizer, step: int) -> None:
    """Take the optimizer's step; memory that runs out there has changed some weights and not others, and is an error."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"Out of memory in the optimizer's step {step + 1}, which smaller micro-batches would not mend. Its state takes "
                        "2 bytes a weight instead of 8 with training.optimizer.name=adamw8bit, and can leave the GPU with "
                        "paged_adamw8bit; --training qlora trains fewer weights. What was saved before is in last/ and best/."
                        ) from error  # fmt: skip


def epoch_batches(num_windows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch: a permutation that depends on the seed and the epoch alone."""
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(_mix(seed, epoch))).tolist()
    return [order[i : i + batch_size] for i in range(0, num_windows, batch_size)]


def _mix(seed: int, number: int) -> int:
    """Combine two numbers into a seed; neighbours give unrelated streams."""
    return (seed * 1_000_003 + number) * 0x9E3779B97F4A7C15 % 2**63


def _resume(checkpoint: Path, optimizer, accelerator) -> tuple[Progress, dict]:
    state = load_state(checkpoint)
    load_optimizer(checkpoint, optimizer, state["optimizer"])
    progress = Progress(**state["progress"])
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress, state["best"]


def _show_validation(monitor, step, epoch, loss, scores, predictor, val_set) -> None:
    median = scores["median_error_px"]
    values = {f"val/{k}": scores[k] for k in ("precision", "recall", "recall_strict", "f1", "f1_strict", "ap")}
    monitor.scalars(step, {**values, **({"val/median_error_px": median} if median is not None else {})})
    items = [val_set[i] for i in torch.linspace(0, len(val_set) - 1, min(4, len(val_set))).long().tolist()]
    frames, xy, visible = (torch.stack([item[k] for item in items]) for k in ("frames", "xy", "visible"))
    monitor.picture(step, "val/predictions", draw_predictions(frames, predictor.logits(frames), xy, visible))
    error = "-" if median is None else f"{median:.1f} px"
    monitor.say(f"epoch {epoch:3d}  step {step:5d}  loss {loss:7.3f}  val F1 {scores['f1_strict']:.3f} (strict, "
                f"{scores['tolerance_px']:g} px)  precision {scores['precision']:.3f}  recall {scores['recall_strict']:.3f}  "
                f"median error {error}")  # fmt: skip

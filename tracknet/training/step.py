"""Training step: gradients in micro-batches, their sum over processes, clipping, and the optimizer's update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from tracknet.data.features import features_of
from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatcher, free_cached_memory, retry_on_oom
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.tracking.predictor import REMEDY
from tracknet.training.collapse import PeakCounts, count_peaks
from tracknet.training.cuda_graphs import MicroBatchGraphs
from tracknet.training.distributed import all_reduce_gradients, all_reduce_sum, all_reduce_sums
from tracknet.training.losses import LossConfig, event_loss, heatmap_loss, loss_normalizer


@dataclass
class TrainingStep:
    """Training step, with everything that all steps of a run share.

    Attributes:
        model: model in training mode.
        optimizer: optimizer prepared by accelerate.
        accelerator: accelerator that scales the loss and unscales the gradients in fp16.
        micro: micro-batcher that splits batches and retries with smaller parts when memory runs out.
        offload_ctx: reusable context entered around each forward, which offloads the activations saved for backward.
        loss: settings of the loss.
        grad_clip: maximum norm of the gradient, or ``None`` for no clipping.
        graphs: runner of micro-batches as CUDA graphs, or ``None`` to run them eagerly.
    """

    model: HeatmapModel
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    micro: MicroBatcher
    offload_ctx: AbstractContextManager
    loss: LossConfig
    grad_clip: float | None
    graphs: MicroBatchGraphs | None = None

    def take(
        self, batch: dict[str, Tensor] | None, first: int, number: int, seed: int, device: torch.device
    ) -> tuple[float, float, PeakCounts]:
        """Update the model once.

        If memory runs out anywhere in the step, the part that failed is repeated, and the update is the same.

        Args:
            batch: windows of this process on the device, or ``None`` if other processes have all windows of the batch.
            first: index of the first of these windows in the batch of all processes.
            number: number of the step, from 1, for messages.
            seed: seed of the dropout in this step.
            device: device of the model.

        Returns:
            Loss, norm of the gradient before clipping, and counts of the heatmaps' peaks, of all processes together.

        Raises:
            UserError: if the loss or, without fp16 scaling, the gradient is not finite, or memory runs out at the
                smallest micro-batch size.
        """
        # Every action that `retry` runs changes nothing before its last operator, so it can be repeated as it is.
        retry = partial(retry_on_oom, where=f"around step {number}", free=self.free_memory)

        # Normalizers of heatmaps and events, summed over the whole batch before the first forward. Each part divides by
        # them, so that the gradients of all parts and processes add up to the gradient of the batch.
        normalizer = all_reduce_sum(retry(partial(_normalizers, batch, device, self.loss)))
        # At least 1: a batch with little or no labeled weight takes a small step instead of dividing by zero.
        normalizer = retry(partial(normalizer.clamp_min, 1))

        # Forward and backward in micro-batches, which are repeated with smaller parts when memory runs out.
        attempt = partial(
            accumulate_gradients,
            self.model,
            batch,
            normalizer,
            self.loss,
            self.micro,
            self.offload_ctx,
            self.accelerator.backward,
            seed,
            first,
            self.graphs,
        )
        sums = self.micro.run(attempt, reset=self._reset)

        # Sum loss, counts and gradients over processes. This comes after all forwards and backwards: a collective call
        # among them would deadlock if one process ran out of memory.
        loss, *counts = all_reduce_sums(sums, device)
        if not math.isfinite(loss):
            raise UserError(f"The loss became {loss} at step {number}. {REMEDY}")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        all_reduce_gradients(trained)
        if batch is None and self.accelerator.scaler is not None:
            # The scaler creates its state when it first scales a loss, and unscaling requires that state. A process
            # without windows may not have scaled any loss yet.
            self.accelerator.scaler.scale(torch.zeros((), device=device))

        # Unscale the gradients before measuring and clipping their norm.
        retry(self.accelerator.unscale_gradients)
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = retry(partial(torch.nn.utils.get_total_norm, gradients))
        grad_norm = retry(norm.item)
        # In fp16 the scaler skips a step with an overflow. Without it, one such step would make all weights non-finite.
        if self.accelerator.scaler is None and not math.isfinite(grad_norm):
            raise UserError(f"The gradient is not finite at step {number} (loss {loss:.3g}). {REMEDY}")
        if self.grad_clip is not None:
            retry(partial(torch.nn.utils.clip_grads_with_norm_, trained, self.grad_clip, norm))

        # Update the weights. The optimizer continues an interrupted update where it stopped (`memory.resumable`).
        retry(self.optimizer.step, where=f"in the optimizer's step {number}")
        # Free the gradients now, so that they do not occupy memory during the next forward. Graphs add to them.
        self.optimizer.zero_grad(set_to_none=self.graphs is None or not self.graphs.has_gradients)
        return loss, grad_norm, PeakCounts(*counts)

    def _reset(self) -> None:
        """Discard what an attempt that ran out of memory has left."""
        self.optimizer.zero_grad(set_to_none=True)
        self.free_memory()

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Run steps eagerly in this context, so that a meter sees every operator."""
        if self.graphs is None:
            yield
            return
        self.graphs.enabled = False
        try:
            yield
        finally:
            self.graphs.enabled = True

    def free_memory(self) -> None:
        """Free memory that is kept between steps, which costs time but changes nothing."""
        if self.graphs is not None:
            self.graphs.drop()
        free_cached_memory()


def _normalizers(batch: dict[str, Tensor] | None, device: torch.device, config: LossConfig) -> Tensor:
    """Return the normalizers of heatmap loss and event loss, ``[2]``, over this process's windows of a batch."""
    if batch is None:
        return torch.zeros(2, device=device)
    return torch.stack([loss_normalizer(batch, config), (batch["event"] >= 0).sum().float()])


def accumulate_gradients(
    model: HeatmapModel,
    batch: dict[str, Tensor] | None,
    normalizer: Tensor,
    config: LossConfig,
    micro: MicroBatcher,
    offload_ctx: AbstractContextManager,
    backward: Callable[[Tensor], None],
    seed: int,
    first: int = 0,
    graphs: MicroBatchGraphs | None = None,
) -> list[float]:
    """Run forward and backward of a batch in micro-batches, accumulating gradients.

    Args:
        model: model in training mode.
        batch: windows of this process on the device, or ``None`` for no windows.
        normalizer: normalizers of heatmap loss and event loss over the batch of all processes, ``[2]``.
        config: settings of the loss.
        micro: micro-batcher that splits the batch.
        offload_ctx: context entered around each forward.
        backward: function that runs backward of a loss, scaled in fp16.
        seed: seed of dropout; a step that is repeated, split or resumed draws the same values.
        first: index of the first window in the batch of all processes.
        graphs: runner of micro-batches as CUDA graphs, or ``None`` to run them eagerly.

    Returns:
        This process's share of the loss, followed by the fields of ``PeakCounts``.
    """
    # Summed on the device, so that the host waits for the GPU only once per step, at the end.
    total = normalizer.new_zeros(1 + len(PeakCounts._fields))
    if batch is None:
        return total.tolist()
    run = partial(_forward_backward, model=model, config=config, offload_ctx=offload_ctx, backward=backward)
    for part in micro.micro_batches(len(batch["frames"])):
        chunk = {name: values[part] for name, values in batch.items()}
        # Seed torch's generator for operators that draw from it. Adapter dropout draws by window index from
        # `model.rng`, so that its values do not depend on the split.
        torch.manual_seed(hash((seed, first + part.start)) % 2**63)
        with model.rng.scope(seed, first + part.start, part.stop - part.start, total.device):
            total += run(chunk, normalizer) if graphs is None else graphs.run(chunk, normalizer, run)
    return total.tolist()


def _forward_backward(
    chunk: dict[str, Tensor],
    normalizer: Tensor,
    model: HeatmapModel,
    config: LossConfig,
    offload_ctx: AbstractContextManager,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Run forward and backward of a micro-batch; return its share of the loss and of ``PeakCounts``, ``[7]``.

    As a CUDA graph it is replayed without this code, so nothing here may depend on anything but the arguments' content.
    """
    with offload_ctx:
        features = features_of(chunk)  # cached outputs of a frozen backbone, if any
        events = None
        if model.has_events:
            logits, events = model(chunk["frames"], events=True, features=features)
        else:
            logits = model(chunk["frames"], features=features)
        counts = count_peaks(logits, chunk)
        loss = heatmap_loss(logits, chunk, config) / normalizer[0]
        if events is not None:
            loss = config.events_weight * event_loss(events, chunk["event"]) / normalizer[1] + loss
        # Without this reference, the logits are freed as soon as backward no longer needs them.
        del logits
    # Outside of the offload context: activations that checkpointing recomputes here are used at once.
    backward(loss)
    return torch.cat([loss.detach()[None], counts])

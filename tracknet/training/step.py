"""One training step: gradients in parts that fit, added up over processes, clipped, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from tracknet.data.features import features_of
from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatcher, retry_on_oom
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.tracking.predictor import REMEDY
from tracknet.training.collapse import PeakCounts, count_peaks
from tracknet.training.distributed import all_reduce_gradients, all_reduce_sum, all_reduce_sums
from tracknet.training.losses import LossConfig, event_loss, heatmap_loss


@dataclass
class TrainingStep:
    """What all steps of a run share.

    Attributes:
        model: in training.
        optimizer: prepared by accelerate.
        accelerator: scales gradients where fp16 needs it.
        micro: says what the parts of a batch are.
        offload_ctx: entered around each forward; says where activations wait for backward.
        loss: the loss's settings.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    model: HeatmapModel
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    micro: MicroBatcher
    offload_ctx: AbstractContextManager
    loss: LossConfig
    grad_clip: float | None

    def take(
        self, batch: dict[str, Tensor] | None, first: int, number: int, seed: int, device: torch.device
    ) -> tuple[float, float, PeakCounts]:
        """Update the model once. Where memory runs out in it, it is as if it had not.

        Args:
            batch: on the device; ``None`` where other processes have all of it.
            first: place of its first window in the batch of all processes.
            number: of the step, from 1, for messages.
            seed: of its dropout.
            device: where the model is.

        Returns:
            The loss, the gradient's norm before clipping, and where the heatmaps' peaks were.

        Raises:
            UserError: one of them is not finite, or memory runs out where no splitting helps.
        """
        # What is run through this changes nothing before its last operator, so it can be tried again by itself.
        retry = partial(retry_on_oom, where=f"around step {number}")
        # One normalizer for the whole batch, known before any part of it is run: of heatmaps, and of events.
        normalizer = all_reduce_sum(retry(partial(_normalizers, batch, device)))
        normalizer = retry(partial(normalizer.clamp_min, 1))
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
        )
        sums = self.micro.run(attempt, reset=partial(self.optimizer.zero_grad, set_to_none=True))
        loss, *counts = all_reduce_sums(sums, device)
        if not math.isfinite(loss):
            raise UserError(f"The loss became {loss} at step {number}. {REMEDY}")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        all_reduce_gradients(trained)
        if batch is None and self.accelerator.scaler is not None:
            # It is made on first use, and a process without windows has scaled nothing yet.
            self.accelerator.scaler.scale(torch.zeros((), device=device))
        retry(self.accelerator.unscale_gradients)
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = retry(partial(torch.nn.utils.get_total_norm, gradients))
        grad_norm = retry(norm.item)
        # fp16's scaler skips a step whose gradients overflow; elsewhere one such step would spoil every weight.
        if self.accelerator.scaler is None and not math.isfinite(grad_norm):
            raise UserError(f"The gradient is not finite at step {number} (loss {loss:.3g}). {REMEDY}")
        if self.grad_clip is not None:
            retry(partial(torch.nn.utils.clip_grads_with_norm_, trained, self.grad_clip, norm))
        retry(self.optimizer.step, where=f"in the optimizer's step {number}")
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm, PeakCounts(*counts)


def _normalizers(batch: dict[str, Tensor] | None, device: torch.device) -> Tensor:
    """Weights of the frames, and how many say whether something happens to the ball."""
    if batch is None:
        return torch.zeros(2, device=device)
    return torch.stack([batch["weight"].sum(), (batch["event"] >= 0).sum().float()])


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
) -> list[float]:
    """Run a batch forward and backward, part by part; return its share of the loss, and its ``PeakCounts``.

    Args:
        model: in training.
        batch: on the device, or ``None``.
        normalizer: sums of the weights of heatmaps and of events in the batch of all processes.
        config: of the loss.
        micro: says what the parts are.
        offload_ctx: entered around each forward.
        backward: scales the loss where fp16 needs it.
        seed: of dropout, so that a step that is repeated, split or resumed draws the same.
        first: place of the first window in the batch of all processes.
    """
    total = normalizer.new_zeros(1 + len(PeakCounts._fields))
    if batch is None:
        return total.tolist()
    for part in micro.micro_batches(len(batch["frames"])):
        chunk = {name: values[part] for name, values in batch.items()}
        # For what draws from torch's generator; dropout of adapters draws by window.
        torch.manual_seed(hash((seed, first + part.start)) % 2**63)
        with model.rng.scope(seed, first + part.start, part.stop - part.start):
            with offload_ctx:
                features = features_of(chunk)
                events = None
                if model.has_events:
                    logits, events = model(chunk["frames"], events=True, features=features)
                else:
                    logits = model(chunk["frames"], features=features)
                counts = count_peaks(logits, chunk)
                loss = heatmap_loss(logits, chunk, config) / normalizer[0]
                if events is not None:
                    loss = config.events_weight * event_loss(events, chunk["event"]) / normalizer[1] + loss
                del logits
            backward(loss)
        total += torch.cat([loss.detach()[None], counts])
        del loss
    return total.tolist()

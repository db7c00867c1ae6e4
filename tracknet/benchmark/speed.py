"""How fast training steps are: all variants in one process, in rounds that take turns, so that a noisy machine is noisy
for all."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from tracknet.benchmark.variants import Variant
from tracknet.config import Config
from tracknet.data.clips import WindowDataset, num_workers
from tracknet.errors import UserError
from tracknet.memory.meter import measure_memory
from tracknet.memory.micro_batch import MicroBatcher
from tracknet.memory.step_meter import Peak, StepMeter
from tracknet.memory.streaming import place_
from tracknet.models.heatmap_model import build_model
from tracknet.progress import ProgressBar
from tracknet.quantization.apply import apply_mode
from tracknet.training.batches import epoch_batches, to_device
from tracknet.training.memory_optimizations import apply_memory_optimizations_
from tracknet.training.optimizer import build_optimizer, set_learning_rate, state_tensors, use_paged_state
from tracknet.training.step import TrainingStep

PHASES = ("data", "forward", "backward", "optimizer", "rest")
UNTIMED = 3  # first steps of a run: the optimizer's state, the meter, the compiler


class Phases:
    """Adds up the time between marks; on a GPU by events on its stream, which wait for nothing."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Begin a phase."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call; on a GPU once it has caught up."""
        total = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if phase in total:
                total[phase] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._marks.clear()
        return total


class Runner:
    """A variant, ready to be trained step by step with the project's own training step.

    Attributes:
        variant: what it is.
        model: in training.
        times: seconds of each timed step, by round.
        phases: seconds by phase of each timed step.
        batches: what it is fed with; set before it is run.
        peak: of one step, counted tensor by tensor; ``None`` before ``warm_up``.
        device_gb: on a GPU the allocator's own peak, ``allocated`` and ``reserved``.
    """

    def __init__(self, variant: Variant, device: torch.device):
        self.variant, self.device = variant, device
        config, training = variant.config, variant.config.training
        if training.memory_optimization.use_disk_offload:
            raise UserError(
                f"{variant.name}: training.memory_optimization.use_disk_offload=true is as fast as the disk; speed is"
                " measured without it. Leave speed out (--what memory)."
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self._before = measure_memory(device)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, config.data.sequence.length)
        streams = training.memory_optimization.streams_weights and self.model.backbone is not None
        apply_mode(self.model, training.mode, device, True, partial(place_, device=device, blocks_stay=streams))
        optimizer_config = use_paged_state(training.optimizer, training.memory_optimization.offloads, device)
        self.optimizer = build_optimizer(self.model, optimizer_config, device, config.seed)
        set_learning_rate(self.optimizer, 0.01)  # the weights stay about where they are
        self.offload_ctx, _ = apply_memory_optimizations_(
            self.model, dataclasses.replace(training, compile=variant.compiled), device, None
        )
        fp16 = self.model.compute_dtype == torch.float16
        self._accelerator = Accelerator(mixed_precision="fp16" if fp16 else "no", cpu=device.type == "cpu")
        prepared = self._accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self.micro = MicroBatcher(training.micro_batching(training.batch_size))
        self._step = TrainingStep(
            self.model.train(),
            prepared,
            self._accelerator,
            self.micro,
            self.offload_ctx,
            training.loss,
            training.grad_clip,
        )
        backward = self._accelerator.backward
        self._clock = Phases(device)
        self._accelerator.backward = lambda loss: self._between("backward", backward, loss)
        self.model.register_forward_pre_hook(lambda *_: self._clock.mark("forward") if self.model.training else None)
        self._number = 0
        self.batches: Iterator[dict[str, Tensor]] = iter(())
        self.times: list[list[float]] = []
        self.phases: list[dict[str, float]] = []
        self.peak: Peak | None = None
        self.device_gb: dict[str, float] | None = None

    def _between(self, phase: str, action: Callable, *args: object) -> None:
        self._clock.mark(phase)
        action(*args)
        self._clock.mark("rest")

    def take(self, batch: dict[str, Tensor] | None) -> None:
        """Take one step."""
        self._number += 1
        self._step.take(batch, 0, self._number, self._number, self.device)

    def warm_up(self) -> None:
        """Take the steps that are not timed; count the bytes of the second one."""
        crop = self.variant.config.data.augment.crop
        for i in range(UNTIMED - 1):
            batch = to_device(next(self.batches), self.device, crop)
            meter = StepMeter(self.model, state_tensors(self.optimizer), list((batch or {}).values()))
            with meter if i == 1 and not self.variant.compiled else contextlib.nullcontext():
                self.take(batch)
            if i == 1 and not self.variant.compiled:
                self.peak = meter.result()
        if self.device.type == "cuda":
            self.take(to_device(next(self.batches), self.device, crop))
            after = {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
            before = {"allocated": self._before["allocated_gb"], "reserved": self._before["cached_gb"]}
            self.device_gb = {name: size / 1e9 - before[name] for name, size in after.items()}
        self._clock.seconds()

    def run_round(self, steps: int) -> None:
        """Time some steps, from one batch's arrival to the next."""
        times = []
        hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._clock.mark("optimizer")),
            register_optimizer_step_post_hook(lambda *_: self._clock.mark("rest")),
        ]
        try:
            for _ in range(steps):
                synchronize(self.device)
                begin = time.perf_counter()
                self._clock.mark("data")
                batch = to_device(next(self.batches), self.device, self.variant.config.data.augment.crop)
                self._clock.mark("rest")
                self.take(batch)
                self._clock.mark("end")
                synchronize(self.device)
                times.append(time.perf_counter() - begin)
                self.phases.append(self._clock.seconds())
        finally:
            for hook in hooks:
                hook.remove()
        self.times.append(times)

    def result(self, reference: Runner | None = None) -> dict:
        """Return ``images_per_s`` (median), its ``spread`` over rounds, ``seconds`` by phase, and the speed relative to
        a reference in the same rounds."""
        data = self.variant.config
        images = data.training.batch_size * data.data.sequence.length
        rounds = [statistics.median(times) for times in self.times]
        row = {
            "name": self.variant.name,
            "images_per_s": images / statistics.median(rounds),
            "spread": [images / max(rounds), images / min(rounds)],
            "seconds": {phase: statistics.median(p[phase] for p in self.phases) for phase in PHASES},
            "micro_batch_size": self.micro.size,
            "measured_bytes_by_kind": self.peak.by_kind if self.peak else None,
            "device_gb": self.device_gb,
        }
        if reference is not None:
            others = [statistics.median(times) for times in reference.times]
            row["relative"] = statistics.median(other / own for own, other in zip(rounds, others))
        return row


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def endless_batches(train_set: WindowDataset, config: Config, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield whole batches of training windows, epoch after epoch, as training loads them.

    Raises:
        UserError: there are fewer windows than a batch has.
    """
    size = config.training.batch_size
    if len(train_set) < size:
        raise UserError(
            f"training.batch_size={size}: there are {len(train_set)} training windows, not one whole batch; lower it."
        )
    epoch = 0
    while True:
        train_set.epoch = epoch
        order = [b for b in epoch_batches(train_set, size, config.seed, epoch) if len(b) == size]
        yield from DataLoader(
            train_set,
            batch_sampler=order,
            num_workers=num_workers(config.data, device),
            pin_memory=device.type == "cuda",
        )
        epoch += 1


def measure_speed(runners: list[Runner], rounds: int, steps: int) -> list[dict]:
    """Time all runners, taking turns, each round in another order; the first is what the others are compared with.

    Args:
        runners: warmed up.
        rounds: how often each has its turn.
        steps: in a turn.
    """
    with ProgressBar("timing steps", rounds * len(runners)) as bar:
        for number in range(rounds):
            for i in range(len(runners)):
                runners[(i + number) % len(runners)].run_round(steps)
                bar.advance()
    return [runner.result(runners[0]) for runner in runners]

"""Speed of training steps.

All variants run in one process, in alternating rounds, so that fluctuations of the machine's speed affect all of them.
"""

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
from tracknet.memory.meter import measure_memory, synchronize
from tracknet.memory.micro_batch import MicroBatcher, free_cached_memory
from tracknet.memory.step_meter import StepMeter, StepPeak
from tracknet.memory.streaming import place_
from tracknet.models.heatmap_model import build_model
from tracknet.planning.flops import count_flops
from tracknet.planning.planner import Planner
from tracknet.planning.step_plan import plan_training
from tracknet.progress import ProgressBar
from tracknet.quantization.apply import apply_mode
from tracknet.training.batches import epoch_batches, to_device
from tracknet.training.cuda_graphs import make_graphs
from tracknet.training.memory_optimizations import apply_memory_optimizations_
from tracknet.training.optimizer import build_optimizer, set_learning_rate, state_tensors, use_paged_state
from tracknet.training.step import TrainingStep

# Forward and backward of a CUDA graph are one phase.
PHASES = ("data", "forward", "backward", "graph", "optimizer", "rest")
UNTIMED = 3  # first steps of a run, not timed: they create the optimizer's state, run the meter, and compile


class Phases:
    """Timer of the phases of a training step.

    Args:
        device: device of the model. On a GPU, times are those of CUDA events on the current stream, so that marks do
            not synchronize.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # phase, and the event or time in seconds at its start

    def mark(self, phase: str) -> None:
        """Start a phase, which ends at the next mark. Nothing is marked inside a CUDA graph."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase since the last call.

        On a GPU, call it after the device was synchronized: events that have not completed have no elapsed time.
        Marks of names outside ``PHASES`` only end the previous phase.
        """
        total = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if phase in total:
                total[phase] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._marks.clear()
        return total


class Runner:
    """Variant with its model and optimizer, trained step by step with the same ``TrainingStep`` as ``tracknet train``.

    Args:
        variant: variant to build.
        device: device of the model.

    Attributes:
        variant: variant of the runner.
        model: model in training mode.
        level: level of checkpointing, planned if the configuration says ``auto``.
        batches: iterator of batches; set it before the first step.
        times: seconds of each timed step, by round.
        phases: seconds by phase of each timed step.
        peak: memory peak of one step, counted tensor by tensor; ``None`` before ``warm_up``, or if blocks are compiled.
        device_gb: peak of CUDA's allocator in GB without what was there before, ``allocated`` and ``reserved``;
            ``None`` on a CPU.

    Raises:
        UserError: if the variant offloads to disk.
    """

    def __init__(self, variant: Variant, device: torch.device):
        self.variant, self.device = variant, device
        config, training = variant.config, variant.config.training
        if training.memory_optimization.use_disk_offload:
            raise UserError(
                f"{variant.name}: the speed of training.memory_optimization.use_disk_offload=true depends on the disk,"
                " so it is not measured. Benchmark without speed (--what memory)."
            )
        # The memory of earlier runners in this process is subtracted from the peak in `warm_up`.
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self._memory_before = measure_memory(device)
        # Model and optimizer, in the order in which training builds them.
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, config.data.sequence.length)
        streams = training.streams_weights and self.model.backbone is not None
        apply_mode(self.model, training.mode, device, True, partial(place_, device=device, blocks_stay=streams))
        optimizer_config = use_paged_state(training.optimizer, training.memory_optimization.offloads, device)
        self.optimizer = build_optimizer(self.model, optimizer_config, device, config.seed)
        set_learning_rate(self.optimizer, 0.01)  # a small factor, so that the weights hardly change
        planner = Planner(config.model, training, config.data.sequence.length, config.data.training_wh, device.type)
        training = plan_training(planner, self.model, device)
        if device.type == "cuda":
            # The timing of other plans must not count.
            free_cached_memory()
            torch.cuda.reset_peak_memory_stats(device)
        self.level = training.memory_optimization.level
        self.offload_ctx, _ = apply_memory_optimizations_(
            self.model, dataclasses.replace(training, compile=variant.compiled), device, None
        )
        fp16 = self.model.compute_dtype == torch.float16
        self._accelerator = Accelerator(mixed_precision="fp16" if fp16 else "no", cpu=device.type == "cpu")
        prepared = self._accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self.micro = MicroBatcher(training.micro_batching(training.batch_size, config.data.training_wh))
        self._step = TrainingStep(
            self.model.train(),
            prepared,
            self._accelerator,
            self.micro,
            self.offload_ctx,
            training.loss,
            training.grad_clip,
            make_graphs(self.model, training, device),
        )
        # Marks around the phases: backward is called through the accelerator, forward through the model's hooks.
        backward = self._accelerator.backward
        self._clock = Phases(device)
        self._accelerator.backward = lambda loss: self._mark_around("backward", backward, loss)
        if (graphs := self._step.graphs) is not None:
            run = graphs.run
            graphs.run = lambda *args: self._mark_around("graph", run, *args)  # type: ignore[method-assign]
        self.model.register_forward_pre_hook(lambda *_: self._clock.mark("forward") if self.model.training else None)
        self._step_number = 0
        self.batches: Iterator[dict[str, Tensor]] = iter(())
        self.times: list[list[float]] = []
        self.phases: list[dict[str, float]] = []
        self.peak: StepPeak | None = None
        self.device_gb: dict[str, float] | None = None

    def _mark_around(self, phase: str, action: Callable, *args: object) -> Any:
        """Call an action and attribute its time to a phase; return its result."""
        self._clock.mark(phase)
        result = action(*args)
        self._clock.mark("rest")
        return result

    def take(self, batch: dict[str, Tensor] | None) -> None:
        """Run one training step on a batch; ``None`` is the empty share of a process in distributed training."""
        self._step_number += 1
        self._step.take(batch, 0, self._step_number, self._step_number, self.device)

    @property
    def flops(self) -> int | None:
        """Operations of a step without recomputation; ``None`` with cached features, which leave the decoder's."""
        config = self.variant.config
        if config.training.cache_features:
            return None
        data = config.data
        per_window = count_flops(config.model, config.training, data.sequence.length, data.training_wh)
        return config.training.batch_size * per_window

    @property
    def num_replays(self) -> int:
        """Number of micro-batches that ran as a replayed CUDA graph."""
        return self._step.graphs.num_replays if self._step.graphs is not None else 0

    def warm_up(self) -> None:
        """Run the untimed steps and measure the memory of one of them."""
        crop = self.variant.config.data.augment.crop
        # The second step is metered, because the first one also creates the optimizer's state. Compiled blocks are not
        # metered: the meter observes single operators.
        for i in range(UNTIMED - 1):
            batch = to_device(next(self.batches), self.device, crop)
            meter = StepMeter(self.model, state_tensors(self.optimizer), list((batch or {}).values()))
            with self._step.eager(), meter if i == 1 and not self.variant.compiled else contextlib.nullcontext():
                self.take(batch)
            if i == 1 and not self.variant.compiled:
                self.peak = meter.result()
        # One more step without the meter. The peak of the allocator covers all steps of this runner.
        if self.device.type == "cuda":
            for _ in range(2):  # with CUDA graphs, the capture and a replay
                self.take(to_device(next(self.batches), self.device, crop))
            after = {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
            before = {"allocated": self._memory_before["allocated_gb"], "reserved": self._memory_before["cached_gb"]}
            self.device_gb = {name: size / 1e9 - before[name] for name, size in after.items()}
        self._clock.seconds()

    def run_round(self, steps: int) -> None:
        """Time a number of steps, from the arrival of one batch to that of the next."""
        times = []
        if self._step.graphs is not None:
            # Capture the graphs again. They are dropped at the end of a round, because they take the memory of a step.
            self.take(to_device(next(self.batches), self.device, self.variant.config.data.augment.crop))
            self._clock.seconds()
        # Global optimizer hooks are registered for this round only, because other runners have optimizers as well.
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
            if self._step.graphs is not None:
                self._step.free_memory()
        self.times.append(times)

    def result(self, reference: Runner | None = None) -> dict:
        """Return the row of a table.

        Args:
            reference: runner that was timed in the same rounds; ``None`` omits ``relative``.

        Returns:
            ``name``, ``images_per_s`` (median of the rounds), ``spread`` (slowest and fastest round), ``seconds``
            (median by phase), ``micro_batch_size``, ``gradient_checkpointing`` (planned level),
            ``measured_bytes_by_kind``, ``device_gb``, ``flops_per_s`` (arithmetic per second without recomputation;
            ``None`` with cached features), and ``relative`` (speed relative to the reference, as the median of the
            ratios within each round).
        """
        config = self.variant.config
        images = config.training.batch_size * config.data.sequence.length
        rounds = [statistics.median(times) for times in self.times]
        row = {
            "name": self.variant.name,
            "images_per_s": images / statistics.median(rounds),
            "spread": [images / max(rounds), images / min(rounds)],
            "seconds": {phase: statistics.median(p[phase] for p in self.phases) for phase in PHASES},
            "micro_batch_size": self.micro.size,
            "gradient_checkpointing": self.level,
            "measured_bytes_by_kind": self.peak.by_kind if self.peak else None,
            "device_gb": self.device_gb,
            "flops_per_s": self.flops / statistics.median(rounds) if self.flops else None,
        }
        if reference is not None:
            # Ratios within a round compare steps that are close in time, so that a slower machine slows down both.
            reference_rounds = [statistics.median(times) for times in reference.times]
            row["relative"] = statistics.median(theirs / mine for mine, theirs in zip(rounds, reference_rounds))
        return row


def endless_batches(train_set: WindowDataset, config: Config, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield whole batches of training windows, epoch after epoch, loaded as in training.

    Args:
        train_set: training windows.
        config: configuration of the run.
        device: device of the model.

    Raises:
        UserError: if the dataset contains fewer windows than a batch.
    """
    size = config.training.batch_size
    if len(train_set) < size:
        raise UserError(
            f"training.batch_size={size}: the training split contains only {len(train_set)} windows, not one whole"
            " batch. Set a smaller batch size."
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
    """Time all runners in alternating rounds; the order of the runners rotates from round to round.

    Args:
        runners: runners after their warm-up; the first one is the reference.
        rounds: number of rounds.
        steps: timed steps per runner and round.

    Returns:
        One row per runner, see ``Runner.result``.
    """
    with ProgressBar("timing steps", rounds * len(runners)) as bar:
        for number in range(rounds):
            for i in range(len(runners)):
                runners[(i + number) % len(runners)].run_round(steps)
                bar.advance()
    return [runner.result(runners[0]) for runner in runners]

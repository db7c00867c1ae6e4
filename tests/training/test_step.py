"""Training steps: recovery when memory runs out, micro-batches, normalization, clipping, and gradient scaling."""

import copy
import itertools
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.micro_batch import MicroBatcher
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.training.collapse import PeakCounts, count_peaks
from tracknet.training.losses import event_loss, heatmap_loss
from tracknet.training.optimizer import build_optimizer
from tracknet.training.step import TrainingStep, _normalizers

CPU = torch.device("cpu")
# Modes with everything that is random or depends on other rows of a batch: dropout, outlier columns, stochastic
# rounding, uneven weights.
CASES = {
    "default": ("default", []),
    "int8": ("int8", []),
    "int8_full": ("int8_full", ["training.memory_optimization.gradient_checkpointing=none"]),
    "qlora": (
        "qlora",
        ["training.memory_optimization.gradient_checkpointing=full", "training.optimizer.name=adamw8bit"],
    ),
}


class _FailAt(TorchDispatchMode):
    """Dispatch mode that counts operators and raises an out-of-memory error at the n-th."""

    def __init__(self, index=None):
        super().__init__()
        self.index, self.count = index, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # profiler operators only mark a timeline and allocate nothing
            self.count += 1
            if self.count - 1 == self.index:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


class _Runs:
    """Runs of two steps on one batch (of four windows by default), each from the same initial state."""

    def __init__(self, overrides, case, windows=4):
        mode, settings = CASES[case]
        self.windows = windows
        self.config = compose("synthetic", "vit_tiny_heatmap", mode, [*overrides, "training.precision=fp32", *settings])
        training = self.config.training
        torch.manual_seed(0)
        self.model = build_model(self.config.model, 3)
        apply_mode(self.model, replace(training.mode, precision="fp32"), CPU)
        generator = torch.Generator().manual_seed(1)
        self.batch = {
            "frames": torch.randint(0, 256, (windows, 3, 3, 72, 128), dtype=torch.uint8, generator=generator),
            "xy": torch.rand(windows, 3, 2, generator=generator) * 70,
            "visible": torch.ones(windows, 3, dtype=torch.bool),
            "weight": torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]).repeat(windows // 4, 1),
            "event": torch.tensor([[0, 1, 0], [-1, -1, -1], [0, 2, 0], [0, 0, 0]]).repeat(windows // 4, 1),
        }

    def run(self, *sizes, failure=None, steps=2):
        """Take steps that start with the micro-batch sizes ``sizes``; further steps keep the current size.

        Args:
            sizes: micro-batch size at the start of each step.
            failure: context of the first step, which may make it run out of memory.
            steps: number of steps.

        Returns:
            Gradients of the first step, all tensors of model and optimizer after the last step, and the micro-batch
            size at the end of each step.
        """
        training, model = self.config.training, copy.deepcopy(self.model)
        if training.memory_optimization.checkpointing != "none":
            checkpoint_(model, training.memory_optimization.checkpointing)
        model.train()
        optimizer = build_optimizer(model, training.optimizer, CPU)
        accelerator = Accelerator(cpu=True)
        keys = training.micro_batching(self.windows)
        keys.start_size = sizes[0]
        micro = MicroBatcher(keys)
        gradients = []
        handle = register_optimizer_step_pre_hook(
            lambda *_: gradients.append(
                torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
            )
        )
        step = TrainingStep(
            model,
            accelerator.prepare_optimizer(optimizer, device_placement=False),
            accelerator,
            micro,
            nullcontext(),
            training.loss,
            training.grad_clip,
        )
        taken = []
        try:
            for number in range(steps):
                if 0 < number < len(sizes):
                    micro.size = sizes[number]
                with failure if number == 0 and failure is not None else nullcontext():
                    step.take(self.batch, 0, number + 1, 7 + number, CPU)
                taken.append(micro.size)
        finally:
            handle.remove()
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return gradients[0], [*model.state_dict().values(), *state], taken


def _fails_at(tiny, case, indices):
    runs = _Runs(tiny("vit"), case)
    counter = _FailAt()
    runs.run(4, failure=counter, steps=1)
    wanted = {size: runs.run(size)[1] for size in (4, 2)}
    recovered = []
    for index in indices(counter.count):
        _, tensors, (size, _) = runs.run(4, failure=_FailAt(index))
        # Bit-identical to the run with this size from the start.
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted[size], strict=True)), index
        recovered.append(size)
    # In forward and backward the batch is split. In the optimizer only freeing memory helps, and the size stays.
    assert set(recovered) == {4, 2}
    return counter.count


@pytest.mark.parametrize("case", ["int8_full", "qlora"])
def test_memory_that_runs_out_at_some_operators_changes_nothing(tiny, case):
    """Test some operators of forward and backward, and some of the last 60, which belong to clipping and optimizer."""
    count = _fails_at(tiny, case, lambda n: itertools.chain(range(0, n - 60, n // 3), range(n - 60, n, 9), [n - 1]))
    assert count > 500


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_that_runs_out_at_every_operator_changes_nothing(tiny, case):
    _fails_at(tiny, case, range)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch_for_every_split(tiny, case):
    """The gradients are equal up to fp32 rounding, with dropout, outliers and uneven weights."""
    runs = _Runs(tiny("vit"), case)
    whole = runs.run(4, steps=1)[0]
    for size in (3, 2, 1):
        part = runs.run(size, steps=1)[0]
        assert (whole - part).norm() < 1e-5 * whole.norm(), size  # measured: 2.5e-6


REAL = """
import ctypes, json, resource, sys, torch
import psutil
from tests.training.test_step import _Runs
torch.set_num_threads(1)
runs = _Runs(json.loads(sys.argv[1]), "default", windows=64)
for size in (32, 16, 8, 4):
    runs.run(size, steps=1)  # oneDNN's primitives of each size are made: it cannot make them when memory is short
ctypes.CDLL(None).malloc_trim(0)
limit = psutil.Process().memory_info().vms + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
_, tensors, sizes = runs.run(64)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
_, wanted, again = runs.run(*sizes)
assert again == sizes, (again, sizes)
print(json.dumps([sizes, all(torch.equal(a, b) for a, b in zip(tensors, wanted))]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_memory_that_really_runs_out_changes_nothing(tiny):
    """Limit the process to 100 MB more than it has, so that the allocator itself fails.

    It may fail in either step, so the run to compare with uses the sizes that this run ended with, step by step.
    """
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(tiny("vit"))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes, equal = json.loads(done.stdout.splitlines()[-1])
    assert sizes[0] < 64 and equal, sizes


def test_memory_that_stays_short_in_the_optimizer_is_an_error_that_helps(tiny, tmp_path, monkeypatch):
    config = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    with pytest.raises(UserError, match=r"in the optimizer's step 1, [\s\S]*adamw8bit"):
        train_run(config, tmp_path / "runs/r")


def test_other_errors_of_the_optimizer_are_not_swallowed(tiny, tmp_path, monkeypatch):
    config = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train_run(config, tmp_path / "runs/r")


class _Step:
    """Single training step on a tiny model in fp32, with SGD, so that weights move by exactly the gradient."""

    def __init__(self, overrides, size=4, scale=None, clip=None, saving=None, events=False):
        overrides = [*overrides, f"model.events={str(events).lower()}"]
        self.config = compose("synthetic", "vit_tiny_heatmap", "default", overrides)
        torch.manual_seed(0)
        self.model = build_model(self.config.model, 3).train()
        accelerator = Accelerator(cpu=True)
        if scale is not None:  # as accelerate does on a GPU with fp16
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        keys = self.config.training.micro_batching(4)
        keys.start_size = size
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        micro, loss = MicroBatcher(keys), self.config.training.loss
        self.step = TrainingStep(self.model, prepared, accelerator, micro, saving or nullcontext(), loss, clip)
        generator = torch.Generator().manual_seed(1)
        self.batch = {
            "frames": torch.randint(0, 256, (4, 3, 3, 72, 128), dtype=torch.uint8, generator=generator),
            "xy": torch.rand(4, 3, 2, generator=generator) * 70,
            "visible": torch.ones(4, 3, dtype=torch.bool),
            "weight": torch.ones(4, 3),
            "event": torch.tensor([[0, 1, 0], [-1, -1, -1], [0, 2, 0], [0, 0, 0]]),
        }

    def take(self, first=0, seed=7):
        """Take a step; return loss, gradient norm, peaks, and the change of all weights as one vector."""
        before = torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])
        taken = self.step.take(self.batch, first, 1, seed, CPU)
        after = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return *taken, before - after


def test_the_loss_is_the_mean_over_the_weights_of_frames_in_any_split(tiny):
    for size in (4, 3, 1):
        step = _Step(tiny("vit"), size)
        step.batch["weight"] = torch.tensor([[1, 0.5, 0], [0, 0, 0.25], [1, 1, 1], [0, 2, 1]])
        with torch.no_grad():
            logits = step.model(step.batch["frames"])
        wanted = heatmap_loss(logits, step.batch, step.config.training.loss) / 7.75
        loss, norm, peaks, moved = step.take()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        assert norm == pytest.approx(moved.norm().item(), rel=1e-4)
        assert peaks == pytest.approx(PeakCounts(*count_peaks(logits, step.batch).tolist()), rel=1e-4)


def test_frames_that_weigh_half_make_the_same_step(tiny):
    """A mean over weights is invariant to a common factor of the weights; a mean over frames is not."""
    taken = []
    for weight in (1.0, 0.5):
        step = _Step(tiny("vit"))
        step.batch["weight"] *= weight
        taken.append(step.take())
    assert taken[0][0] == pytest.approx(taken[1][0], rel=1e-5)
    assert (taken[0][-1] - taken[1][-1]).norm() < 1e-4 * taken[0][-1].norm()


def test_a_batch_of_little_or_no_weight_takes_a_step_of_little_or_no_size(tiny):
    step = _Step(tiny("vit"))
    loss = step.take()[0]
    for weight in (0.25, 0.0):
        step = _Step(tiny("vit"))
        step.batch["weight"].zero_()[1, 1] = weight
        with torch.no_grad():
            wanted = heatmap_loss(step.model(step.batch["frames"]), step.batch, step.config.training.loss).item()
        assert step.take()[0] == pytest.approx(wanted, rel=1e-5) and wanted < loss


def test_events_are_a_mean_over_the_frames_that_say_something(tiny):
    for size in (4, 3):
        step = _Step(tiny("vit"), size, events=True)
        step.step.loss.events_weight = 3.0
        with torch.no_grad():
            logits, events = step.model(step.batch["frames"], events=True)
        loss = heatmap_loss(logits, step.batch, step.step.loss) / 12 + 3 * event_loss(events, step.batch["event"]) / 9
        assert step.take()[0] == pytest.approx(loss.item(), rel=1e-5)


def test_gradients_are_no_longer_scaled_when_they_are_measured_and_clipped(tiny):
    """If gradients were clipped before unscaling, they would end up 4096 times smaller."""
    plain, scaled = (_Step(tiny("vit"), scale=scale).take() for scale in (None, 4096.0))
    assert scaled[1] == pytest.approx(plain[1], rel=1e-4)
    assert (plain[-1] - scaled[-1]).norm() < 1e-4 * plain[-1].norm()
    clip = plain[1] / 2
    for scale in (None, 4096.0):
        _, norm, _, moved = _Step(tiny("vit"), scale=scale, clip=clip).take()
        assert norm == pytest.approx(plain[1], rel=1e-4)  # the norm before clipping is returned
        assert moved.norm().item() == pytest.approx(clip, rel=1e-3)
        assert torch.cosine_similarity(moved, plain[-1], dim=0) > 0.9999


def test_a_gradient_shorter_than_the_limit_is_left_alone(tiny):
    free = _Step(tiny("vit")).take()
    limited = _Step(tiny("vit"), clip=free[1] * 2).take()
    assert torch.equal(free[-1], limited[-1])


def test_gradients_that_overflow_under_a_scale_skip_the_step_and_halve_the_scale(tiny):
    step = _Step(tiny("vit"), scale=4096.0, clip=1.0)
    next(step.model.head.parameters()).register_hook(lambda grad: grad * torch.inf)
    loss, norm, _, moved = step.take()
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert (moved == 0).all() and step.step.accelerator.scaler.get_scale() == 2048.0


def test_a_step_leaves_no_gradients_behind(tiny):
    step = _Step(tiny("vit"))
    step.take()
    assert all(p.grad is None for p in step.model.parameters())


def test_a_process_without_windows_takes_part_with_nothing(tiny):
    step = _Step(tiny("vit"))
    sizes = [
        _normalizers(batch, CPU, step.step.loss) for batch in (step.batch, None)
    ]  # summed over processes in training
    assert [t.tolist() for t in sizes] == [[12.0, 9.0], [0.0, 0.0]]
    step.batch = None
    loss, norm, peaks, moved = step.take()
    assert (loss, norm, *peaks) == (0.0,) * 8 and (moved == 0).all()


def test_a_process_without_windows_unscales_the_gradients_of_the_others(tiny):
    """Its scaler has not scaled a loss yet, and its gradients come from other processes."""
    step = _Step(tiny("vit"), scale=4.0)
    step.batch = None
    for p in step.model.parameters():
        p.grad = torch.full_like(p, 8.0)
    *_, moved = step.take()
    assert torch.allclose(moved, torch.tensor(2.0), atol=1e-4)


def test_what_waits_for_backward_is_arranged_around_each_forward_only(tiny):
    entered = []

    class Saving:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    step = _Step(tiny("vit"), size=2, saving=Saving())
    next(step.model.head.parameters()).register_hook(lambda grad: entered.append("backward"))
    step.take()
    assert entered == ["in", "out", "backward"] * 2


def test_each_part_says_which_windows_it_has_and_draws_by_their_place(tiny):
    step = _Step(tiny("vit"), size=3)
    seen, drawn = [], []

    def look(model, *_):
        seen.append((model.rng.seed, model.rng.first, model.rng.count))
        drawn.append(torch.rand(()).item())

    step.model.register_forward_pre_hook(look)
    step.take(first=8, seed=7)
    assert seen == [(7, 8, 3), (7, 11, 1)] and step.model.rng.seed is None
    for first, seed in ((8, 7), (8, 6), (9, 7)):
        torch.manual_seed(5)  # the previous state of the generator does not matter
        step.take(first=first, seed=seed)
    parts = [tuple(drawn[i : i + 2]) for i in range(0, 8, 2)]
    assert parts[0] == parts[1] and len({*parts[0], *parts[2], *parts[3]}) == 6

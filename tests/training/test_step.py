"""A step in which memory runs out, wherever that is, is the step in which it does not."""

import copy
import itertools
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.micro_batch import MicroBatcher
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.scripts.training_run import train
from tracknet.training.optimizer import build_optimizer
from tracknet.training.step import TrainingStep

CPU = torch.device("cpu")
# Everything that draws or depends on other rows is on: dropout, outlier columns, stochastic rounding, uneven weights.
CASES = {
    "default": ("default", []),
    "int8": ("int8", []),
    "int8_full": ("int8_full", ["training.memory_optimization.gradient_checkpointing=none"]),
    "qlora": ("qlora", ["training.memory_optimization.gradient_checkpointing=full", "training.optimizer.name=adamw8bit"]),
}  # fmt: skip


class _FailAt(TorchDispatchMode):
    """Runs out of memory once, at the n-th operator that it sees; counts them."""

    def __init__(self, index=None):
        super().__init__()
        self.index, self.count = index, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # which marks a timeline and allocates nothing
            self.count += 1
            if self.count - 1 == self.index:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


class _Runs:
    """Two steps of a batch, of four windows if not said otherwise, from the same state each time."""

    def __init__(self, overrides, case, windows=4):
        mode, settings = CASES[case]
        self.windows = windows
        self.config = compose("synthetic", "vit_tiny_heatmap", mode, [*overrides, "training.precision=fp32", *settings])
        training = self.config.training
        torch.manual_seed(0)
        self.model = build_model(self.config.model, 3)
        apply_mode(self.model, "fp32", training.quantization, training.lora, CPU, training.backbone_trains)
        generator = torch.Generator().manual_seed(1)
        self.batch = {
            "frames": torch.randint(0, 256, (windows, 3, 3, 72, 128), dtype=torch.uint8, generator=generator),
            "xy": torch.rand(windows, 3, 2, generator=generator) * 70, "visible": torch.ones(windows, 3, dtype=torch.bool),
            "weight": torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]).repeat(windows // 4, 1),
            "event": torch.tensor([[0, 1, 0], [-1, -1, -1], [0, 2, 0], [0, 0, 0]]).repeat(windows // 4, 1),
        }  # fmt: skip

    def run(self, *sizes, failure=None, steps=2):
        """Start each step with the micro-batches of ``sizes`` (the last is kept).

        Return the gradients of the first step, all tensors after the last, and the size in which each step ended.
        """
        training, model = self.config.training, copy.deepcopy(self.model)
        if training.memory_optimization.checkpointing != "none":
            checkpoint_(model, training.memory_optimization.checkpointing)
        model.train()
        optimizer = build_optimizer(model, training.optimizer, CPU)
        accelerator = Accelerator(cpu=True)
        keys = training.micro_batching(self.windows)
        keys.start_size = sizes[0]
        micro = MicroBatcher(keys, lambda line: None)
        gradients = []
        handle = register_optimizer_step_pre_hook(
            lambda *_: gradients.append(
                torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
            )
        )
        step = TrainingStep(model, accelerator.prepare_optimizer(optimizer, device_placement=False), accelerator, micro,
                            nullcontext(), training.loss, training.grad_clip, lambda line: None)  # fmt: skip
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
        # Bit for bit the run that had this size from the start.
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted[size], strict=True)), index
        recovered.append(size)
    # In forward and backward the batch is split; in the optimizer nothing but freeing helps, and the split stays.
    assert set(recovered) == {4, 2}
    return counter.count


@pytest.mark.parametrize("case", ["int8_full", "qlora"])
def test_memory_that_runs_out_at_some_operators_changes_nothing(tiny, case):
    """A few of forward and backward, and a few of the last 60, which are the clipping's and the optimizer's."""
    count = _fails_at(tiny, case, lambda n: itertools.chain(range(0, n - 60, n // 3), range(n - 60, n, 9), [n - 1]))
    assert count > 500


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_that_runs_out_at_every_operator_changes_nothing(tiny, case):
    _fails_at(tiny, case, range)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch_for_every_split(tiny, case):
    """To the rounding of fp32, with dropout, outliers and uneven weights."""
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
    """The process may not have more than 100 MB besides what it has: the allocator itself says no.

    It may say so in either step, so the run beside it takes the sizes that this one came to, step by step.
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
        train(config, tmp_path / "runs/r")


def test_other_errors_of_the_optimizer_are_not_swallowed(tiny, tmp_path, monkeypatch):
    config = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(config, tmp_path / "runs/r")

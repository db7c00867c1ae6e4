"""GPUs of 4 and 8 GB: the size of the micro-batch that training finds, compared with the planned one."""

from __future__ import annotations

import itertools
import time

import torch

from on_gpu.session import WH, Session, random_batch
from on_gpu.steps import ROWS, subject
from tracknet.benchmark.speed import Runner
from tracknet.benchmark.variants import Variant
from tracknet.planning.planner import Planner
from tracknet.training.batches import to_device

WINDOWS = 32  # windows per batch


def measure_small_cards(session: Session) -> None:
    """Write one row per GPU size and mode.

    A smaller GPU is simulated by limiting the memory fraction of this process.
    """
    total = torch.cuda.get_device_properties(session.device).total_memory
    for gigabytes in (4, 8):
        for name in ("default", "int8 triton none"):
            item = f"oom {gigabytes} GB {name}"
            if not session.has_time(12, item):
                continue
            with session.guarded(item):
                session.clean()
                torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
                _measure(session, gigabytes, name)
            torch.cuda.set_per_process_memory_fraction(1.0)


def _measure(session: Session, gigabytes: int, name: str) -> None:
    """Take two steps under the memory limit and write the row of the micro-batch size that they end with."""
    mode, changes = ROWS[name]
    config = subject("small", WINDOWS).compose(mode, *changes)
    runner = Runner(Variant(name, config), session.device)
    runner.batches = itertools.repeat(random_batch(WINDOWS, session.device))
    begin = time.perf_counter()
    for _ in range(2):
        runner.take(to_device(next(runner.batches), session.device, None))
    session.synchronize()
    seconds = time.perf_counter() - begin
    planner = Planner(config.model, config.training, config.data.sequence.length, WH, session.device.type)
    plan = planner.at(runner.level).estimate
    fits = [n for n in range(1, WINDOWS + 1) if plan.peak_bytes(n) <= gigabytes * 1e9]
    session.put(
        "oom",
        gb=gigabytes,
        name=name,
        found=runner.micro.size,
        planned=max(fits, default=0),
        seconds=seconds,
        peak_mb=round(torch.cuda.max_memory_allocated() / 1e6),
    )

"""A card of 4 or 8 GB: what size of micro-batch training finds by itself, beside what was planned."""

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

WINDOWS = 32


def measure_small_cards(session: Session) -> None:
    """Put a row for each size of card and mode."""
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
    mode, changes = ROWS[name]
    config = subject("small", WINDOWS).compose(mode, *changes)
    runner = Runner(Variant(name, config), session.device)
    runner.batches = itertools.repeat(random_batch(WINDOWS, session.device))
    begin = time.perf_counter()
    for _ in range(2):
        runner.take(to_device(next(runner.batches), session.device, None))
    session.synchronize()
    seconds = time.perf_counter() - begin
    plan = Planner(config.model, config.training, config.data.sequence.length, WH, session.device.type).estimate
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

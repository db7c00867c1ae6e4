"""One measuring session: how much time is left, and where rows go as soon as they are known."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

WH = (512, 288)
BATCH = 16


@dataclass
class Session:
    """What the sections share.

    Attributes:
        device: what is measured.
        file: takes rows, a JSON object a line.
        budget_s: seconds that the whole session may take.
        data: folder with ``tennis/``, ``rallies/`` and ``dinov2-small/``, for accuracy on real clips; ``None`` where
            there is none.
        reference_ms: a step of full fine-tuning, which the others are compared with.
        num_failed: items that raised.
    """

    device: torch.device
    file: IO[str]
    budget_s: float
    data: Path | None = None
    reference_ms: float = float("nan")
    num_failed: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: self.put("log", text=record.getMessage())
        logging.getLogger("tracknet").addHandler(handler)

    def put(self, kind: str, **row: object) -> None:
        """Write a row at once: a session that is cut off keeps what it has."""
        row = {"kind": kind, "at_s": round(time.monotonic() - self.started, 1), **row}
        self.file.write(json.dumps(row, default=str) + "\n")
        self.file.flush()
        shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items() if name != "detail"}
        print(" ".join(f"{name}={value}" for name, value in shown.items())[:400], flush=True)

    def has_time(self, seconds: float, item: str) -> bool:
        """Whether so many seconds are left; puts a row for what is skipped."""
        if self.left_s() >= seconds:
            return True
        self.put("skipped", item=item)
        return False

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.budget_s - (time.monotonic() - self.started)

    @contextlib.contextmanager
    def guarded(self, item: str) -> Iterator[None]:
        """Turn what one item raises into a row, so that the others are measured all the same."""
        try:
            yield
        except Exception as error:
            self.num_failed += 1
            self.put("failed", item=item, error=repr(error)[:300], detail=traceback.format_exc()[-1500:])

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Give back what the last item held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def time_ms(self, action: Callable[[], object], repeat: int = 20) -> float:
        """Return the median time of an action in milliseconds, on a GPU by events on its stream."""
        action()
        action()
        self.synchronize()
        if self.device.type != "cuda":
            times = []
            for _ in range(repeat):
                begin = time.perf_counter()
                action()
                times.append((time.perf_counter() - begin) * 1e3)
            return statistics.median(times)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        for begin, end in events:
            begin.record()
            action()
            end.record()
        self.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)


def random_batch(size: int, device: torch.device, wh: tuple[int, int] = WH, length: int = 3) -> dict[str, Tensor]:
    """Return a batch as loading makes it: noise with a ball in every frame, in pinned memory for a GPU."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "frames": torch.randint(0, 256, (size, length, 3, wh[1], wh[0]), dtype=torch.uint8, generator=generator),
        "xy": torch.rand(size, length, 2, generator=generator) * min(wh) * 0.7,
        "visible": torch.ones(size, length, dtype=torch.bool),
        "weight": torch.ones(size, length),
        "event": torch.full((size, length), -1),
        "affine": torch.tensor([[1.1, 0, -5.0], [0, 1.1, -3.0]]).expand(size, 2, 3).contiguous(),
        "color": torch.eye(3, 4).expand(size, 3, 4).contiguous(),
        "blur": torch.zeros(size),
        "noise": torch.full((size,), 2.0),
        "noise_seed": torch.arange(size),
    }
    return {name: t.pin_memory() for name, t in batch.items()} if device.type == "cuda" else batch

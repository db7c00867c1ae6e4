"""Measurement session: time budget, timing, and the file that results are written to."""

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

WH = (512, 288)  # width and height of the frames in pixels
BATCH = 16  # windows per batch


@dataclass
class Session:
    """State shared by the sections of ``benchmarks/gpu.py``.

    Attributes:
        device: device that is measured.
        file: output file, with one JSON object per line.
        budget_s: maximum duration of the session in seconds.
        data: folder with real clips and a backbone for the sections ``accuracy`` and ``grid``, or ``None``.
        rows: names of the rows that the sections ``steps`` measure; ``None`` for those of the section.
        reference_ms: duration of the last step of full fine-tuning in milliseconds, the reference of other variants.
        num_failed: number of items that raised an exception.
        started: start of the session, in seconds of the monotonic clock.
    """

    device: torch.device
    file: IO[str]
    budget_s: float
    data: Path | None = None
    rows: tuple[str, ...] | None = None
    reference_ms: float = float("nan")
    num_failed: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # Messages of the package, such as a smaller micro-batch after an out-of-memory error, become rows as well.
        handler = logging.Handler()
        handler.emit = lambda record: self.put("log", text=record.getMessage())
        logging.getLogger("tracknet").addHandler(handler)

    def put(self, kind: str, **row: object) -> None:
        """Write a row and flush it at once, so that a session that is cut off keeps its results.

        Args:
            kind: type of the row, such as ``step``.
            row: columns of the row; ``detail`` is written to the file but not printed.
        """
        row = {"kind": kind, "at_s": round(time.monotonic() - self.started, 1), **row}
        self.file.write(json.dumps(row, default=str) + "\n")
        self.file.flush()
        shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items() if name != "detail"}
        print(" ".join(f"{name}={value}" for name, value in shown.items())[:400], flush=True)

    def has_time(self, seconds: float, item: str) -> bool:
        """Return whether at least ``seconds`` are left; otherwise write a row that ``item`` was skipped."""
        if self.left_s() >= seconds:
            return True
        self.put("skipped", item=item)
        return False

    def left_s(self) -> float:
        """Return the seconds left of the budget, negative if it is exceeded."""
        return self.budget_s - (time.monotonic() - self.started)

    @contextlib.contextmanager
    def guarded(self, item: str) -> Iterator[None]:
        """Write a row for an exception in the context instead of raising it, so that the next items still run."""
        try:
            yield
        except Exception as error:
            self.num_failed += 1
            self.put("failed", item=item, error=repr(error)[:300], detail=traceback.format_exc()[-1500:])

    def synchronize(self) -> None:
        """Wait until all kernels queued on a GPU have finished; do nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Free the memory of the last item and reset the peak of the allocator."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def time_ms(self, action: Callable[[], object], repeat: int = 20) -> float:
        """Return the median duration of an action in milliseconds, measured by CUDA events on a GPU.

        Args:
            action: function to time; it is called twice before timing starts.
            repeat: number of timed calls.
        """
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
        # All calls are queued before the device is synchronized: waiting after each call would add launch latencies.
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        for begin, end in events:
            begin.record()
            action()
            end.record()
        self.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)


def random_batch(size: int, device: torch.device, wh: tuple[int, int] = WH, length: int = 3) -> dict[str, Tensor]:
    """Return a random batch with the keys, shapes and dtypes of the data loader.

    Frames are noise with a ball at a random position in each. Augmentation parameters are set to a fixed affine
    transform, no color change, no blur and some noise.

    Args:
        size: windows in the batch.
        device: device that the batch is meant for; the tensors stay on the host, in pinned memory for a GPU.
        wh: width and height of the frames in pixels.
        length: frames per window.
    """
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

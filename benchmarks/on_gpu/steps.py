"""Training steps of each mode: duration, kernels, launches, host time, and memory peaks.

Peaks are those of the allocator, those counted tensor by tensor, and the planned ones.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from on_gpu.session import BATCH, WH, Session, random_batch
from tracknet.benchmark.speed import Runner
from tracknet.benchmark.variants import LEVEL, OFFLOAD, OPTIMIZER, Subject, Variant
from tracknet.planning.planner import Planner
from tracknet.training.batches import to_device

TRITON, BITSANDBYTES = (f"training.int8_kernel={kernel}" for kernel in ("triton", "bitsandbytes"))
NONE, FULL = f"{LEVEL}=none", f"{LEVEL}=full"
NO_DROPOUT = "training.lora.lora_dropout=0"
ALL = "training.train_last_blocks=null"
BUDGET = "training.memory_optimization.budget"
LAST_4 = ("training.train_last_blocks=4", NO_DROPOUT)
# Mode and overrides of each row, in the order of importance.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "default": ("default", ()),
    "frozen": ("frozen", ()),
    "lora": ("lora", ()),
    "int8 triton none": ("int8", (NONE, ALL, TRITON)),
    "qlora none": (
        "qlora",
        (
            NONE,
            ALL,
        ),
    ),
    "qlora last-4": ("qlora", (NONE, *LAST_4)),
    "int8 last-6": ("int8", (NONE, "training.train_last_blocks=6")),
    "int8 last-4": ("int8", (NONE, "training.train_last_blocks=4")),
    "qlora last-6 dropout": ("qlora", (NONE, "training.train_last_blocks=6")),
    "default last-4": ("default", ("training.train_last_blocks=4",)),
    "int8 as shipped": ("int8", ()),
    "qlora as shipped": ("qlora", ()),
    "int8 lean": ("int8", (f"{BUDGET}=lean",)),
    "qlora lean": ("qlora", (f"{BUDGET}=lean",)),
    "int8 free": ("int8", (f"{BUDGET}=free",)),
    "qlora free": ("qlora", (f"{BUDGET}=free",)),
    "int8 selective": ("int8", (f"{LEVEL}=selective",)),
    "int8 backward": ("int8", (NONE, ALL, TRITON, "training.quantization.int8_backward=true")),
    "int8 bitsandbytes none": ("int8", (NONE, ALL, BITSANDBYTES)),
    "default eager": ("default", ("training.cuda_graphs=off",)),
    "int8 eager": ("int8", ("training.cuda_graphs=off",)),
    "qlora eager": ("qlora", ("training.cuda_graphs=off",)),
    "lora nodrop": ("lora", (NO_DROPOUT,)),
    "lora last-4": ("lora", LAST_4),
    "default full": ("default", (FULL,)),
    "default blocks": ("default", (f"{LEVEL}=blocks",)),
    "int8 triton full": ("int8", (FULL, ALL, TRITON)),
    "int8 triton t0": ("int8", (NONE, ALL, TRITON, "training.quantization.llm_int8_threshold=0")),
    "qlora none nodrop": ("qlora", (NONE, ALL, NO_DROPOUT)),
    "qlora last-4 dropout": ("qlora", (NONE, LAST_4[0])),
    "default fp16": ("default", ("training.precision=fp16",)),
    "int8 triton fp16": ("int8", (NONE, ALL, TRITON, "training.precision=fp16")),
    "int8_full none": ("int8_full", (NONE,)),
    "int8_full as shipped": ("int8_full", ()),
    "adam8": ("default", (OPTIMIZER,)),
    "default offload": ("default", (NONE, OFFLOAD)),
    "qlora 8bit offload": ("qlora", (FULL, ALL, OPTIMIZER, OFFLOAD)),
}
OFFLOADED = ("default offload", "qlora 8bit offload")
EVERY = tuple(name for name in ROWS if name not in OFFLOADED)


def subject(size: str, batch: int) -> Subject:
    """Return the subject of a backbone, at the usual frame size.

    Weights are random, except for the embedded backbone: neither memory nor speed depends on them.

    Args:
        size: ``tiny`` (the embedded ViT), a DINOv2 size such as ``small``, or a ConvNeXt such as ``convnext-tiny-224``.
        batch: windows per batch.
    """
    if size == "tiny":
        model, name, weights = "vit_tiny_heatmap", "embedded/vit_tiny", "pretrained"
    elif size.startswith("convnext"):
        model, name, weights = "convnext_fpn_heatmap", f"facebook/{size}", "random"
    else:
        model, name, weights = "vit_heatmap", f"facebook/dinov2-{size}", "random"
    backbone = (f"model.backbone.name={name}", f"model.backbone.weights={weights}")
    return Subject(
        "synthetic", model, (*backbone, f"training.batch_size={batch}", f"data.preprocess.resize=[{WH[0]},{WH[1]}]")
    )


def measure_steps(
    session: Session, size: str, names: Sequence[str], batch: int = BATCH, compiled: bool = False
) -> None:
    """Write one row per variant, relative to the session's last step of full fine-tuning.

    Args:
        session: session of the measurement.
        size: size of the backbone, see ``subject``.
        names: names of the rows in ``ROWS``, unless the session selects others.
        batch: windows per batch.
        compiled: whether blocks are compiled.
    """
    for name in session.rows or names:
        item = f"{'compile' if compiled else 'steps'} {size} {batch} {name}"
        if session.has_time(45 if compiled else 15, item):
            with session.guarded(item):
                session.clean()
                _measure_variant(session, size, name, batch, compiled)


def _measure_variant(session: Session, size: str, name: str, batch: int, compiled: bool) -> None:
    """Time one variant, measure its memory and its kernels, and write its row."""
    mode, changes = ROWS[name]
    AcceleratorState._reset_state()  # accelerate keeps the precision in a global, and variants differ in it
    config = subject(size, batch).compose(mode, *changes)
    on_gpu = session.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    runner = Runner(Variant(name, config, compiled), session.device)
    # One fixed batch: loading data is not part of the measurement.
    fixed = random_batch(batch, session.device)
    runner.batches = itertools.repeat(fixed)
    begin = time.perf_counter()
    runner.warm_up()
    warm_up_s = time.perf_counter() - begin
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = _time_steps(session, runner, fixed)
    stats = torch.cuda.memory_stats() if on_gpu else {}
    # Host time is the CPU time of a step without waiting for the GPU.
    moved = to_device(fixed, session.device, None)
    begin = time.process_time()
    runner.take(moved)
    host_ms = (time.process_time() - begin) * 1e3
    ms = statistics.median(times) * 1e3
    if name == "default" and not compiled:
        session.reference_ms = ms
    # Very slow steps are not profiled.
    kernels = profile_kernels(session, lambda: runner.take(moved)) if on_gpu and ms < 1500 else {}
    planner = Planner(config.model, config.training, config.data.sequence.length, WH, session.device.type)
    planned = planner.at(runner.level).estimate
    session.put(
        "compile" if compiled else "step",
        size=size,
        batch=batch,
        name=name,
        ms=ms,
        best_ms=min(times) * 1e3,
        relative=session.reference_ms / ms,
        host_ms=host_ms,
        warm_up_s=warm_up_s,
        tflops_per_s=(runner.flops or 0) / ms / 1e9,
        level=runner.level,
        micro_batch=runner.micro.size,
        replays=runner.num_replays,
        planned_mb=round(planned.peak_bytes(runner.micro.size) / 1e6),
        counted_mb=round(runner.peak.num_bytes / 1e6) if runner.peak else None,
        **{
            f"{kind}_mb": round((stats[f"{kind}_bytes.all.peak"] - (0 if kind == "reserved" else before)) / 1e6)
            for kind in ("allocated", "active", "reserved")
            if stats
        },
        **kernels,
    )


def _time_steps(session: Session, runner: Runner, fixed: dict) -> list[float]:
    """Return the seconds of single steps.

    At least three steps are timed, up to 20 within two seconds; only one if it takes more than two seconds.
    """
    times: list[float] = []
    end = time.monotonic() + 2
    while len(times) < (1 if times and times[-1] > 2 else 3) or (len(times) < 20 and time.monotonic() < end):
        session.synchronize()
        begin = time.perf_counter()
        runner.take(to_device(fixed, session.device, None))
        session.synchronize()
        times.append(time.perf_counter() - begin)
    return times


def profile_kernels(session: Session, take: Callable[[], None]) -> dict:
    """Profile the kernels of a step.

    Args:
        session: session of the measurement.
        take: function that runs the step.

    Returns:
        ``kernel_ms`` (total duration), ``launches`` (number of kernels) and ``detail`` (the 12 longest kernels, with
        milliseconds and name).
    """
    session.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        take()
        session.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event.name[:60]] += event.device_time / 1e3
    longest = [(round(ms, 2), name) for name, ms in by_name.most_common(12)]
    return {"kernel_ms": sum(by_name.values()), "launches": len(kernels), "detail": longest}

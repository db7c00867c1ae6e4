"""Benchmark of training modes against full fine-tuning, with a report."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tracknet.api.train import new_run, train_run
from tracknet.benchmark import variants
from tracknet.benchmark.accuracy import AccuracyPlan, accuracy_config, measure_accuracy, quarter
from tracknet.benchmark.inference import measure_inference, video_of
from tracknet.benchmark.loop import measure_loop
from tracknet.benchmark.machine import describe_machine
from tracknet.benchmark.memory import plan_memory
from tracknet.benchmark.report import draw, render
from tracknet.benchmark.speed import Runner, endless_batches, measure_speed
from tracknet.benchmark.variants import Subject, Variant
from tracknet.config import Config
from tracknet.data.clips import WindowDataset
from tracknet.data.labels import Clip
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.files import expand_user, write_json, write_text
from tracknet.planning.flops import measure_matrix_rate
from tracknet.progress import quiet, track
from tracknet.reporting.console import echo
from tracknet.runs.load import resolve_device
from tracknet.training.features import build_features

VIDEO_FRAMES = 300  # maximum length of the video that inference is timed on


def benchmark_modes(
    args: argparse.Namespace, overrides: list[str], folder: Path | None, gpu_bytes: int | None
) -> dict | None:
    """Run the requested measurements and write ``report.md``, charts and ``result.json``.

    Args:
        args: parsed options of ``tracknet benchmark``.
        overrides: ``section.key=value`` overrides, applied to every mode.
        folder: new folder for the report; ``None`` creates one under ``outputs/benchmark``.
        gpu_bytes: memory in bytes that the largest batch must fit into; ``None`` uses the memory of the GPU, or 8 GB
            without one.

    Returns:
        The content of ``result.json``; ``None`` for a dry run, which only prints the planned measurements.

    Raises:
        UserError: if ``--int8-kernels`` is requested on a CPU, or a variant cannot be composed or measured.
    """
    # Resolve what is measured, and on which device.
    subject = Subject(args.data, args.model, tuple(overrides), args.config_dir)
    has_backbone = subject.compose("default").model.backbone is not None
    modes = args.modes or (["default", *variants.CONTROLS, "int8", "qlora"] if has_backbone else ["default"])
    config = subject.compose(modes[0])
    device = resolve_device(config.training.device)
    if device.type == "cuda" and gpu_bytes is None:
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    if args.dry_run:
        for line in _outline(subject, modes, args, has_backbone):
            echo(line)
        return None
    if args.int8_kernels and device.type != "cuda":
        raise UserError(
            f"--int8-kernels times kernels for a GPU, but training.device is {device.type}: remove the option."
        )
    # Record the setup, which the report prints beside the numbers.
    result: dict = {
        "machine": describe_machine(device),
        "data": args.data,
        "model": args.model,
        "backbone": config.model.backbone.name if config.model.backbone is not None else None,
        "batch_size": config.training.batch_size,
        "num_frames": config.data.sequence.length,
        "size_wh": list(config.data.training_wh),
        "modes": modes,
        "gpu_memory_bytes": gpu_bytes or 8 * 10**9,
        "not_measured": _not_measured(device, args.what),
    }
    for line in result["not_measured"]:
        echo(f"Not measured here: {line}")
    folder = folder or Path("outputs/benchmark") / new_run(Path(), f"{args.data}-{args.model}").name
    # Measure. Composing every variant first reports an invalid one before the first measurement starts.
    _outline(subject, modes, args, has_backbone)
    with tempfile.TemporaryDirectory(prefix="tracknet-") as scratch:
        _measure(result, subject, modes, args, config, device, has_backbone, Path(scratch))
    # Write the report. The folder is created last, so that a failed measurement leaves nothing behind.
    folder.mkdir(parents=True)
    write_text(folder / "report.md", render(result))
    write_json(folder / "result.json", result)
    charts = draw(result, folder)
    echo(render(result))
    for path in (folder / "report.md", *charts):
        echo(f"wrote {path}")
    return result


def _measure(
    result: dict,
    subject: Subject,
    modes: list[str],
    args: argparse.Namespace,
    config: Config,
    device: torch.device,
    has_backbone: bool,
    scratch: Path,
) -> None:
    """Add the requested measurements to ``result`` in place."""
    if "speed" in args.what:
        result["speed"] = _measure_speed(subject, modes, args, config, device, scratch)
    # Always planned: the report compares it with the targets, and the accuracy chart uses it as its x axis.
    result["modes_memory"] = plan_memory(variants.shipped(subject, modes), result["gpu_memory_bytes"])
    if "memory" in args.what:
        result["memory"] = (
            plan_memory(variants.ingredients(subject), result["gpu_memory_bytes"])
            if has_backbone
            else result["modes_memory"]
        )
    if "accuracy" in args.what:
        plan = _accuracy_plan(args)
        runs = Path(args.runs) if args.runs else scratch
        rows = measure_accuracy(subject, modes, plan, _train_quietly, runs)
        result["accuracy"] = {
            "seeds": args.seeds,
            "steps": args.steps,
            "split": "test",
            "rows": rows,
            "crop": list(accuracy_config(subject, modes[0], 0, plan).data.augment.crop or ()),
        }


def _accuracy_plan(args: argparse.Namespace) -> AccuracyPlan:
    """Return the training runs of the accuracy comparison that the options describe."""
    return AccuracyPlan(args.seeds, args.steps, tuple(args.lr_scales))


def _train_quietly(config: Config, run: Path) -> dict:
    """Train a benchmark run without progress bars and log lines, of which there would be one set per run."""
    with quiet():
        return train_run(config, run)


def _measure_speed(
    subject: Subject, modes: list[str], args: argparse.Namespace, config: Config, device: torch.device, scratch: Path
) -> dict:
    """Time training steps, inference on a video, and the training loop.

    Returns:
        ``rounds``, ``steps_per_round``, ``matrix_flops_per_s`` (operations per second of a large product), and the
        results of ``measure_speed`` (``steps``), ``measure_inference`` (``inference``) and ``measure_loop`` (``loop``;
        ``None`` if the first mode offloads or with ``--as-shipped``).
    """
    steps = args.steps_per_round or (10 if device.type == "cuda" else 1)
    sets = {
        split: WindowDataset(read_split(config.data, split), config.data, training=split == "train")
        for split in ("train", "val", "test")
    }
    batches = endless_batches(sets["train"], config, device)
    rows = _timed(subject, modes, args)
    # All variants are built and warmed up before any is timed, because rounds alternate between them.
    runners = []
    for variant in track(rows, "building and warming up"):
        runner = Runner(variant, device)
        runner.batches = (
            _with_features(runner, sets["train"].clips) if variant.config.training.cache_features else batches
        )
        runner.warm_up()
        runners.append(runner)
    step_times = measure_speed(runners, args.rounds, steps)
    inference: list[dict] = []
    if not args.as_shipped:
        # Inference is timed for the modes as shipped only, not for the other variants.
        video = video_of(sets["test"], scratch, VIDEO_FRAMES)
        shipped = [runner for runner in runners if runner.variant.name in modes]
        inference = measure_inference(shipped, video, min(args.rounds, 2))
    loop = None
    if not config.training.memory_optimization.offloads and not args.as_shipped:
        # Crops of a quarter of the area: the overhead of the loop becomes four times as large a share of a step.
        cropped = subject.compose(modes[0], f"data.augment.crop={quarter(config)}", f"{variants.LEVEL}=none")
        windows = WindowDataset(sets["train"].clips, cropped.data, training=True)
        runner = Runner(Variant(modes[0], cropped), device)
        measured = measure_loop(cropped, runner, windows, sets["val"], max(4, args.rounds), max(6, steps), scratch)
        loop = {"mode": modes[0], "crop": list(cropped.data.augment.crop or ()), **measured}
    return {
        "rounds": args.rounds,
        "steps_per_round": steps,
        "steps": step_times,
        "matrix_flops_per_s": measure_matrix_rate(device, runners[0].model.compute_dtype),
        "inference": inference,
        "loop": loop,
    }


def _timed(subject: Subject, modes: list[str], args: argparse.Namespace) -> list[Variant]:
    """Return the variants to time that the options describe."""
    if args.as_shipped:
        return variants.shipped(subject, modes)
    return variants.timed(subject, modes, args.compile, args.int8_kernels)


def _with_features(runner: Runner, clips: list[Clip]) -> Iterator[dict[str, Tensor]]:
    """Return endless batches with cached backbone features.

    Features are cached for the first clips only, until they contain four frames per window of a batch: the time of a
    step does not depend on the number of clips.
    """
    config, frames = runner.variant.config, 0
    subset: list[Clip] = []
    while clips[len(subset) :] and frames < 4 * config.training.batch_size:
        subset.append(clips[len(subset)])
        frames += subset[-1].num_frames
    windows = WindowDataset(subset, config.data, training=True, seed=config.seed)
    windows.features = build_features(
        runner.model, windows, runner.device, expand_user(config.data.cache_dir, "data.cache_dir")
    )
    return endless_batches(windows, config, runner.device)


def _outline(subject: Subject, modes: list[str], args: argparse.Namespace, has_backbone: bool) -> list[str]:
    """Return one line per planned measurement.

    Every configuration is composed on the way, so that an invalid one raises its ``UserError`` here.
    """
    lines = []
    if "memory" in args.what:
        rows = variants.ingredients(subject) if has_backbone else variants.shipped(subject, modes)
        lines += [f"memory: {v.name}" for v in rows]
    if "speed" in args.what:
        lines += [f"speed: {v.name}" for v in _timed(subject, modes, args)]
    if "accuracy" in args.what:
        for mode in modes:
            accuracy_config(subject, mode, 0, _accuracy_plan(args))
            searched = f", {len(args.lr_scales)} learning rates" if len(args.lr_scales) > 1 else ""
            lines.append(f"accuracy: {mode}, {args.seeds} seeds of {args.steps} steps{searched}")
    return lines


def _not_measured(device: torch.device, what: list[str]) -> list[str]:
    """Return one line per quantity that this device cannot measure; empty on a GPU."""
    if device.type == "cuda" or not {"speed", "memory"} & set(what):
        return []
    lines = ["the memory that CUDA's allocator reserves (the bytes of tensors are counted one by one instead)"]
    if "speed" in what:
        lines.append(
            "speed on a GPU: int8 and 4-bit kernels, 16-bit units, compiled kernels and transfers; ratios measured on a"
            " CPU do not predict it"
        )
    return lines

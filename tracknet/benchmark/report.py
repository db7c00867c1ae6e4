"""Report of a benchmark, as Markdown and as charts."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from tracknet.benchmark.speed import PHASES
from tracknet.files import new_file
from tracknet.reporting.report import plot_estimates

# Targets relative to full fine-tuning, by mode: maximum share of its memory, minimum shares of its speed and accuracy.
TARGETS = {"int8": (0.50, 1.2, 0.98), "qlora": (0.25, 0.8, 0.97)}


def render(result: dict) -> str:
    """Return the report as Markdown.

    Args:
        result: content of ``result.json``; quantities that were not measured have no section.
    """
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# {result['model']} on {result['data']}",
        "",
        (
            f"{result['backbone'] or 'no backbone'}; batch of {result['batch_size']} windows of {result['num_frames']}"
            f" frames at {result['size_wh'][0]}x{result['size_wh'][1]}; {machine['device']}, {machine['date']};"
            f" {versions}."
        ),
    ]
    if targets := render_targets(result):
        lines += ["", "## Targets", "", *targets]
    if rows := result.get("memory"):
        lines += [
            "",
            f"## Memory of a training step, planned for a GPU of {result['gpu_memory_bytes'] / 1e9:g} GB",
            "",
            *render_memory(rows),
        ]
    if speed := result.get("speed"):
        rate = speed["matrix_flops_per_s"]
        lines += [
            "",
            "## Speed of training",
            "",
            *render_speed(speed["steps"], rate),
            "",
            (
                "TFLOP/s count the matrix products, convolutions and attention of a step, without recomputation, and"
                f" their share of the {rate / 1e12:.3g} TFLOP/s of a large matrix product on this device."
            ),
        ]
        if loop := speed["loop"]:
            lines += [
                "",
                (
                    f"A step of the training loop takes {loop['ratio'] - 1:+.1%} relative to a bare PyTorch loop on the"
                    f" same model and batches, with crops of {loop['crop'][0]}x{loop['crop'][1]} (median of the rounds:"
                    f" {', '.join(f'{r - 1:+.1%}' for r in loop['by_round'])})."
                ),
            ]
        if speed["inference"]:
            lines += [
                "",
                "## Ball tracking in a video, decoding included",
                "",
                "| mode | frames/s | relative |",
                "|---|---|---|",
            ]
        lines += [
            f"| {r['name']} | {r['frames_per_s']:.1f} ({r['spread'][0]:.1f} to {r['spread'][1]:.1f}) |"
            f" {r['relative']:.2f}x |"
            for r in speed["inference"]
        ]
    if accuracy := result.get("accuracy"):
        lines += [
            "",
            (
                f"## Accuracy after {accuracy['steps']} steps, {accuracy['seeds']}"
                f" seed{'s' if accuracy['seeds'] > 1 else ''}"
            ),
            "",
            *render_accuracy(accuracy["rows"]),
        ]
    if result["not_measured"]:
        lines += ["", "## Not measured here", "", *(f"- {line}" for line in result["not_measured"])]
    return "\n".join(lines) + "\n"


def render_targets(result: dict) -> list[str]:
    """Return a table that compares modes with their targets; empty if no mode with targets was measured.

    Args:
        result: content of ``result.json``.
    """
    memory = {r["name"]: r["share"] for r in result.get("modes_memory", ())}
    speed = {r["name"]: r["relative"] for r in (result.get("speed") or {"steps": ()})["steps"]}
    accuracy = {r["name"]: r for r in (result.get("accuracy") or {"rows": ()})["rows"]}
    modes = [mode for mode in TARGETS if mode in {*memory, *speed, *accuracy}]
    if not modes:
        return []
    lines = ["| mode | memory | speed | accuracy |", "|---|---|---|---|"]
    for mode in modes:
        max_memory, min_speed, min_accuracy = TARGETS[mode]
        cells = [
            _verdict(memory.get(mode), "{:.0%}", f"at most {max_memory:.0%}", -math.inf, max_memory),
            _verdict(speed.get(mode), "{:.2f}x", f"at least {min_speed}x", min_speed, math.inf),
        ]
        row = accuracy.get(mode, {})
        low, high = row.get("relative_interval") or (-math.inf, math.inf)
        # If the confidence interval contains the target, the measurement does not decide whether the target is met.
        decided = not low < min_accuracy <= high
        cells.append(
            _verdict(row.get("relative"), "{:.1%}", f"at least {min_accuracy:.0%}", min_accuracy, math.inf, decided)
        )
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return lines


def _verdict(
    value: float | None, template: str, target: str, minimum: float, maximum: float, decided: bool = True
) -> str:
    """Return the cell of a target.

    Args:
        value: measured value; ``None`` if it was not measured.
        template: format string of the value.
        target: description of the target.
        minimum: smallest value that meets the target.
        maximum: largest value that meets the target.
        decided: whether the measurement is precise enough for a verdict.
    """
    if value is None:
        return f"{target}: not measured"
    verdict = "undecided" if not decided else "met" if minimum <= value <= maximum else "missed"
    return f"{template.format(value)} ({target}: {verdict})"


def render_memory(rows: list[dict]) -> list[str]:
    """Return the table of memory peaks by kind, in MB; ``rows`` are those of ``plan_memory``."""
    kinds = list(rows[0]["bytes_by_kind"])
    lines = [
        (
            f"| | checkpointing | micro-batch | {' | '.join(kind.replace('_', ' ') for kind in kinds)} | **peak** |"
            " share | largest batch |"
        ),
        "|---" * (len(kinds) + 6) + "|",
    ]
    for r in rows:
        cells = [f"{size / 1e6:,.0f}" for size in r["bytes_by_kind"].values()]
        lines.append(
            f"| {r['name']} | {r['gradient_checkpointing']} | {r['micro_batch_size']} | {' | '.join(cells)} |"
            f" **{r['peak_bytes'] / 1e6:,.0f}** | {r['share']:.0%} | {r['fits'] or 'none'} |"
        )
    return lines


def render_speed(rows: list[dict], matrix_flops_per_s: float) -> list[str]:
    """Return the table of images per second, arithmetic and time by phase.

    Args:
        rows: rows of ``measure_speed``.
        matrix_flops_per_s: operations per second of a large matrix product.
    """
    lines = [
        "| | checkpointing | micro-batch | images/s (rounds) | relative | TFLOP/s (share) | "
        + " | ".join(PHASES)
        + " | measured peak, MB |",
        "|---" * (len(PHASES) + 7) + "|",
    ]
    for r in rows:
        total_s = max(sum(r["seconds"].values()), 1e-9)
        shares = " | ".join(f"{r['seconds'][phase] / total_s:.0%}" for phase in PHASES)
        peak = f"{sum(r['measured_bytes_by_kind'].values()) / 1e6:,.0f}" if r["measured_bytes_by_kind"] else "-"
        if r["device_gb"]:
            peak += (
                f" (allocator {r['device_gb']['allocated'] * 1e3:,.0f}, reserved"
                f" {r['device_gb']['reserved'] * 1e3:,.0f})"
            )
        flops = r["flops_per_s"]
        rate = f"{flops / 1e12:.3g} ({flops / matrix_flops_per_s:.0%})" if flops else "-"
        lines.append(
            f"| {r['name']} | {r['gradient_checkpointing']} | {r['micro_batch_size']} | {r['images_per_s']:.1f}"
            f" ({r['spread'][0]:.1f} to {r['spread'][1]:.1f}) | {r['relative']:.2f}x | {rate} | {shares} | {peak} |"
        )
    return lines


def render_accuracy(rows: list[dict]) -> list[str]:
    """Return the table of strict F1 with 95 % intervals; ``rows`` are those of ``summarize``."""
    lines = [
        "| | F1 strict, 4 px (95 % interval) | by seed | 10 px | relative (95 % interval) | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        by_seed = " / ".join(f"{f1:.3f}" for f1 in r["f1_by_seed"])
        relative = "100 %" if "relative" not in r else "-" if r["relative"] is None else f"{r['relative']:.1%}"
        if r.get("relative_interval"):
            relative += f" ({r['relative_interval'][0]:.1%} to {r['relative_interval'][1]:.1%})"
        lines.append(
            f"| {r['name']} | {r['f1']:.3f} ({r['interval'][0]:.3f} to {r['interval'][1]:.3f}) | {by_seed} |"
            f" {r['f1_10px']:.3f} | {relative} | {r['lr']:g}{' (searched)' if 'val_f1_by_lr' in r else ''} |"
        )
    return lines


def draw(result: dict, folder: Path) -> list[Path]:
    """Draw the charts of the measured quantities: ``memory.png``, ``speed.png`` and ``accuracy.png``.

    Args:
        result: content of ``result.json``.
        folder: folder for the charts.

    Returns:
        Paths of the charts that were drawn.
    """
    paths: list[Path] = []
    if rows := result.get("memory"):
        paths.append(folder / "memory.png")
        bars = {r["name"]: r["bytes_by_kind"] for r in rows}
        plot_estimates(bars, None, paths[-1])
    if speed := result.get("speed"):
        paths.append(folder / "speed.png")
        _draw_speed(speed["steps"], result["batch_size"] * result["num_frames"], paths[-1])
    # Accuracy against the planned memory peak of each mode.
    memory = {r["name"]: r["peak_bytes"] for r in result.get("modes_memory", ())}
    accuracy = (result.get("accuracy") or {"rows": ()})["rows"]
    if accuracy and memory:
        paths.append(folder / "accuracy.png")
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for r in accuracy:
            low, high = r["interval"]
            axes.errorbar(
                memory[r["name"]] / 1e9,
                r["f1"],
                yerr=[[max(0, r["f1"] - low)], [max(0, high - r["f1"])]],
                fmt="o",
                capsize=4,
                label=r["name"],
            )
        axes.set(
            xlabel="peak memory of a step (GB)",
            ylabel="F1 strict, 4 px",
            title="accuracy against memory",
            xlim=(0, None),
            ylim=(0, 1),
        )
        axes.legend()
        with new_file(paths[-1]) as work:
            figure.savefig(work, dpi=110)
    return paths


def _draw_speed(rows: list[dict], images: int, path: Path) -> None:
    """Draw stacked bars of the time per image by phase.

    Args:
        rows: rows of ``measure_speed``.
        images: images per step.
        path: path of the chart.
    """
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for phase in PHASES:
        widths = [r["seconds"][phase] / images * 1e3 for r in rows]
        axes.barh([r["name"] for r in rows], widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths)]
    for i, r in enumerate(rows):
        axes.text(left[i], i, f"  {r['images_per_s']:.1f} images/s, {r['relative']:.2f}x", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms per image", xlim=(0, max(left) * 1.3))
    axes.legend(fontsize=8, loc="lower right")
    with new_file(path) as work:
        figure.savefig(work, dpi=110)

"""Generator of the tables in docs/ from the measurements in benchmarks/results/.

    python benchmarks/tables.py

Each table replaces the text between `<!-- table: NAME -->` and `<!-- end -->`, and states what it was measured on.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ("docs/memory.md", "docs/performance.md", "docs/experiments.md")


def memory() -> str:
    """Return the table of memory peaks of the modes as shipped, by backbone."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "memory").glob("*.json"))]
    # ViTs first, then ConvNeXts, each from the smallest to the largest.
    results.sort(key=lambda r: ("convnext" in r["backbone"], r["modes_memory"][0]["peak_bytes"]))
    modes = [row["name"] for row in results[0]["modes_memory"]]
    lines = [
        f"| backbone, batch {results[0]['batch_size']} | "
        + " | ".join(f"`{mode}`" for mode in modes)
        + " | `qlora`, 8-bit optimizer, offload |",
        "|---" * (len(modes) + 2) + "|",
    ]
    for result in results:
        last = next(row for row in result["memory"] if row["name"] == "qlora.yaml, in full, 8-bit optimizer, offload")
        cells = [
            f"{r['peak_bytes'] / 1e9:.1f} GB" + (f" ({r['share']:.0%})" if i else "")
            for i, r in enumerate([*result["modes_memory"], last])
        ]
        lines.append(f"| `{result['backbone']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def ingredients() -> str:
    """Return the table of memory peaks by ingredient and backbone."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "memory").glob("*.json"))]
    results.sort(key=lambda r: ("convnext" in r["backbone"], r["modes_memory"][0]["peak_bytes"]))
    lines = [
        f"| batch {results[0]['batch_size']}; GB (share), largest batch in"
        f" {results[0]['gpu_memory_bytes'] / 1e9:g} GB | "
        + " | ".join(f"`{r['backbone'].split('/')[-1]}`" for r in results)
        + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for i, row in enumerate(results[0]["memory"]):
        cells = [
            f"{r['memory'][i]['peak_bytes'] / 1e9:.1f} ({r['memory'][i]['share']:.0%}),"
            f" {r['memory'][i]['fits'] or 'none'}"
            for r in results
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed() -> str:
    """Return the tables of images per second of every variant, one per machine and model."""
    blocks = []
    for path in sorted((RESULTS / "speed").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine, loop = result["machine"], result["speed"]["loop"]
        width, height = result["size_wh"]
        lines = [
            (
                f"`{result['backbone']}`, batches of {result['batch_size']} windows of {result['num_frames']} frames,"
                f" {width}x{height}; {machine['device']}, torch {machine['versions']['torch']}, {machine['date']};"
                f" {result['speed']['rounds']} rounds:"
            ),
            "",
            "| | images/s (rounds) | relative | forward | backward | optimizer |",
            "|---|---|---|---|---|---|",
        ]
        for r in result["speed"]["steps"]:
            total_s = sum(r["seconds"].values())
            shares = " | ".join(f"{r['seconds'][p] / total_s:.0%}" for p in ("forward", "backward", "optimizer"))
            lines.append(
                f"| {r['name']} | {r['images_per_s']:.2f} ({r['spread'][0]:.2f} to {r['spread'][1]:.2f}) |"
                f" {r['relative']:.2f}x | {shares} |"
            )
        inference = ", ".join(f"{r['name']} {r['frames_per_s']:.1f}" for r in result["speed"]["inference"])
        lines += ["", f"Following the ball in a video, decoding included, frames/s: {inference}."]
        if loop:
            lines += [
                "",
                (
                    f"The training loop against a bare PyTorch loop (`{loop['mode']}`, crops of"
                    f" {loop['crop'][0]}x{loop['crop'][1]}): {loop['ratio'] - 1:+.1%} a step; by turn"
                    f" {', '.join(f'{r - 1:+.1%}' for r in loop['by_round'])}."
                ),
            ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def modes(group: str = "modes") -> str:
    """Return the tables of memory and speed of every mode of ``modes.sh``, one per backbone."""
    blocks = []
    for path in sorted((RESULTS / group).glob("*-speed.json")):
        timed = json.loads(path.read_text(encoding="utf-8"))
        memory = json.loads(Path(str(path).replace("-speed", "-memory")).read_text(encoding="utf-8"))
        planned = {row["name"]: row for row in memory["modes_memory"]}
        steps = timed["speed"]["steps"]
        reference = sum(steps[0]["measured_bytes_by_kind"].values())
        lines = [
            f"`{timed['backbone']}`, {timed['machine']['device']}, torch {timed['machine']['versions']['torch']},"
            f" {timed['machine']['date']}:",
            "",
            "| mode | planned, 16 x 512x288 | checkpointing, micro-batch | measured,"
            f" {timed['batch_size']} x {'x'.join(map(str, timed['size_wh']))} | checkpointing, micro-batch | speed |",
            "|---|---|---|---|---|---|",
        ]
        for step in steps:
            plan, measured = planned[step["name"]], sum(step["measured_bytes_by_kind"].values())
            lines.append(
                f"| {_mode_title(step['name'])} | {plan['peak_bytes'] / 1e9:.1f} GB ({plan['share']:.0%}) |"
                f" {plan['gradient_checkpointing']}, {plan['micro_batch_size']} | {measured / 1e6:,.0f} MB"
                f" ({measured / reference:.0%}) | {step['gradient_checkpointing']}, {step['micro_batch_size']} |"
                f" {step['relative']:.2f}x |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _mode_title(name: str) -> str:
    """Return the title of a mode of ``modes.sh``: ``int8-lean`` is the mode int8 at the budget lean."""
    mode, _, variant = name.partition("-")
    titles = {"": "", "all": ", all blocks, budget as shipped", "lean": ", `budget: lean`", "free": ", `budget: free`"}
    titles |= {"dora": ", DoRA", **{kind: f", `peft_type: {kind.upper()}`" for kind in ("vera", "miss", "oft")}}
    shipped = " as shipped" if mode in ("int8", "qlora", "int8_full") and not variant else ""
    return f"{mode}{shipped}{titles[variant]}"


def budgets() -> str:
    """Return the tables of planned and measured steps under memory budgets, one per mode."""
    blocks = []
    for path in sorted((RESULTS / "budgets").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        # Times relative to the step with the largest budget.
        planned_s, measured_s = (result["rows"][-1][f"{kind}_s"] for kind in ("planned", "measured"))
        lines = [
            f"`--training {result['mode']}`, `{result['backbone']}`, batches of {result['batch_size']} windows at"
            f" {result['size_wh'][0]}x{result['size_wh'][1]}; {result['machine']['device']}:",
            "",
            "| budget | checkpointing, micro-batch | bytes, planned | measured | time, planned | measured |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['budget']} | {r['gradient_checkpointing']}, {r['micro_batch_size']} |"
            f" {r['planned_bytes'] / 1e6:,.0f} MB | {r['measured_bytes'] / 1e6:,.0f} MB |"
            f" {r['planned_s'] / planned_s:.2f}x | {r['measured_s'] / measured_s:.2f}x |"
            for r in result["rows"]
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def accuracy() -> str:
    """Return the table of strict F1 on the held-out game: one number per seed and the mean.

    The last column is the mean along the ball's path, over those seeds for which it was measured.
    """
    result = json.loads((RESULTS / "accuracy/tennis-game9.json").read_text(encoding="utf-8"))
    runs: dict[tuple[str, str], list[dict]] = {}
    for row in sorted(result["rows"], key=lambda r: r["seed"]):
        runs.setdefault((row["model"], row["mode"]), []).append(row)
    lines = [
        (
            "| model, `--training` | F1 strict, 4 px, by seed | mean | 10 px, by seed | mean | along the path, 4 / 10"
            " px (seeds) |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for (model, mode), rows in runs.items():
        cells = []
        for key in ("f1_strict_4px", "f1_strict_10px"):
            values = [row[key] for row in rows]
            cells += [" / ".join(f"{v:.3f}" for v in values), f"{statistics.mean(values):.3f}"]
        paths = [(row["path_f1_strict_4px"], row["path_f1_strict_10px"]) for row in rows if "path_f1_strict_4px" in row]
        cells.append(
            "{:.3f} / {:.3f}".format(*map(statistics.mean, zip(*paths))) + f" ({len(paths)})" if paths else "-"
        )
        lines.append(f"| `{model}`, `{mode}` | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "accuracy": accuracy,
    "memory": memory,
    "ingredients": ingredients,
    "speed": speed,
    "modes": modes,
    "adapters": partial(modes, "adapters"),
    "budgets": budgets,
}


def render(page: str) -> str:
    """Return the text of a page with all its tables replaced."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.S)


def main() -> None:
    """Rewrite all pages in place."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Generator of the tables in docs/ from the measurements in benchmarks/results/.

    python benchmarks/tables.py

Each table replaces the text between `<!-- table: NAME -->` and `<!-- end -->`, and states what it was measured on.
"""

from __future__ import annotations

import json
import re
import statistics
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


def last_blocks() -> str:
    """Return the table of memory and speed of the modes that train the last blocks of the backbone only."""
    memory, speed = (
        json.loads((RESULTS / f"last_blocks/{name}.json").read_text(encoding="utf-8")) for name in ("memory", "speed")
    )
    steps = {row["name"]: row for row in speed["speed"]["steps"]}
    # Sum of the kinds: the peak of a step.
    measured = {name: sum(row["measured_bytes_by_kind"].values()) for name, row in steps.items()}
    share = {name: num_bytes / measured["default"] for name, num_bytes in measured.items()}
    lines = [
        "| mode, no checkpointing | planned, 16 x 512x288 | measured, 4 x 256x144 | speed | checkpointing in full:"
        " measured | speed |",
        "|---|---|---|---|---|---|",
    ]
    for row in memory["modes_memory"]:
        name = row["name"]
        kept, recomputed = steps[name], steps[f"{name}, checkpointing in full"]
        lines.append(
            f"| {name.removesuffix('-all').replace('-last-', ', last ')} | {row['peak_bytes'] / 1e9:.1f} GB"
            f" ({row['share']:.0%}) | {share[name]:.0%} | {kept['relative']:.2f}x |"
            f" {share[recomputed['name']]:.0%} | {recomputed['relative']:.2f}x |"
        )
    return "\n".join(lines)


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
    "last_blocks": last_blocks,
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

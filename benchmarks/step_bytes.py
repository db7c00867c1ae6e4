"""Peak bytes of a training step with the shipped modes, for several backbones, as the planner counts them.

    python benchmarks/step_bytes.py
    python benchmarks/step_bytes.py --batch 8 --json step_bytes.json

512x288, three frames, the whole batch at once, bf16 activations. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tracknet.config import compose
from tracknet.memory.plan import estimate

BACKBONES = ("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-large", "facebook/convnext-tiny-224",
             "facebook/convnext-base-224")  # fmt: skip
OFFLOAD = "training.memory_optimization.use_cpu_offload=true"
MODES = {
    "default": ("default", []), "int8_full": ("int8_full", []), "int8": ("int8", []), "qlora": ("qlora", []),
    "qlora, use_cpu_offload": ("qlora", [OFFLOAD]),
}  # fmt: skip


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="windows at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    peaks: dict[str, dict[str, int]] = {}
    for name in BACKBONES:
        model = "convnext_fpn_heatmap" if "convnext" in name else "vit_heatmap"
        peaks[name] = {}
        for mode, (training, overrides) in MODES.items():
            config = compose("tracknet", model, training, [f"model.backbone.name={name}", *overrides])
            footprint = estimate(config.model, config.training, 3, config.data.preprocess.resize)
            peaks[name][mode] = footprint.peak_bytes(args.batch)
            print(f"{name} {mode}: {peaks[name][mode] / 1e6:,.0f} MB", flush=True)
    print(f"| backbone, batch {args.batch} | " + " | ".join(f"`{mode}`" for mode in MODES) + " |")
    print("|---" * (len(MODES) + 1) + "|")
    for name, row in peaks.items():
        cells = [
            f"{b / 1e9:.1f} GB" + ("" if mode == "default" else f" ({b / row['default']:.0%})")
            for mode, b in row.items()
        ]
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    print(json.dumps(peaks))
    if args.json:
        args.json.write_text(json.dumps(peaks, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measure memory, speed and accuracy of training modes against full fine-tuning, on this machine, model and data.

    tracknet benchmark --data synthetic --model vit_tiny_heatmap
    tracknet benchmark --data tracknet --model vit_heatmap --what memory --gpu-memory 8GB training.batch_size=16
    tracknet benchmark --data tracknet --model vit_heatmap --what accuracy --seeds 3 \\
        --steps 2000 --modes default frozen lora int8 qlora --lr-scales 0.3 1 3 --runs runs

All modes do the same work: same batch, windows, arithmetic and order.

memory    planned for a GPU, by kind, for the modes as shipped and for each ingredient added alone
speed     timed in alternating rounds, with a frozen backbone and LoRA in 16 bits as controls; the training loop is
          compared with a bare PyTorch loop
accuracy  strict F1 on the test split with 95 % intervals

Writes report.md, PNG charts and result.json to --out. The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import math

from tracknet.config.names import config_names
from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.scripts.command_line import (
    Parser,
    check_new_folder,
    existing_or_new_json,
    parse_size,
    run_command,
)

WHAT = ("memory", "speed", "accuracy")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _benchmark(argv))


def _benchmark(argv: list[str] | None) -> int:
    """Parse the arguments, check them, and run the benchmark; return the exit code."""
    parser = Parser(__doc__, "benchmark")
    parser.add_choices("data", "model")
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        default=None,
        help=(
            f"modes to compare: {', '.join(config_names('training'))}, or your own; the first one is the reference "
            "(default: default frozen lora int8 qlora; for a model without backbone: default)"
        ),
    )
    parser.add_argument(
        "--what", nargs="+", choices=WHAT, default=list(WHAT), help="quantities to measure (default: all)"
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="GPU memory that the largest batch must fit into (default: that of the GPU, or 8GB without one)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds per variant (default: 3)")
    parser.add_argument(
        "--steps-per-round",
        type=int,
        default=None,
        metavar="N",
        help="timed steps per round (default: 1 on a CPU, 10 on a GPU)",
    )
    parser.add_argument(
        "--as-shipped",
        action="store_true",
        help="time training steps of the given modes only, without variants, controls, the loop and inference",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time compiled blocks; takes a minute more for each mode"
    )
    parser.add_argument(
        "--int8-kernels", action="store_true", help="also time int8 with each of its kernels (training.int8_kernel)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="training runs per mode for accuracy (default: 2)")
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        help="training steps per run for accuracy (default: 60, for a first impression)",
    )
    parser.add_argument(
        "--lr-scales",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="X",
        help=(
            "factors of each mode's learning rate to try for accuracy with seed 0; the validation split selects one for"
            " all seeds (default: 1, no search)"
        ),
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="folder that keeps the training runs for accuracy; an interrupted comparison continues there",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="new folder for report and charts (default: outputs/benchmark/<time>-<data>-<model>)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the planned measurements and exit")
    parser.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args, overrides = parser.parse(argv)
    for name in ("rounds", "steps_per_round", "seeds", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1.")
    if len(set(args.lr_scales)) < len(args.lr_scales) or not all(0 < x < math.inf for x in args.lr_scales):
        raise UserError(f"--lr-scales {' '.join(f'{x:g}' for x in args.lr_scales)}: give different positive factors.")
    json_file, gpu_bytes = existing_or_new_json(args.json), parse_size(args.gpu_memory)
    folder = check_new_folder(args.out) if args.out else None
    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.api.benchmark_modes import benchmark_modes

    result = benchmark_modes(args, overrides, folder, gpu_bytes)
    if result is None:
        return 0
    if json_file:
        write_json(json_file, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

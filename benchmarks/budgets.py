"""Planned and measured steps under memory budgets: level, micro-batch, bytes and time.

    python benchmarks/budgets.py --backbone facebook/dinov2-small --mode default 1GB 2GB 4GB 8GB 24GB

Plans one step per budget as training does, with times from a short calibration, and then takes it: three steps, of
which the second counts the bytes and the third the time. Writes benchmarks/results/budgets/NAME-MODE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from on_gpu.session import random_batch

from tracknet.benchmark.machine import describe_machine
from tracknet.benchmark.speed import Runner
from tracknet.benchmark.variants import LEVEL, Subject, Variant
from tracknet.models.heatmap_model import build_model
from tracknet.planning.planner import Planner
from tracknet.planning.step_plan import budget_bytes, plan_step
from tracknet.quantization.apply import apply_mode
from tracknet.training.calibration import make_timer

RESULTS = Path(__file__).parent / "results/budgets"


def measure(subject: Subject, mode: str, budget: str, device: torch.device, batch: dict[str, torch.Tensor]) -> dict:
    """Plan and take a step under a budget.

    Args:
        subject: data and model.
        mode: name of the training section.
        budget: value of ``training.memory_optimization.budget``.
        device: device of the model.
        batch: batch on the host.
    """
    config = subject.compose(mode, f"{LEVEL}=auto", f"training.memory_optimization.budget={budget}")
    planner = Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh, device.type)
    model = build_model(config.model, config.data.sequence.length)
    apply_mode(model, config.training.mode, device)
    timer = make_timer(model, config.training.loss, config.data.training_wh, device)
    windows = config.training.batch_size
    plan = plan_step(planner, windows, timer=timer)
    # The plan itself has no time if there was nothing to choose.
    planned_s = windows * timer(plan.level, plan.micro_batch)
    del model
    fixed = subject.compose(mode, f"{LEVEL}={plan.level}", f"training.micro_batch_size={plan.micro_batch}")
    runner = Runner(Variant(budget, fixed), device)
    runner.batches = itertools.repeat(batch)
    runner.warm_up()
    runner.run_round(1)
    assert runner.peak is not None
    return {
        "budget": budget,
        "budget_bytes": budget_bytes(planner, windows),
        "gradient_checkpointing": plan.level,
        "micro_batch_size": plan.micro_batch,
        "planned_bytes": plan.peak_bytes,
        "measured_bytes": runner.peak.num_bytes,
        "planned_s": planned_s,
        "measured_s": runner.times[0][0],
    }


def main() -> None:
    """Measure all budgets, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="+", metavar="BUDGET", help="values of training.memory_optimization.budget")
    parser.add_argument("--backbone", default="facebook/dinov2-small", help="hub id or folder")
    parser.add_argument("--name", default="dinov2-small", help="name of the backbone in the results")
    parser.add_argument("--weights", choices=("pretrained", "random"), default="random", help="weights of the backbone")
    parser.add_argument("--mode", default="default", help="training section")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 288), metavar=("W", "H"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = (
        f"model.backbone.name={args.backbone}",
        f"model.backbone.weights={args.weights}",
        f"training.batch_size={args.batch_size}",
        f"data.preprocess.resize=[{args.size[0]},{args.size[1]}]",
    )
    subject = Subject("synthetic", "vit_heatmap", overrides)
    batch = random_batch(args.batch_size, device, tuple(args.size))
    rows = []
    for budget in args.budgets:
        rows.append(measure(subject, args.mode, budget, device, batch))
        print(rows[-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": describe_machine(device),
        "backbone": args.name,
        "mode": args.mode,
        "batch_size": args.batch_size,
        "size_wh": list(args.size),
        "rows": rows,
    }
    (RESULTS / f"{args.name}-{args.mode}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Memory of a training step by kind, and the largest batch that fits, for every variant."""

from __future__ import annotations

from tracknet.benchmark.variants import Variant
from tracknet.planning.estimate import usable_bytes
from tracknet.planning.planner import Planner
from tracknet.planning.step_plan import plan_step
from tracknet.progress import track

MOST = 1024  # maximum number of windows tried; beyond it, memory is not what limits the batch


def plan_memory(variants: list[Variant], gpu_bytes: int) -> list[dict]:
    """Plan the memory of a training step of each variant on a GPU.

    No GPU is required: the planner runs the step on tensors without content.

    Args:
        variants: variants to plan; the first one is the reference.
        gpu_bytes: memory in bytes that the largest batch must fit into.

    Returns:
        One row per variant: ``name``, ``gradient_checkpointing`` and ``micro_batch_size`` as planned for the configured
        batch and budget, ``bytes_by_kind`` and ``peak_bytes`` of that plan, ``share`` (peak relative to the first
        variant), and ``fits`` (largest number of windows that fit at once at that level).
    """
    rows: list[dict] = []
    for variant in track(variants, "planning"):
        config = variant.config
        planner = Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh)
        plan = plan_step(planner, config.training.batch_size)
        estimate = planner.at(plan.level).estimate
        peak = plan.peak_bytes
        rows.append(
            {
                "name": variant.name,
                "bytes_by_kind": estimate.bytes_by_kind(plan.micro_batch),
                "peak_bytes": peak,
                "share": peak / (rows[0]["peak_bytes"] if rows else peak),
                "gradient_checkpointing": plan.level,
                "micro_batch_size": plan.micro_batch,
                "fits": estimate.largest_micro_batch(usable_bytes(gpu_bytes), MOST),
            }
        )
    return rows

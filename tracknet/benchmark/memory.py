"""What a training step takes: by kind, for every variant, and how large a batch a given memory holds."""

from __future__ import annotations

from tracknet.benchmark.variants import Variant
from tracknet.planning.estimate import usable_bytes
from tracknet.planning.planner import Planner
from tracknet.progress import track

MOST = 1024  # windows; beyond, a batch is not what limits


def plan_memory(variants: list[Variant], gpu_bytes: int) -> list[dict]:
    """Count the bytes of a step of each variant on a GPU, without one: the planner runs it on tensors without content.

    Args:
        variants: the first is what the others are compared with.
        gpu_bytes: memory that the largest batch must fit into.

    Returns:
        By variant ``name``, ``bytes_by_kind``, ``peak_bytes`` at the batch, ``share`` of the first, and ``fits``:
        windows at once.
    """
    rows: list[dict] = []
    for variant in track(variants, "planning"):
        config = variant.config
        planner = Planner(config.model, config.training, config.data.sequence.length, config.data.training_wh)
        estimate, batch = planner.estimate, config.training.batch_size
        peak = estimate.peak_bytes(batch)
        rows.append(
            {
                "name": variant.name,
                "bytes_by_kind": estimate.bytes_by_kind(batch),
                "peak_bytes": peak,
                "share": peak / (rows[0]["peak_bytes"] if rows else peak),
                "fits": estimate.largest_micro_batch(usable_bytes(gpu_bytes), MOST),
            }
        )
    return rows

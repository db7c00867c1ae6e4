"""Training in several processes: each takes a share of every batch, and all take the same step.

Nothing is sent during forward or backward. So a process that runs out of memory there leaves nobody waiting for it: all
of them say how it went, and either add up their gradients or try again in smaller parts together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; number 0 writes, prints and validates."""
    return dist.get_rank() if dist.is_initialized() else 0


def describe_launch(environment: Mapping[str, str]) -> str | None:
    """Return what to say where ``accelerate launch --cpu`` was asked for several processes: without MPI it starts one,
    silently."""
    asked = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment
    if not asked or world_size() > 1:
        return None
    return (
        "accelerate launch --cpu started one process, and no others: it needs MPI for several. Use torchrun"
        " --nproc_per_node N -m tracknet.scripts.train … instead."
    )


def all_reduce_any(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return all_reduce_number(float(flag), device) > 0


def all_reduce_number(number: float, device: torch.device) -> float:
    """Add a number up over all processes."""
    return all_reduce_sums([number], device)[0]


def all_reduce_sums(numbers: list[float], device: torch.device) -> list[float]:
    """Add several numbers up over all processes."""
    return numbers if world_size() == 1 else all_reduce_sum(torch.tensor(numbers, device=device)).tolist()


def all_reduce_min(number: int, device: torch.device) -> int:
    """The smallest of the processes' numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every gradient over all processes; one that is missing here counts as zero."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum(parameter.grad)


def broadcast_object(value: T) -> T:
    """Give all processes what the first one has; plain Python values."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard_slice(batch: int) -> slice:
    """Which windows of a batch this process takes; maybe none."""
    return slice(rank() * batch // world_size(), (rank() + 1) * batch // world_size())

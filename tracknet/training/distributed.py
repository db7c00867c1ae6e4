"""Communication between the processes of a distributed training run.

Each process computes the gradients of its share of every batch, and all of them take the same optimizer step. With a
single process, every reduction returns its input without communication.

No collective call is made during forward or backward, so a process that runs out of memory there leaves no other one
waiting in such a call. Afterwards all processes exchange whether they succeeded, and then either sum their gradients or
repeat the step with smaller micro-batches together. For the same reason, every process must make the same collective
calls in the same order, even if it has no windows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0; process 0 writes files, logs and validates."""
    return dist.get_rank() if dist.is_initialized() else 0


def describe_launch(environment: Mapping[str, str]) -> str | None:
    """Return a warning if ``accelerate launch --cpu`` was to start several processes but has started only one.

    Without MPI it starts a single process and reports nothing.

    Args:
        environment: environment variables of this process.

    Returns:
        The warning, or ``None`` if the launch is as expected.
    """
    # accelerate sets MASTER_ADDR only if several processes were requested.
    requested = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment
    if not requested or world_size() > 1:
        return None
    return (
        "accelerate launch --cpu has started one process only, because it requires MPI to start several. Use torchrun"
        " --nproc_per_node N -m tracknet.scripts.train … instead."
    )


def all_reduce_any(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process; all processes get the same answer."""
    # NCCL reduces tensors on the GPU only, hence the device. A sum is enough: it is positive if any flag is 1.
    return all_reduce_number(float(flag), device) > 0


def all_reduce_number(number: float, device: torch.device) -> float:
    """Return the sum of a number over all processes."""
    return all_reduce_sums([number], device)[0]


def all_reduce_sums(numbers: list[float], device: torch.device) -> list[float]:
    """Return the element-wise sum of a list of numbers over all processes, with one collective call."""
    return numbers if world_size() == 1 else all_reduce_sum(torch.tensor(numbers, device=device)).tolist()


def all_reduce_min(number: int, device: torch.device) -> int:
    """Return the minimum of a number over all processes."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of the parameters over all processes in place; a missing gradient counts as zero.

    The gradients are summed, not averaged: each process divides its loss by the normalizer of the whole batch.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        # Created even if no process has the gradient: skipping the call in one process would shift all later calls.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum(parameter.grad)


def broadcast_object(value: T) -> T:
    """Return the first process's value in all processes; the value must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard_slice(batch: int) -> slice:
    """Return the slice of a batch of ``batch`` windows that this process takes; it may be empty."""
    # The slices of all processes cover the batch without overlap, and their lengths differ by one at most.
    return slice(rank() * batch // world_size(), (rank() + 1) * batch // world_size())

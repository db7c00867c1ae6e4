"""Batches of an epoch: their order, their share for this process, and their way to the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tracknet.data.clips import WindowDataset
from tracknet.data.transforms import SAMPLED, apply_augmentation
from tracknet.training.distributed import shard_slice
from tracknet.training.interruption import leave_sigterm_to_parent


def mix_seed(seed: int, number: int) -> int:
    """Combine two numbers into a seed; neighbors give unrelated streams."""
    return (seed * 1_000_003 + number) * 0x9E3779B97F4A7C15 % 2**63


def epoch_batches(train_set: WindowDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the window indices of an epoch's batches, in an order that depends on the seed and the epoch alone."""
    order = train_set.epoch_order(mix_seed(seed, epoch))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@dataclass
class Batch:
    """One batch of all processes, and the part of it that this process loads.

    Attributes:
        size: number of windows in all processes.
        first: place of this process's first window in the whole batch.
        tensors: this process's windows on the host, ``None`` where other processes have all of them.
    """

    size: int
    first: int
    tensors: dict[str, Tensor] | None


def load_batches(
    train_set: WindowDataset, batches: list[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Load this process's shard of each batch, in order.

    Args:
        train_set: windows.
        batches: window indices of each batch.
        num_workers: number of loading processes.
        pin_memory: whether tensors go into page-locked memory, from which copies to a GPU are asynchronous.
    """
    shards = [shard_slice(len(indices)) for indices in batches]
    loader = DataLoader(
        train_set,
        batch_sampler=[indices[shard] for indices, shard in zip(batches, shards)],
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=leave_sigterm_to_parent,
    )
    for indices, shard, tensors in zip(batches, shards, loader):
        yield Batch(len(indices), shard.start, tensors)


def _collate(windows: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    return default_collate(windows) if windows else None


def to_device(
    batch: dict[str, Tensor] | None, device: torch.device, crop: tuple[int, int] | None
) -> dict[str, Tensor] | None:
    """Move a batch to the device and augment its frames there; ``None`` stays ``None``."""
    if batch is None:
        return None
    # The sampled numbers stay on the host: kernels take them as arguments, and reading them back from a busy GPU would
    # wait for it.
    moved = {k: v if k in SAMPLED else v.to(device, non_blocking=True) for k, v in batch.items()}
    return apply_augmentation(moved, crop)

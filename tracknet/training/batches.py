"""Batches of an epoch: order, sharding over processes, loading, and transfer to the device."""

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
    """Combine a seed and a number into a seed in ``[0, 2^63)``; consecutive numbers give unrelated random streams."""
    return (seed * 1_000_003 + number) * 0x9E3779B97F4A7C15 % 2**63


def epoch_batches(train_set: WindowDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the window indices of each batch of an epoch, in an order that depends only on the seed and the epoch."""
    order = train_set.epoch_order(mix_seed(seed, epoch))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@dataclass
class Batch:
    """Batch of all processes, with the windows that this process loads.

    Attributes:
        size: number of windows in all processes.
        first: index of this process's first window in the whole batch.
        tensors: this process's windows on the host, or ``None`` if other processes have all windows of the batch.
    """

    size: int
    first: int
    tensors: dict[str, Tensor] | None


def load_batches(
    train_set: WindowDataset, batches: list[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Load this process's shard of each batch, in order.

    Args:
        train_set: windows to load.
        batches: window indices of each batch of all processes.
        num_workers: number of data loading processes.
        pin_memory: whether to load into page-locked memory, from which copies to a GPU are asynchronous.

    Yields:
        Batches with tensors on the host.
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
    """Stack windows to a batch; return ``None`` for an empty shard, which ``default_collate`` rejects."""
    return default_collate(windows) if windows else None


def to_device(
    batch: dict[str, Tensor] | None, device: torch.device, crop: tuple[int, int] | None
) -> dict[str, Tensor] | None:
    """Move a batch to the device and augment its frames there.

    Args:
        batch: windows of this process on the host, or ``None``.
        device: device of the model.
        crop: width and height of the crop in pixels, or ``None`` for whole frames.

    Returns:
        Batch on the device, or ``None`` for no batch.
    """
    if batch is None:
        return None
    # The augmentation parameters stay on the host: kernels take them as arguments, and reading them back from the GPU
    # would wait for all queued work.
    moved = {k: v if k in SAMPLED else v.to(device, non_blocking=True) for k, v in batch.items()}
    return apply_augmentation(moved, crop)

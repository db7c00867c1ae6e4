"""What a frozen backbone makes of frames, kept on disk and read window by window. See ``training.features`` for how it
gets there."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

CHUNK = 64  # frames in a file


class CachedFeatures:
    """Features of clips by frame, mapped from files of ``CHUNK`` frames each.

    Args:
        files: by clip, the files in order.
    """

    def __init__(self, files: list[list[Path]]):
        self._files = files

    def read(self, clip: int, indices: list[int], flipped: bool) -> dict[str, Tensor]:
        """Return ``features.0``, ``features.1`` and so on of a window, ``[frame, c, h, w]``, of the frames or of their
        mirror images."""
        kind = "flipped" if flipped else "plain"
        levels: dict[str, list[Tensor]] = {}
        for index in indices:
            # Opened anew: a mapping costs microseconds, and neither a process that forks nor one that spawns inherits
            # an open file.
            with safe_open(self._files[clip][index // CHUNK], "pt") as file:
                for name in file.keys():  # noqa: SIM118 - a file is no dict
                    if name.startswith(kind):
                        level = f"features.{name.rsplit('.', 1)[1]}"
                        levels.setdefault(level, []).append(file.get_slice(name)[index % CHUNK])
        return {level: torch.stack(frames) for level, frames in levels.items()}


def features_of(batch: dict[str, Tensor]) -> list[Tensor] | None:
    """Return the feature maps in a batch, ``[batch * frame, c, h, w]`` by level, or ``None`` where it has none."""
    names = sorted(name for name in batch if name.startswith("features."))
    return [batch[name].flatten(0, 1) for name in names] or None

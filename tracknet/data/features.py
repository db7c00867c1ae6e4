"""Cached outputs of a frozen backbone, read window by window.

``training.features`` computes them and writes the files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

CHUNK = 64  # frames per file


class CachedFeatures:
    """Feature maps of clips, read from memory-mapped files of ``CHUNK`` frames each.

    Args:
        files: paths of each clip's files, in the order of its frames.
    """

    def __init__(self, files: list[list[Path]]):
        self._files = files

    def read(self, clip: int, indices: list[int], flipped: bool) -> dict[str, Tensor]:
        """Return the feature maps of a window.

        Args:
            clip: number of the clip.
            indices: frame indices of the window.
            flipped: whether to return the features of the mirrored frames.

        Returns:
            Feature maps by level, ``features.0``, ``features.1`` and so on, each ``[frame, c, h, w]``.
        """
        kind = "flipped" if flipped else "plain"
        levels: dict[str, list[Tensor]] = {}
        for index in indices:
            # Open the file on every read: mapping it costs microseconds, and no open file is inherited by forked
            # processes or has to be sent to spawned ones.
            with safe_open(self._files[clip][index // CHUNK], "pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is not a dict
                    if name.startswith(kind):
                        level = f"features.{name.rsplit('.', 1)[1]}"
                        levels.setdefault(level, []).append(file.get_slice(name)[index % CHUNK])
        return {level: torch.stack(frames) for level, frames in levels.items()}


def features_of(batch: dict[str, Tensor]) -> list[Tensor] | None:
    """Return the feature maps of a batch, ``[batch * frame, c, h, w]`` for each level, or ``None`` if it has none."""
    names = sorted(name for name in batch if name.startswith("features."))
    return [batch[name].flatten(0, 1) for name in names] or None

"""On-disk cache of the features that a frozen backbone computes for the training frames."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tracknet.data.cache import make_cache
from tracknet.data.clips import WindowDataset
from tracknet.data.features import CHUNK, CachedFeatures
from tracknet.files import new_file, one_at_a_time
from tracknet.models.backbone import Backbone
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.models.pretrained import hash_tensors
from tracknet.progress import track

FRAMES_AT_ONCE = 16  # number of frames per forward pass of the backbone


def build_features(
    model: HeatmapModel,
    dataset: WindowDataset,
    device: torch.device,
    folder: Path,
) -> CachedFeatures:
    """Compute the features of all frames of a dataset that are not in the cache yet.

    The key of a file is a hash of everything that its features depend on: the backbone's tensors as stored, its compute
    dtype and layers, whether mirrored frames are included, and the key of the clip's frame cache. Processes that need
    the same file wait for each other, so that it is computed once.

    Args:
        model: model with its mode applied, on its device; its backbone must be frozen.
        dataset: dataset with its frames in the cache on disk.
        device: device of the model.
        folder: folder of the cache; features are written to ``features`` in it.

    Returns:
        Access to the features of each clip.

    Raises:
        OSError: if the cache cannot be written.
    """
    # Part of the key that all clips share.
    flips = dataset.augment is not None and dataset.augment.flip > 0
    backbone = _backbone_of(model)
    state = {name: t for name, t in backbone.state_dict().items() if isinstance(t, Tensor)}
    model_key = f"{hash_tensors(state)} {model.compute_dtype} {backbone.layers} {flips}"

    # Files of each clip, one per chunk of frames, and those that must be computed.
    files: list[list[Path]] = []
    missing: list[tuple[int, int, Path]] = []
    cached: Any
    for clip, cached in enumerate(dataset.frames):
        key = hashlib.sha256(f"{model_key} {cached.path.name}".encode()).hexdigest()[:32]
        starts = range(0, dataset.clips[clip].num_frames, CHUNK)
        files.append([folder / "features" / f"{key}-{start // CHUNK}.safetensors" for start in starts])
        missing += [(clip, start, path) for start, path in zip(starts, files[-1]) if not _is_complete(path)]

    # Compute the missing chunks.
    for clip, start, path in track(missing, "Computing features"):
        make_cache(folder)
        path.parent.mkdir(exist_ok=True)
        with one_at_a_time(path):
            # Checked again under the lock: another process may have computed the chunk in the meantime.
            if not _is_complete(path):
                stop = min(start + CHUNK, dataset.clips[clip].num_frames)
                frames = torch.stack([torch.from_numpy(dataset.frames[clip][i].copy()) for i in range(start, stop)])
                tensors = {f"plain.{i}": t for i, t in enumerate(encode(model, frames, device))}
                if flips:
                    tensors |= {f"flipped.{i}": t for i, t in enumerate(encode(model, frames.flip(-1), device))}
                with new_file(path) as work:
                    save_file(tensors, work)
    return CachedFeatures(files)


def _backbone_of(model: HeatmapModel) -> Backbone:
    """Return the backbone of a model that has one."""
    assert model.backbone is not None, "the configuration rejects cache_features for a model without a backbone"
    return model.backbone


def _is_complete(path: Path) -> bool:
    """Return whether a file exists in its full length; a truncated file is computed again."""
    try:
        # Opening reads the header and compares the length that it implies with the length of the file.
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


@torch.no_grad()
def encode(model: HeatmapModel, frames: Tensor, device: torch.device) -> list[Tensor]:
    """Compute the feature maps of frames as in a training step.

    Args:
        model: model with a backbone.
        frames: frames on the host, uint8 ``[n, 3, h, w]``.
        device: device of the model.

    Returns:
        Feature maps of each level on the host, ``[n, c, h, w]`` with a height and width for each level.
    """
    enabled = model.compute_dtype != torch.float32
    parts = []
    for chunk in frames.split(FRAMES_AT_ONCE):
        with torch.autocast(device.type, dtype=model.compute_dtype if enabled else None, enabled=enabled):
            parts.append([level.cpu() for level in _backbone_of(model)(chunk.to(device))])
    return [torch.cat(levels).contiguous() for levels in zip(*parts)]

"""Computing once what a frozen backbone makes of every training frame."""

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

FRAMES_AT_ONCE = 16


def build_features(
    model: HeatmapModel,
    dataset: WindowDataset,
    device: torch.device,
    folder: Path,
) -> CachedFeatures:
    """Compute the features of a dataset's frames, where they are not kept already.

    They are kept by what they depend on: the backbone's tensors as stored, its arithmetic, and the frames by their own
    cache's key. Two processes that build the same wait for each other.

    Args:
        model: with its mode applied, on its device; its backbone is frozen.
        dataset: with its frames in the cache on disk.
        device: where the model is.
        folder: of the cache; features go into ``features`` in it.
    """
    flips = dataset.augment is not None and dataset.augment.flip > 0
    backbone = _backbone_of(model)
    state = {name: t for name, t in backbone.state_dict().items() if isinstance(t, Tensor)}
    of_model = f"{hash_tensors(state)} {model.compute_dtype} {backbone.layers} {flips}"
    files: list[list[Path]] = []
    missing: list[tuple[int, int, Path]] = []
    cached: Any
    for clip, cached in enumerate(dataset.frames):
        key = hashlib.sha256(f"{of_model} {cached.path.name}".encode()).hexdigest()[:32]
        starts = range(0, dataset.clips[clip].num_frames, CHUNK)
        files.append([folder / "features" / f"{key}-{start // CHUNK}.safetensors" for start in starts])
        missing += [(clip, start, path) for start, path in zip(starts, files[-1]) if not _is_whole(path)]
    for clip, start, path in track(missing, "Computing features"):
        make_cache(folder)
        path.parent.mkdir(exist_ok=True)
        with one_at_a_time(path):
            if not _is_whole(path):
                stop = min(start + CHUNK, dataset.clips[clip].num_frames)
                frames = torch.stack([torch.from_numpy(dataset.frames[clip][i].copy()) for i in range(start, stop)])
                tensors = {f"plain.{i}": t for i, t in enumerate(encode(model, frames, device))}
                if flips:
                    tensors |= {f"flipped.{i}": t for i, t in enumerate(encode(model, frames.flip(-1), device))}
                with new_file(path) as work:
                    save_file(tensors, work)
    return CachedFeatures(files)


def _backbone_of(model: HeatmapModel) -> Backbone:
    assert model.backbone is not None, "the configuration refuses to cache features of a model without backbone"
    return model.backbone


def _is_whole(path: Path) -> bool:
    """Whether a file is there in its full length; one that was cut short is written anew."""
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


@torch.no_grad()
def encode(model: HeatmapModel, frames: Tensor, device: torch.device) -> list[Tensor]:
    """Return what the backbone makes of uint8 frames ``[n, 3, h, w]`` while training, on the host, by level."""
    enabled = model.compute_dtype != torch.float32
    parts = []
    for some in frames.split(FRAMES_AT_ONCE):
        with torch.autocast(device.type, dtype=model.compute_dtype if enabled else None, enabled=enabled):
            parts.append([level.cpu() for level in _backbone_of(model)(some.to(device))])
    return [torch.cat(levels).contiguous() for levels in zip(*parts)]

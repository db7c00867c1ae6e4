"""Division of a model's tensors into those that a run saves and those that its base determines."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tracknet.models.components import component_by_name
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.models.pretrained import hash_tensors


@dataclass(frozen=True)
class CheckpointSplit:
    """Division of a model's tensors.

    Attributes:
        base_keys: names of the tensors that follow from the base and the settings; a run that names its base leaves
            them out.
        sha256: hash of those tensors as stored in the model, quantized; ``None`` if there are none.
    """

    base_keys: frozenset[str]
    sha256: str | None


def split_state_dict(model: HeatmapModel, self_contained: bool = False) -> CheckpointSplit:
    """Divide a model's tensors into those to save and those that come from its base.

    Frozen weights, with their codes and scales, come from the base if that is published. Everything that trains is
    saved, and so is every tensor that exists in this run only.

    Args:
        model: model with its mode applied.
        self_contained: save everything.
    """
    backbone = model.backbone
    if self_contained or backbone is None or backbone.base is None:
        return CheckpointSplit(frozenset(), None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if hasattr(module, "weight_grad_proxy"):  # int8 codes that train have no gradient of their own
            trained |= {f"{name}.weight", f"{name}.scale"}
    components = component_by_name(model)
    frozen = model.state_dict().keys() - trained
    names = frozenset(n for n in frozen if n.startswith("backbone.hf.") and components.get(n, "backbone") == "backbone")
    if all(name.endswith("mask_token") for name in names):  # never used: no reason to depend on the base
        return CheckpointSplit(frozenset(), None)
    return CheckpointSplit(names, hash_tensors(select_tensors(model, names)))


def select_tensors(model: HeatmapModel, names: frozenset[str]) -> dict[str, Tensor]:
    """Return the tensors of a model that have these names."""
    state = model.state_dict()
    return {name: state[name] for name in names}


def unique_state_dict(model: HeatmapModel) -> dict[str, Tensor]:
    """Return a model's state with each shared tensor under its first name only.

    Adapters such as VeRA keep one random projection for all layers; safetensors refuses tensors that share memory.
    Loading the first name fills the memory that all of them share.
    """
    unique: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for name, tensor in model.state_dict().items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape)
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        unique[name] = tensor
    return unique

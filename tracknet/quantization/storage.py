"""What of a model a run keeps, and what it can have again from the base that it names."""

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
        base_keys: names of the tensors that the base and the settings determine; a run that names its base leaves them
            out.
        sha256: of those tensors as they are here, quantized; ``None`` where there are none.
    """

    base_keys: frozenset[str]
    sha256: str | None


def split_state_dict(model: HeatmapModel, self_contained: bool = False) -> CheckpointSplit:
    """Divide a model's tensors into those to keep and those that come from its base.

    Frozen weights and their codes and scales come from the base, if it has one that others can have too. What trains is
    kept, and so is everything else that only this run has.

    Args:
        model: with its mode applied.
        self_contained: keep everything.
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
    if all(name.endswith("mask_token") for name in names):  # never used: not worth needing the base for
        return CheckpointSplit(frozenset(), None)
    return CheckpointSplit(names, hash_tensors(select(model, names)))


def select(model: HeatmapModel, names: frozenset[str]) -> dict[str, Tensor]:
    """Return a model's tensors of these names."""
    state = model.state_dict()
    return {name: state[name] for name in names}

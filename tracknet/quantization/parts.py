"""What of a model is stored how, in bytes, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracknet.models.components import component_by_name
from tracknet.models.heatmap_model import HeatmapModel


@dataclass(frozen=True)
class Part:
    """A row of the table that a run begins with.

    Attributes:
        name: ``backbone``, ``adapters`` or ``decoder``.
        dtype: how it is stored.
        num_layers: modules that hold such tensors.
        num_parameters: values, counting two per byte in 4 bits.
        num_bytes: stored size, scales included.
        trained: whether it receives gradients.
    """

    name: str
    dtype: str
    num_layers: int
    num_parameters: int
    num_bytes: int
    trained: bool


def describe_parts(model: HeatmapModel) -> list[Part]:
    """Summarize what is stored how, and what of it is trained."""
    rows: dict[tuple[str, str, bool], list[int]] = {}
    components = component_by_name(model)
    module: Any
    for name, module in model.named_modules():
        # Quantized layers say how they store their weight, and whether it trains.
        storage_dtype, trains_codes = getattr(module, "storage_dtype", None), hasattr(module, "weight_grad_proxy")
        seen: set[tuple[str, str, bool]] = set()
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            dtype, count, trained = str(tensor.dtype).removeprefix("torch."), tensor.numel(), tensor.requires_grad
            if own in ("mean", "std", "weight_grad_proxy"):
                continue
            if storage_dtype and own != "bias" and not trained:
                dtype, trained = storage_dtype, trains_codes
                count = module.in_features * module.out_features if own == "weight" else 0
            key = (components[f"{name}.{own}"], dtype, trained)
            row = rows.setdefault(key, [0, 0, 0])
            row[0] += key not in seen
            row[1] += count
            row[2] += tensor.numel() * tensor.element_size()
            seen.add(key)
    return [
        Part(part, dtype, num_layers, num_parameters, num_bytes, trained)
        for (part, dtype, trained), (num_layers, num_parameters, num_bytes) in sorted(rows.items())
    ]

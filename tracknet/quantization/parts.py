"""Summary of a model's tensors: storage dtype, size in bytes, and whether they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracknet.models.components import component_by_name
from tracknet.models.heatmap_model import HeatmapModel


@dataclass(frozen=True)
class Part:
    """Tensors of one component with the same storage: a row of the table that is printed at the start of a run.

    Attributes:
        name: ``backbone``, ``adapters`` or ``decoder``.
        dtype: storage dtype or format.
        num_layers: number of modules that hold such tensors.
        num_parameters: number of values; a byte of 4-bit codes counts as two.
        num_bytes: stored size in bytes, including scales.
        trained: whether the values are trained.
    """

    name: str
    dtype: str
    num_layers: int
    num_parameters: int
    num_bytes: int
    trained: bool


def describe_parts(model: HeatmapModel) -> list[Part]:
    """Summarize a model's tensors by component, storage and whether they are trained.

    Args:
        model: model with its mode applied.

    Returns:
        Parts in the order of name, dtype and ``trained``.
    """
    # Layers, values and bytes by component, dtype and whether trained.
    rows: dict[tuple[str, str, bool], list[int]] = {}
    components = component_by_name(model)
    module: Any
    for name, module in model.named_modules():
        # Quantized layers have the attribute `storage_dtype`. Those with a gradient proxy train their codes.
        storage_dtype, trains_codes = getattr(module, "storage_dtype", None), hasattr(module, "weight_grad_proxy")
        seen: set[tuple[str, str, bool]] = set()
        for tensor_name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            dtype, count, trained = str(tensor.dtype).removeprefix("torch."), tensor.numel(), tensor.requires_grad
            # Not weights: constants of the images, and the proxy, which has the shape of the weight but no memory.
            if tensor_name in ("mean", "std", "weight_grad_proxy"):
                continue
            # Codes and scales: bytes count for each tensor, but values only once, with the codes. A weight that trains
            # in floating point is an ordinary parameter.
            if storage_dtype and tensor_name != "bias" and not trained:
                dtype, trained = storage_dtype, trains_codes
                count = module.in_features * module.out_features if tensor_name == "weight" else 0
            key = (components[f"{name}.{tensor_name}"], dtype, trained)
            row = rows.setdefault(key, [0, 0, 0])
            row[0] += key not in seen  # each module counts once
            row[1] += count
            row[2] += tensor.numel() * tensor.element_size()
            seen.add(key)
    return [
        Part(part, dtype, num_layers, num_parameters, num_bytes, trained)
        for (part, dtype, trained), (num_layers, num_parameters, num_bytes) in sorted(rows.items())
    ]

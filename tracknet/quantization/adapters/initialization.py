"""Starts of LoRA adapters that depend on the quantized weights (LoftQ) or on the data (EVA).

LoftQ (Li et al., ICLR 2024): the update starts as the best approximation, of its rank, of what quantization has rounded
away. Here the codes stay those of the rounded weight, which is LoftQ with a single iteration, so that runs can still
refer to a published base.

EVA (Paischer et al., NeurIPS 2025): A starts with the main directions of the layer's inputs, in which an update changes
the most, and B with zero. All layers keep the same rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.adapters import adapted_layers

Quantize = Callable[[nn.Linear], Any]


def remember_residuals(
    quantize: Quantize, rank: int, wanted: set[int], factors: dict[int, tuple[Tensor, Tensor]]
) -> Quantize:
    """Return a quantizer that also factorizes what it rounds away.

    Args:
        quantize: function that returns the quantized replacement of a layer.
        rank: largest rank of an adapter.
        wanted: ``id`` of the layers that may get an adapter; others are only quantized.
        factors: result by ``id`` of the replacement, filled in as layers are quantized: fp32 ``[rank, in_features]``
            and ``[out_features, rank]``, whose product approximates the residual.
    """

    def quantize_and_factorize(linear: nn.Linear) -> Any:
        replacement = quantize(linear)
        if id(linear) not in wanted:
            return replacement
        residual = linear.weight.detach().float() - replacement.dequantize()
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        root = s[:rank].sqrt()
        factors[id(replacement)] = (root[:, None] * v[:rank], u[:, :rank] * root)
        return replacement

    return quantize_and_factorize


@torch.no_grad()
def start_from_residuals_(backbone: nn.Module, factors: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Initialize the LoRA adapters of quantized layers with the factors of ``remember_residuals``, in place."""
    for layer in adapted_layers(backbone).values():
        for name, a in layer.lora_A.items():
            if id(layer.base_layer) not in factors:
                continue  # a layer that is not quantized has no residual
            rank, scale = len(a.weight), layer.scaling[name] ** 0.5
            down, up = factors[id(layer.base_layer)]
            a.weight.copy_(down[:rank] / scale)
            layer.lora_B[name].weight.copy_(up[:, :rank] / scale)


@torch.no_grad()
def start_from_inputs_(model: HeatmapModel, frames: Iterable[Tensor]) -> None:
    """Initialize A of the LoRA adapters with the main directions of the inputs of their layers, in place.

    Args:
        model: model with LoRA adapters, whose update is still zero.
        frames: batches of training frames, uint8 ``[windows, frames, 3, h, w]``.
    """
    assert model.backbone is not None, "only a backbone has adapters"
    layers = adapted_layers(model.backbone.hf)
    moments: dict[str, Tensor] = {}  # second moments of the inputs, [in_features, in_features], by layer

    def add_moments(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        with torch.autocast(x.device.type, enabled=False):  # which would multiply in 16 bits
            moments[name] = moments.get(name, 0) + rows.T @ rows

    handles = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: add_moments(name, args[0]))
        for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in frames:
            model(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        # The eigenvectors of the second moments are the right singular vectors of all inputs. eigh sorts them upwards.
        directions = torch.linalg.eigh(moments[name])[1].flip(dims=(1,))
        for a in layer.lora_A.values():
            a.weight.copy_(directions.T[: len(a.weight)])

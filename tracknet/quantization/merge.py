"""Conversion of quantized and adapted layers to plain linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.adapters import adapted_layers


def merge_(model: HeatmapModel) -> HeatmapModel:
    """Dequantize the backbone's layers and add the adapters to their weights, in fp32.

    Merging into 4-bit codes instead would round the adapters away. The result requires neither bitsandbytes nor peft.

    Args:
        model: model in any mode; changed in place.

    Returns:
        The same model, in evaluation mode and with a frozen backbone. Its output is the same except for the rounding of
        activations in int8 products, and of 16-bit products.
    """
    if model.backbone is None:
        return model
    hf = model.backbone.hf
    module: Any
    # Dequantize first, so that peft adds the adapters to plain fp32 weights.
    for name, module in list(hf.named_modules()):
        if hasattr(module, "dequantize") and isinstance(module, nn.Linear):
            hf.set_submodule(name, _plain(module))
    for name, layer in adapted_layers(hf).items():
        layer.merge(safe_merge=True)  # raises a ValueError for adapters with NaN or infinite values
        hf.set_submodule(name, layer.get_base_layer())
    hf.requires_grad_(False)
    model.backbone.base = None  # the merged weights exist in this model only
    return model.eval()


def _plain(quantized: Any) -> nn.Linear:
    """Return a linear layer with the dequantized weight and the same bias as a quantized layer."""
    # On the meta device no weight is allocated and initialized only to be replaced.
    linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
    linear.bias = quantized.bias
    return linear

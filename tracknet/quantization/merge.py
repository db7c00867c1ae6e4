"""Fold adapters and codes back into plain linear layers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from tracknet.models.heatmap_model import HeatmapModel


def merge_(model: HeatmapModel) -> HeatmapModel:
    """Replace quantized layers by their dequantized weight, and adapters by their sum with it, in fp32.

    Merging into 4-bit codes instead would round the adapters away. What is left needs neither bitsandbytes nor peft.

    Args:
        model: of any mode; changed in place.

    Returns:
        The model. It computes as before but for the rounding of activations that int8 multiplication does, and of
        16-bit products.
    """
    if model.backbone is None:
        return model
    hf = model.backbone.hf
    module: Any
    for name, module in list(hf.named_modules()):
        if hasattr(module, "dequantize") and isinstance(module, nn.Linear):
            hf.set_submodule(name, _plain(module))
    if "peft" in sys.modules:  # else nothing can have put adapters in
        from tracknet.quantization.lora import lora_layers

        layer: Any
        for name, layer in lora_layers(hf).items():
            layer.merge(safe_merge=True)
            hf.set_submodule(name, layer.get_base_layer())
    hf.requires_grad_(False)
    model.backbone.base = None  # these weights exist here only
    return model.eval()


def _plain(quantized: Any) -> nn.Linear:
    linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
    linear.bias = quantized.bias
    return linear

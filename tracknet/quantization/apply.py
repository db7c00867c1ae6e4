"""Build -> quantise -> adapt, in this one place and this one order."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from tracknet.errors import UserError, nearest
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.int8 import Int8Linear
from tracknet.quantization.lora import LoraConfig, add_lora
from tracknet.quantization.nf4 import Linear4bit
from tracknet.quantization.precision import Precision, resolve_dtype


@dataclass
class QuantizationConfig:
    """How the linear layers of the backbone are stored; the fields are those of transformers' BitsAndBytesConfig."""

    enabled: bool = True
    """Switches quantisation."""
    load_in_8bit: bool = False
    """Store and multiply in int8 (LLM.int8)."""
    load_in_4bit: bool = False
    """Store in 4 bits, multiply in ``bnb_4bit_compute_dtype``."""
    llm_int8_threshold: float = 6.0
    """Activation columns that reach this magnitude are multiplied in full precision; 0 = none, which is faster."""
    llm_int8_has_fp16_weight: bool = False
    """Keep a floating-point weight that trains and is quantised in every forward; saves no memory."""
    llm_int8_skip_modules: list[str] = field(default_factory=list)
    """Names or patterns of backbone layers that stay as they are, in 8 and in 4 bits (``layers.0.*``, ``fc2``)."""
    bnb_4bit_compute_dtype: Precision = "bf16"
    """Dtype of the dequantised weight."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """``nf4`` suits normally distributed weights, as trained ones are."""

    def __post_init__(self) -> None:
        if self.enabled and self.load_in_8bit and self.load_in_4bit:
            raise UserError("training.quantization: load_in_8bit and load_in_4bit are both true; a weight is stored one "
                            "way: set one of them to false.")  # fmt: skip
        if self.enabled and not (self.load_in_8bit or self.load_in_4bit):
            raise UserError("training.quantization: enabled is true, but neither load_in_8bit nor load_in_4bit is; set one "
                            "of them, or training.quantization=null.")  # fmt: skip
        if self.llm_int8_threshold < 0:
            raise UserError(f"training.quantization.llm_int8_threshold={self.llm_int8_threshold} must not be negative.")


def apply_mode(
    model: HeatmapModel,
    precision: Precision,
    quantization: QuantizationConfig | None,
    lora: LoraConfig | None,
    device: torch.device,
) -> list[str]:
    """Turn a full-precision model into the one that the settings describe, on its device.

    Args:
        model: as built; changed in place.
        precision: arithmetic outside of the quantised layers.
        quantization: of the backbone's linear layers, or ``None``.
        lora: adapters in the backbone, or ``None``.
        device: where it will run. Quantisation happens there.

    Returns:
        Lines for the user on what the device made of the settings.
    """
    notes: list[str] = []
    model.compute_dtype, note = resolve_dtype(precision, device, "training.precision")
    notes += [note] if note else []
    model.to(device)
    quantization = quantization if quantization and quantization.enabled else None
    lora = lora if lora and lora.enabled else None
    if model.backbone is None:
        for key, value in (("quantization", quantization), ("lora", lora)):
            if value is not None:
                raise UserError(f"training.{key} acts on the backbone, and this model has none: use --training default, or "
                                f"set training.{key}=null.")  # fmt: skip
        return notes
    notes += [model.backbone.note] if model.backbone.note else []
    if quantization is not None:
        replace, note = _quantizer(quantization, device)
        notes += [note] if note else []
        quantize(model.backbone.hf, replace, quantization.llm_int8_skip_modules)
    if lora is not None:
        if lora.bias != "none" and not any(p.requires_grad for p in model.backbone.hf.parameters()):
            raise UserError(f"model.backbone.freeze=true and training.lora.bias={lora.bias} contradict each other: set "
                            "training.lora.bias=none, or model.backbone.freeze=false.")  # fmt: skip
        add_lora(model.backbone.hf, lora)
    return notes


def _quantizer(config: QuantizationConfig, device: torch.device) -> tuple[Callable[[nn.Linear], nn.Module], str | None]:
    if config.load_in_8bit:
        return lambda linear: Int8Linear(linear, config.llm_int8_threshold, config.llm_int8_has_fp16_weight), None
    dtype, note = resolve_dtype(config.bnb_4bit_compute_dtype, device, "training.quantization.bnb_4bit_compute_dtype")
    return lambda linear: Linear4bit(linear, config.bnb_4bit_quant_type, dtype, config.bnb_4bit_use_double_quant), note


def quantize(backbone: nn.Module, replace: Callable[[nn.Linear], nn.Module], skip: list[str]) -> None:
    """Replace the linear layers of a backbone, but for those that a skip pattern names.

    Raises:
        UserError: a pattern matches nothing, or all is skipped.
    """
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    skipped: set[str] = set()
    for pattern in skip:
        hits = {n for n in layers if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n, f"*.{pattern}")}
        if not hits:
            kinds = sorted({n.rsplit(".", 1)[-1] for n in layers})
            raise UserError(f"training.quantization.llm_int8_skip_modules: '{pattern}' matches no linear layer; layers are "
                            f"called like '{next(iter(layers))}', their last parts are {', '.join(kinds)}"
                            f"{nearest(pattern, kinds)}")  # fmt: skip
        skipped |= hits
    if skipped == set(layers):
        raise UserError("training.quantization.llm_int8_skip_modules skips every linear layer of the backbone; set "
                        "training.quantization=null instead.")  # fmt: skip
    for name, linear in layers.items():
        if name not in skipped:
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, replace(linear))


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
    """Summarise what is stored how, and what of it is trained."""
    rows: dict[tuple[str, str, bool], list[int]] = {}
    for name, module in model.named_modules():
        part = "decoder" if name.startswith("head") else "adapters" if "lora_" in name else "backbone"
        seen: set[tuple[str, str, bool]] = set()
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            dtype, count = str(tensor.dtype).removeprefix("torch."), tensor.numel()
            if isinstance(module, (Linear4bit, Int8Linear)) and own != "bias" and not tensor.requires_grad:
                dtype = module.quant_type if isinstance(module, Linear4bit) else "int8"
                count = module.in_features * module.out_features if own == "weight" else 0
            elif own in ("mean", "std"):
                continue
            key = (part, dtype, tensor.requires_grad)
            row = rows.setdefault(key, [0, 0, 0])
            row[0] += key not in seen
            row[1] += count
            row[2] += tensor.numel() * tensor.element_size()
            seen.add(key)
    return [Part(part, dtype, *numbers, trained) for (part, dtype, trained), numbers in sorted(rows.items())]

"""Build -> quantize -> adapt, in this one place and this one order."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import nn

from tracknet.errors import UserError, nearest
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.lora import LoraConfig, add_lora
from tracknet.quantization.precision import Int8Kernel, Precision, resolve_dtype

Trainable = Literal["auto", "all", "norms", "nothing"]
StorageDtype = Literal["uint8", "fp16", "bf16", "fp32"]
# Of CUDA, the first with int8 matrix units that bitsandbytes uses, and that Triton does (it refuses to compile for
# older ones).
INT8_CAPABILITY = {"bitsandbytes": (7, 5), "triton": (8, 0)}


@dataclass
class QuantizationConfig:
    """How the linear layers of the backbone are stored; the fields are those of transformers' BitsAndBytesConfig."""

    enabled: bool = True
    """Switches quantization."""
    load_in_8bit: bool | None = None
    """Store and multiply in int8 (LLM.int8); ``null`` = unless ``load_in_4bit`` is true."""
    load_in_4bit: bool = False
    """Store in 4 bits, multiply in ``bnb_4bit_compute_dtype``."""
    llm_int8_threshold: float = 6.0
    """Activations that reach this magnitude are multiplied in full precision; 0 = none, which is faster."""
    llm_int8_has_fp16_weight: bool = False
    """Keep a floating-point weight that trains and is quantized in every forward; saves no memory."""
    llm_int8_skip_modules: list[str] = field(default_factory=list)
    """Names or patterns of backbone layers that stay as they are, in 8 and in 4 bits (``layers.0.*``, ``fc2``)."""
    bnb_4bit_compute_dtype: Precision = field(default="bf16", metadata={"changes": ("load",)})
    """Dtype of the dequantized weight."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """``nf4`` suits normally distributed weights, as trained ones are."""
    bnb_4bit_quant_storage: StorageDtype = "uint8"
    """Dtype that the packed bytes pass for; sharded training wants that of the other weights. Changes no value."""
    int8_trainable: bool = False
    """Train the int8 weights themselves, by stochastic rounding: full fine-tuning at one byte a weight. Needs
    ``optimizer.name: adamw8bit`` or ``paged_adamw8bit``, whose states take another two."""

    def __post_init__(self) -> None:
        if self.load_in_8bit is None:
            self.load_in_8bit = self.enabled and not self.load_in_4bit
            if self.load_in_8bit and (
                of_4bit := [
                    f.name
                    for f in fields(self)
                    if f.name.startswith("bnb_4bit_") and getattr(self, f.name) != f.default
                ]
            ):
                raise UserError(
                    f"training.quantization: {of_4bit[0]} is of 4 bits, and load_in_4bit is false: set it to true, or "
                    f"leave {of_4bit[0]} out."
                )
        if self.enabled and self.load_in_8bit and self.load_in_4bit:
            raise UserError(
                "training.quantization: load_in_8bit and load_in_4bit are both true; a weight is stored one "
                "way: set one of them to false."
            )
        if self.enabled and not (self.load_in_8bit or self.load_in_4bit):
            raise UserError(
                "training.quantization: enabled is true, but neither load_in_8bit nor load_in_4bit is; set one "
                "of them, or training.quantization=null."
            )
        if self.enabled and self.llm_int8_has_fp16_weight and not self.load_in_8bit:
            raise UserError(
                "training.quantization: llm_int8_has_fp16_weight=true trains weights that are multiplied in int8, and "
                "load_in_8bit is false: set it to true, or llm_int8_has_fp16_weight=false."
            )
        if self.int8_trainable and (not self.load_in_8bit or self.llm_int8_has_fp16_weight):
            other = "load_in_8bit=false" if not self.load_in_8bit else "llm_int8_has_fp16_weight=true"
            raise UserError(
                f"training.quantization: int8_trainable=true trains int8 codes, and {other} leaves none: set "
                "load_in_8bit=true and llm_int8_has_fp16_weight=false, or int8_trainable=false."
            )
        if not 0 <= self.llm_int8_threshold < math.inf:
            raise UserError(
                f"training.quantization.llm_int8_threshold={self.llm_int8_threshold}: must be a number, and not"
                " negative; 0 looks for no outliers."
            )


Section = TypeVar("Section", QuantizationConfig, LoraConfig)


def active(section: Section | None) -> Section | None:
    """Return a section that is there and enabled, else ``None``."""
    return section if section is not None and section.enabled else None


@dataclass(frozen=True)
class ModeConfig:
    """How a model is stored, what it computes in, and what of it trains: the part of the training section that a loaded
    run needs too.

    Attributes:
        precision: arithmetic outside of the quantized layers.
        quantization: of the backbone's linear layers, or ``None``.
        lora: adapters in the backbone, or ``None``.
        trainable: what of the backbone trains besides adapters.
        int8_kernel: what multiplies in int8 on a GPU.
    """

    precision: Precision = "fp32"
    quantization: QuantizationConfig | None = None
    lora: LoraConfig | None = None
    trainable: Trainable = "auto"
    int8_kernel: Int8Kernel = "auto"


def apply_mode(
    model: HeatmapModel,
    mode: ModeConfig,
    device: torch.device,
    initialize: bool = True,
    place: Callable[[HeatmapModel], None] | None = None,
) -> None:
    """Turn a full-precision model into the one that the settings describe, on its device.

    Quantization happens on the CPU, whatever the device: the codes do not depend on it, and a large backbone never has
    to fit into the GPU at full size.

    Args:
        model: as built; changed in place.
        mode: the mode.
        device: where it will run.
        initialize: ``False`` where a checkpoint brings the values of the adapters.
        place: moves the model to the device; ``None`` = all of it.

    Raises:
        UserError: a combination that the model or the device cannot have.
    """
    model.compute_dtype = resolve_dtype(mode.precision, device, "training.precision")
    quantization, lora = active(mode.quantization), active(mode.lora)
    if model.backbone is None:
        for key, value in (("quantization", quantization), ("lora", lora)):
            if value is not None:
                raise UserError(
                    f"training.{key} acts on the backbone, and this model has none: use --training default, or "
                    f"set training.{key}=null."
                )
        if mode.trainable != "auto":
            raise UserError(
                f"training.trainable={mode.trainable} is about a backbone, and this model has none: set it to auto."
            )
        model.to(device)
        return
    hf = model.backbone.hf
    if quantization is not None:
        quantize(hf, _quantizer(quantization, mode.int8_kernel, device), quantization.llm_int8_skip_modules)
    may_train = {name: p for name, p in hf.named_parameters() if p.requires_grad}
    if lora is not None:
        if lora.bias != "none" and not may_train:
            raise UserError(
                f"model.backbone.freeze=true and training.lora.bias={lora.bias} contradict each other: set "
                "training.lora.bias=none, or model.backbone.freeze=false."
            )
        add_lora(hf, model.backbone.family.blocks(hf), lora, model.rng, initialize)
        if lora.changes_base:
            model.backbone.base = None  # what is left of it can be had from this run only
    _choose_trained(may_train, mode.trainable, lora)
    if place is not None:
        place(model)
    else:
        model.to(device)


def _choose_trained(may_train: dict[str, nn.Parameter], trains: Trainable, lora: LoraConfig | None) -> None:
    """Set what trains among the backbone's own parameters; adapters and their biases are set already."""
    for name, parameter in may_train.items():
        # Norms, biases and layer scales: one value per channel, whatever the number of dimensions.
        is_vector = parameter.numel() == max(parameter.shape) or name.endswith(("token", "tokens"))
        if trains == "all" or (trains == "norms" and is_vector):
            parameter.requires_grad_(True)
        elif trains != "auto" and (lora is None or lora.bias == "none"):
            parameter.requires_grad_(False)


def _quantizer(
    config: QuantizationConfig, kernel: Int8Kernel, device: torch.device
) -> Callable[[nn.Linear], nn.Module]:
    # Imported here: a model at full precision loads without bitsandbytes.
    if config.load_in_8bit:
        from tracknet.quantization.int8 import Int8Linear
        from tracknet.quantization.trainable_int8 import TrainableInt8Linear

        threshold, kernel = config.llm_int8_threshold, choose_int8_kernel(kernel, device)
        if config.int8_trainable:
            return lambda linear: TrainableInt8Linear(linear, threshold, kernel)
        return lambda linear: Int8Linear(linear, threshold, config.llm_int8_has_fp16_weight, kernel)
    from tracknet.quantization.nf4 import Linear4bit

    dtype = resolve_dtype(config.bnb_4bit_compute_dtype, device, "training.quantization.bnb_4bit_compute_dtype")
    return lambda linear: Linear4bit(
        linear, config.bnb_4bit_quant_type, dtype, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
    )


def choose_int8_kernel(kernel: Int8Kernel, device: torch.device) -> Int8Kernel:
    """Return the kernel that multiplies in int8 on a device; elsewhere than on CUDA none of them does.

    Raises:
        UserError: the GPU cannot multiply in int8, or not with this kernel.
    """
    if device.type != "cuda":
        return "bitsandbytes" if kernel == "auto" else kernel
    have, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if have < INT8_CAPABILITY["bitsandbytes"]:
        raise UserError(
            f"training.quantization.load_in_8bit=true and training.device=cuda: {name} has no int8 matrix units (from "
            "Turing, 2018, on); use load_in_4bit=true instead (--training qlora), or training.quantization=null."
        )
    if kernel == "bitsandbytes":
        return kernel
    problem = None
    if have < INT8_CAPABILITY["triton"]:
        problem = f"Triton has no int8 products for {name} (from Ampere, 2020, on)"
    elif find_spec("triton") is None:
        problem = "Triton is not installed (it comes with PyTorch for CUDA on Linux)"
    if kernel == "triton" and problem:
        raise UserError(f"training.int8_kernel=triton: {problem}; use training.int8_kernel=bitsandbytes.")
    return "bitsandbytes" if problem else "triton"


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
            raise UserError(
                f"training.quantization.llm_int8_skip_modules: '{pattern}' matches no linear layer; layers are "
                f"called like '{next(iter(layers))}', their last parts are {', '.join(kinds)}"
                f"{nearest(pattern, kinds)}"
            )
        skipped |= hits
    if skipped == set(layers):
        raise UserError(
            "training.quantization.llm_int8_skip_modules skips every linear layer of the backbone; set "
            "training.quantization=null instead."
        )
    for name, linear in layers.items():
        if name not in skipped:
            backbone.set_submodule(name, replace(linear))

"""Build -> quantise -> adapt, in this one place and this one order."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import nn

from tracknet.errors import UserError, nearest
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.lora import LoraConfig, add_lora
from tracknet.quantization.precision import Int8Kernel, Precision, resolve_dtype

BackboneTrains = Literal["auto", "all", "norms", "nothing"]
StorageDtype = Literal["uint8", "fp16", "bf16", "fp32"]
# Of CUDA, the first with int8 matrix units that bitsandbytes uses, and that Triton does (it refuses to compile for
# older ones).
INT8_CAPABILITY = {"bitsandbytes": (7, 5), "triton": (8, 0)}


@dataclass
class QuantizationConfig:
    """How the linear layers of the backbone are stored; the fields are those of transformers' BitsAndBytesConfig."""

    enabled: bool = True
    """Switches quantisation."""
    load_in_8bit: bool | None = None
    """Store and multiply in int8 (LLM.int8); ``null`` = unless ``load_in_4bit`` is true."""
    load_in_4bit: bool = False
    """Store in 4 bits, multiply in ``bnb_4bit_compute_dtype``."""
    llm_int8_threshold: float = 6.0
    """Activations that reach this magnitude are multiplied in full precision; 0 = none, which is faster."""
    llm_int8_has_fp16_weight: bool = False
    """Keep a floating-point weight that trains and is quantised in every forward; saves no memory."""
    int8_kernel: Int8Kernel = "bitsandbytes"
    """What multiplies in int8 on a GPU: bitsandbytes' operators, or two Triton kernels that do it in one pass, where
    outliers make nothing wait for the host. Results differ by rounding alone. A CPU has a product of its own."""
    llm_int8_skip_modules: list[str] = field(default_factory=list)
    """Names or patterns of backbone layers that stay as they are, in 8 and in 4 bits (``layers.0.*``, ``fc2``)."""
    bnb_4bit_compute_dtype: Precision = "bf16"
    """Dtype of the dequantised weight."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too."""
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
        if self.enabled and self.int8_kernel != "bitsandbytes" and not self.load_in_8bit:
            raise UserError(
                f"training.quantization: int8_kernel={self.int8_kernel} multiplies in int8, and load_in_8bit is false:"
                " set it to true, or int8_kernel=bitsandbytes."
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


def without_kernel(config: QuantizationConfig | None) -> QuantizationConfig | None:
    """Return the settings without what depends on the device that computes: two models that differ in it alone are
    one."""
    return config and replace(config, int8_kernel="bitsandbytes")


def apply_mode(
    model: HeatmapModel,
    precision: Precision,
    quantization: QuantizationConfig | None,
    lora: LoraConfig | None,
    device: torch.device,
    backbone_trains: BackboneTrains = "auto",
    initialise: bool = True,
    place: Callable[[HeatmapModel], None] | None = None,
) -> None:
    """Turn a full-precision model into the one that the settings describe, on its device.

    Quantisation happens on the CPU, whatever the device: the codes do not depend on it, and a large backbone never has
    to fit into the GPU at full size.

    Args:
        model: as built; changed in place.
        precision: arithmetic outside of the quantised layers.
        quantization: of the backbone's linear layers, or ``None``.
        lora: adapters in the backbone, or ``None``.
        device: where it will run.
        backbone_trains: what of the backbone trains besides adapters.
        initialise: ``False`` where a checkpoint brings the values of the adapters.
        place: moves the model to the device; ``None`` = all of it.

    Raises:
        UserError: a combination that the model or the device cannot have.
    """
    model.compute_dtype = resolve_dtype(precision, device, "training.precision")
    quantization, lora = active(quantization), active(lora)
    if model.backbone is None:
        for key, value in (("quantization", quantization), ("lora", lora)):
            if value is not None:
                raise UserError(
                    f"training.{key} acts on the backbone, and this model has none: use --training default, or "
                    f"set training.{key}=null."
                )
        if backbone_trains != "auto":
            raise UserError(
                f"training.backbone_trains={backbone_trains} speaks of a backbone, and this model has none: set it to "
                "auto."
            )
        model.to(device)
        return
    hf = model.backbone.hf
    if quantization is not None:
        quantize(hf, _quantizer(quantization, device), quantization.llm_int8_skip_modules)
    may_train = {name: p for name, p in hf.named_parameters() if p.requires_grad}
    if lora is not None:
        if lora.bias != "none" and not may_train:
            raise UserError(
                f"model.backbone.freeze=true and training.lora.bias={lora.bias} contradict each other: set "
                "training.lora.bias=none, or model.backbone.freeze=false."
            )
        add_lora(hf, model.backbone.family.blocks(hf), lora, model.windows, initialise)
        if lora.changes_base:
            model.backbone.base = None  # what is left of it can be had from this run only
    _choose_trained(may_train, backbone_trains, lora)
    if place is not None:
        place(model)
    else:
        model.to(device)


def _choose_trained(may_train: dict[str, nn.Parameter], trains: BackboneTrains, lora: LoraConfig | None) -> None:
    """Set what trains among the backbone's own parameters; adapters and their biases are set already."""
    for name, parameter in may_train.items():
        # Norms, biases and layer scales: one value per channel, whatever the number of dimensions.
        is_vector = parameter.numel() == max(parameter.shape) or name.endswith(("token", "tokens"))
        if trains == "all" or (trains == "norms" and is_vector):
            parameter.requires_grad_(True)
        elif trains != "auto" and (lora is None or lora.bias == "none"):
            parameter.requires_grad_(False)


def _quantizer(config: QuantizationConfig, device: torch.device) -> Callable[[nn.Linear], nn.Module]:
    # Imported here: a model at full precision loads without bitsandbytes.
    if config.load_in_8bit:
        from tracknet.quantization.int8 import Int8Linear
        from tracknet.quantization.trainable_int8 import TrainableInt8Linear

        if device.type == "cuda":
            _check_gpu(config, device)
        threshold, kernel = config.llm_int8_threshold, config.int8_kernel
        if config.int8_trainable:
            return lambda linear: TrainableInt8Linear(linear, threshold, kernel)
        return lambda linear: Int8Linear(linear, threshold, config.llm_int8_has_fp16_weight, kernel)
    from tracknet.quantization.nf4 import Linear4bit

    dtype = resolve_dtype(config.bnb_4bit_compute_dtype, device, "training.quantization.bnb_4bit_compute_dtype")
    return lambda linear: Linear4bit(
        linear, config.bnb_4bit_quant_type, dtype, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
    )


def _check_gpu(config: QuantizationConfig, device: torch.device) -> None:
    """Refuse what a GPU cannot multiply in int8, before anything is quantised."""
    have, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if have < INT8_CAPABILITY["bitsandbytes"]:
        raise UserError(
            f"training.quantization.load_in_8bit=true and training.device=cuda: {name} has no int8 matrix units (from "
            "Turing, 2018, on); use load_in_4bit=true instead (--training qlora), or training.quantization=null."
        )
    if config.int8_kernel == "triton" and have < INT8_CAPABILITY["triton"]:
        raise UserError(
            f"training.quantization.int8_kernel=triton: Triton has no int8 products for {name} (from Ampere, 2020, on);"
            " use int8_kernel=bitsandbytes."
        )
    if config.int8_kernel == "triton" and find_spec("triton") is None:
        raise UserError(
            "training.quantization.int8_kernel=triton: Triton is not installed (it comes with PyTorch for CUDA on"
            " Linux); use int8_kernel=bitsandbytes."
        )


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

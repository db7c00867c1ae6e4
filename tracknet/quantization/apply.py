"""Application of a mode to a model: quantize its backbone first, then add adapters, then select what trains."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import nn

from tracknet.errors import UserError, nearest
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.adapters import LoraConfig, add_adapters
from tracknet.quantization.adapters.initialization import remember_residuals, start_from_residuals_
from tracknet.quantization.precision import Int8Kernel, Precision, resolve_dtype

Trainable = Literal["auto", "all", "norms", "nothing"]
StorageDtype = Literal["uint8", "fp16", "bf16", "fp32"]
# First CUDA capability whose int8 matrix units each kernel uses. Triton refuses to compile for older GPUs.
INT8_CAPABILITY = {"bitsandbytes": (7, 5), "triton": (8, 0)}


@dataclass
class QuantizationConfig:
    """Storage of the backbone's linear layers; the fields are those of transformers' BitsAndBytesConfig."""

    enabled: bool = True
    """``false`` disables quantization."""
    load_in_8bit: bool | None = None
    """Store weights and multiply in int8 (LLM.int8); ``null`` = ``true`` unless ``load_in_4bit`` is."""
    load_in_4bit: bool = False
    """Store weights in 4 bits and multiply in ``bnb_4bit_compute_dtype``."""
    llm_int8_threshold: float = 6.0
    """Activations of at least this magnitude are multiplied in full precision; 0 = none, which is faster."""
    llm_int8_has_fp16_weight: bool = False
    """Keep a floating-point weight that is trained, and quantize it in every forward; saves no memory."""
    int8_backward: bool = False
    """Multiply gradients in int8 too: those of the inputs, and those of weights that train."""
    llm_int8_skip_modules: list[str] = field(default_factory=list)
    """Names or patterns of backbone layers that are not quantized, in 8 and in 4 bits (``layers.0.*``, ``fc2``)."""
    bnb_4bit_compute_dtype: Precision = field(default="bf16", metadata={"changes": ("load",)})
    """Dtype of the dequantized weight and of the product."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit format; ``nf4`` suits normally distributed weights, which trained weights are."""
    bnb_4bit_quant_storage: StorageDtype = "uint8"
    """Nominal dtype of the packed bytes; sharded training requires that of the other weights. Changes no value."""
    int8_trainable: bool = False
    """Train the int8 weights themselves with stochastic rounding: full fine-tuning at one byte per weight. Requires
    ``optimizer.name: adamw8bit`` or ``paged_adamw8bit``, whose state takes two more."""

    def __post_init__(self) -> None:
        # Unset, int8 is the default format. A changed 4-bit setting indicates that 4-bit storage was intended.
        if self.load_in_8bit is None:
            self.load_in_8bit = self.enabled and not self.load_in_4bit
            if self.load_in_8bit and (
                changed_4bit := [
                    f.name
                    for f in fields(self)
                    if f.name.startswith("bnb_4bit_") and getattr(self, f.name) != f.default
                ]
            ):
                raise UserError(
                    f"training.quantization: {changed_4bit[0]} is a setting of 4-bit storage, but load_in_4bit is"
                    f" false: set load_in_4bit=true, or remove {changed_4bit[0]}."
                )
        # Combinations that contradict each other.
        if self.enabled and self.load_in_8bit and self.load_in_4bit:
            raise UserError(
                "training.quantization: load_in_8bit and load_in_4bit are both true, but a weight has one format: "
                "set one of them to false."
            )
        if self.enabled and not (self.load_in_8bit or self.load_in_4bit):
            raise UserError(
                "training.quantization: enabled is true, but neither load_in_8bit nor load_in_4bit is: set one "
                "of them to true, or set training.quantization=null."
            )
        if self.enabled and self.llm_int8_has_fp16_weight and not self.load_in_8bit:
            raise UserError(
                "training.quantization: llm_int8_has_fp16_weight=true trains weights that are multiplied in int8, but "
                "load_in_8bit is false: set load_in_8bit=true or llm_int8_has_fp16_weight=false."
            )
        if self.int8_trainable and (not self.load_in_8bit or self.llm_int8_has_fp16_weight):
            conflict = "load_in_8bit=false" if not self.load_in_8bit else "llm_int8_has_fp16_weight=true"
            raise UserError(
                f"training.quantization: int8_trainable=true trains int8 codes, but {conflict} stores none: set "
                "load_in_8bit=true and llm_int8_has_fp16_weight=false, or int8_trainable=false."
            )
        if self.int8_backward and not self.load_in_8bit:
            raise UserError(
                "training.quantization: int8_backward=true multiplies gradients with int8 weights, but"
                " load_in_8bit=false stores none: set int8_backward=false."
            )
        if not 0 <= self.llm_int8_threshold < math.inf:
            raise UserError(
                f"training.quantization.llm_int8_threshold={self.llm_int8_threshold}: must be a finite number of at"
                " least 0; 0 disables outlier handling."
            )


Section = TypeVar("Section", QuantizationConfig, LoraConfig)


def active(section: Section | None) -> Section | None:
    """Return the section if it is set and enabled, else ``None``."""
    return section if section is not None and section.enabled else None


@dataclass(frozen=True)
class ModeConfig:
    """Storage, precision and trainable parameters of a model: the settings of training that a loaded run needs too.

    Attributes:
        precision: arithmetic outside the quantized layers.
        quantization: storage of the backbone's linear layers; ``None`` for full precision.
        lora: adapters in the backbone; ``None`` for none.
        trainable: parameters of the backbone that train besides adapters.
        train_last_blocks: number of blocks at the end of the backbone that train, or their share, such as ``50%``;
            ``None`` for all.
        int8_kernel: implementation of int8 products on a GPU.
    """

    precision: Precision = "fp32"
    quantization: QuantizationConfig | None = None
    lora: LoraConfig | None = None
    trainable: Trainable = "auto"
    train_last_blocks: int | str | None = None
    int8_kernel: Int8Kernel = "auto"


def count_last_blocks(setting: int | str | None, num_blocks: int) -> int | None:
    """Return the number of last blocks that train; ``None`` for all of the model.

    Args:
        setting: ``training.train_last_blocks``.
        num_blocks: number of blocks of the backbone.

    Raises:
        UserError: if the setting is neither a positive number nor a share from ``1%`` to ``100%``.
    """
    if setting is None or (isinstance(setting, int) and setting > 0):
        return setting
    share = re.fullmatch(r"([1-9]\d?|100)\s*%", str(setting))
    if share is None:
        raise UserError(
            f"training.train_last_blocks={setting}: must be a number of blocks, such as 4, a share of them, such as"
            " 50%, or null for all."
        )
    return math.ceil(num_blocks * int(share[1]) / 100)


def apply_mode(
    model: HeatmapModel,
    mode: ModeConfig,
    device: torch.device,
    initialize: bool = True,
    place: Callable[[HeatmapModel], None] | None = None,
) -> None:
    """Quantize a full-precision model, add adapters, select what trains, and move it to its device.

    Quantization runs on the CPU for every device. The codes therefore do not depend on the device, and a large backbone
    never has to fit into the GPU at full precision.

    Args:
        model: model from ``build_model``; changed in place.
        mode: mode to apply.
        device: device on which the model will run.
        initialize: ``False`` if a checkpoint provides the values of the adapters.
        place: function that moves the model to the device; ``None`` to move all of it.

    Raises:
        UserError: if the model or the device does not support the combination of settings.
    """
    model.compute_dtype = resolve_dtype(mode.precision, device, "training.precision")
    quantization, lora = active(mode.quantization), active(mode.lora)
    # Without a backbone there is nothing to quantize, adapt or freeze.
    if model.backbone is None:
        for key, value in (("quantization", quantization), ("lora", lora)):
            if value is not None:
                raise UserError(
                    f"training.{key} acts on the backbone, but this model has none: use --training default, or "
                    f"set training.{key}=null."
                )
        if mode.trainable != "auto":
            raise UserError(
                f"training.trainable={mode.trainable} acts on the backbone, but this model has none: set it to auto."
            )
        if mode.train_last_blocks is not None:
            raise UserError(
                f"training.train_last_blocks={mode.train_last_blocks} acts on the backbone, but this model has none: "
                "set it to null."
            )
        model.to(device)
        return
    # Quantize before adapters are added: peft then wraps the quantized layers, and adapters are never quantized.
    hf = model.backbone.hf
    # Freeze what runs before the last blocks first: its weights are then quantized as frozen ones in every mode.
    blocks = model.backbone.family.blocks(hf)
    last_blocks = count_last_blocks(mode.train_last_blocks, len(blocks))
    frozen = [] if last_blocks is None else model.backbone.parameters_before(last_blocks)
    for parameter in frozen:
        parameter.requires_grad_(False)
    uses_loftq = initialize and lora is not None and lora.init_lora_weights == "loftq"
    factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if quantization is not None:
        quantizer = _quantizer(quantization, mode.int8_kernel, device)
        if lora is not None and uses_loftq:
            wanted = {id(m) for block in blocks[-(last_blocks or len(blocks)) :] for m in block.modules()}
            rank = max([lora.r, *lora.rank_pattern.values()])
            quantizer = remember_residuals(quantizer, rank, wanted, factors)
        quantize_backbone(hf, quantizer, quantization.llm_int8_skip_modules)
    # Read before peft freezes the backbone: codes and a frozen backbone are not among these and never train.
    may_train = {name: p for name, p in hf.named_parameters() if p.requires_grad}
    if lora is not None:
        if lora.bias != "none" and not may_train:
            raise UserError(
                f"model.backbone.freeze=true and training.lora.bias={lora.bias} contradict each other: set "
                "training.lora.bias=none, or model.backbone.freeze=false."
            )
        add_adapters(hf, blocks[-(last_blocks or len(blocks)) :], lora, model.rng, initialize)
        if uses_loftq:
            start_from_residuals_(hf, factors)
        # With `bias: all`, peft has selected the biases of earlier blocks, too.
        for parameter in frozen:
            parameter.requires_grad_(False)
        if lora.changes_base:
            model.backbone.base = None  # the remaining base weights exist in this run only
    _select_trained(may_train, mode.trainable, lora)
    if place is not None:
        place(model)
    else:
        model.to(device)


def _select_trained(may_train: dict[str, nn.Parameter], trainable: Trainable, lora: LoraConfig | None) -> None:
    """Set ``requires_grad`` of the backbone's own parameters; adapters and their biases are set already.

    Args:
        may_train: parameters of the backbone that can train, by name, read before adapters were added.
        trainable: parameters to train.
        lora: adapters in the backbone, or ``None``.
    """
    for name, parameter in may_train.items():
        # Norms, biases and layer scales have one value per channel in any number of dimensions. Several tokens form a
        # matrix, but count as vectors too.
        is_vector = parameter.numel() == max(parameter.shape) or name.endswith(("token", "tokens"))
        if trainable == "all" or (trainable == "norms" and is_vector):
            parameter.requires_grad_(True)
        # With `lora.bias`, peft has selected the biases that train. `auto` keeps the selection of peft, or everything.
        elif trainable != "auto" and (lora is None or lora.bias == "none"):
            parameter.requires_grad_(False)


def _quantizer(
    config: QuantizationConfig, kernel: Int8Kernel, device: torch.device
) -> Callable[[nn.Linear], nn.Module]:
    """Return the function that replaces a linear layer by a quantized one.

    Args:
        config: quantization settings.
        kernel: implementation of int8 products on a GPU.
        device: device on which the model will run.
    """
    # Imported here so that a model at full precision loads without bitsandbytes.
    if config.load_in_8bit:
        from tracknet.quantization.int8 import Int8Linear
        from tracknet.quantization.trainable_int8 import TrainableInt8Linear

        threshold, kernel = config.llm_int8_threshold, choose_int8_kernel(kernel, device)

        def quantize_int8(linear: nn.Linear) -> nn.Module:
            # Before the last blocks that train, weights are frozen codes also if the mode trains them elsewhere.
            trains = linear.weight.requires_grad
            if config.int8_trainable and trains:
                return TrainableInt8Linear(linear, threshold, kernel, config.int8_backward)
            return Int8Linear(
                linear, threshold, config.llm_int8_has_fp16_weight and trains, kernel, config.int8_backward
            )

        return quantize_int8
    from tracknet.quantization.nf4 import Linear4bit

    dtype = resolve_dtype(config.bnb_4bit_compute_dtype, device, "training.quantization.bnb_4bit_compute_dtype")
    return lambda linear: Linear4bit(
        linear, config.bnb_4bit_quant_type, dtype, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
    )


def choose_int8_kernel(kernel: Int8Kernel, device: torch.device) -> Int8Kernel:
    """Resolve the int8 kernel for a device.

    Args:
        kernel: configured kernel.
        device: device on which the model will run.

    Returns:
        Kernel of the quantized layers; only layers on CUDA multiply with it.

    Raises:
        UserError: if the GPU does not support int8 products, or not with this kernel.
    """
    if device.type != "cuda":
        return "bitsandbytes" if kernel == "auto" else kernel
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < INT8_CAPABILITY["bitsandbytes"]:
        raise UserError(
            f"training.quantization.load_in_8bit=true and training.device=cuda: {name} has no int8 matrix units (from "
            "Turing, 2018, on); use load_in_4bit=true instead (--training qlora), or training.quantization=null."
        )
    if kernel == "bitsandbytes":
        return kernel
    # `auto` prefers Triton and falls back to bitsandbytes; an explicit `triton` must be available.
    problem = None
    if capability < INT8_CAPABILITY["triton"]:
        problem = f"Triton does not support int8 products on {name} (supported from Ampere, 2020, on)"
    elif find_spec("triton") is None:
        problem = "Triton is not installed (it comes with PyTorch for CUDA on Linux)"
    if kernel == "triton" and problem:
        raise UserError(f"training.int8_kernel=triton: {problem}; use training.int8_kernel=bitsandbytes.")
    return "bitsandbytes" if problem else "triton"


def quantize_backbone(backbone: nn.Module, replace: Callable[[nn.Linear], nn.Module], skip: list[str]) -> None:
    """Replace the linear layers of a backbone, except those that match a skip pattern.

    Args:
        backbone: module to change in place.
        replace: function that returns the replacement of a layer.
        skip: names or patterns (``fnmatch``) of layers, matched against the full name or its end from a dot on.

    Raises:
        UserError: if a pattern matches no layer, or if all layers are skipped.
    """
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    skipped: set[str] = set()
    for pattern in skip:
        matched = {n for n in layers if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n, f"*.{pattern}")}
        if not matched:
            kinds = sorted({n.rsplit(".", 1)[-1] for n in layers})
            raise UserError(
                f"training.quantization.llm_int8_skip_modules: '{pattern}' matches no linear layer; full names "
                f"are like '{next(iter(layers))}', their last parts are {', '.join(kinds)}"
                f"{nearest(pattern, kinds)}"
            )
        skipped |= matched
    if skipped == set(layers):
        raise UserError(
            "training.quantization.llm_int8_skip_modules skips every linear layer of the backbone; set "
            "training.quantization=null instead."
        )
    for name, linear in layers.items():
        if name not in skipped:
            backbone.set_submodule(name, replace(linear))

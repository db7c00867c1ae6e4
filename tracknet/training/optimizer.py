"""AdamW optimizers, learning rates by component, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tracknet.errors import UserError
from tracknet.memory.resumable import ResumableAdamW
from tracknet.models.components import component_by_name
from tracknet.models.heatmap_model import HeatmapModel


@dataclass
class OptimizerConfig:
    """Settings of AdamW (Loshchilov and Hutter, ICLR 2019). The 8-bit and paged variants are those of bitsandbytes."""

    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """Implementation. ``8bit``: state in one byte per value. ``paged``: state that moves to host memory when GPU memory
    is short (CUDA only)."""
    lr: float = 5e-4
    """Learning rate after the warm-up."""
    backbone_lr_scale: float = 0.1
    """Factor on ``lr`` for the backbone's own weights: pretrained weights need small steps. Adapters use ``lr``
    itself."""
    lora_plus_lr_ratio: float = 1.0
    """Factor on ``lr`` for the matrices B of LoRA adapters (LoRA+, Hayou et al., ICML 2024), which start at zero; 16 is
    usual there."""
    decoder_lr_scale: float = 1.0
    """Factor on ``lr`` for the decoder, which is initialized at random."""
    weight_decay: float = 0.05
    """Weight decay of matrices and convolution filters; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr_scale", "lora_plus_lr_ratio", "decoder_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"training.optimizer.{name}={getattr(self, name)}: must be a finite number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"training.optimizer.weight_decay={self.weight_decay}: must be a finite number of at least 0."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"training.optimizer.betas={list(self.betas)}: each must be at least 0 and below 1.")


@dataclass
class SchedulerConfig:
    """Learning rate schedule."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape of the schedule after the warm-up."""
    warmup_epochs: float = 3.0
    """Epochs of linear warm-up. If ``max_steps`` shortens the run, the warm-up is shortened proportionally."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end of the cosine, as a fraction of ``lr``."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < math.inf:
            raise UserError(
                f"training.scheduler.warmup_epochs={self.warmup_epochs}: must be a finite number of at least 0."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"training.scheduler.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1.")


def build_optimizer(
    model: HeatmapModel, config: OptimizerConfig, device: torch.device, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters that require gradients.

    Args:
        model: model with its mode applied.
        config: settings of the optimizer.
        device: device of the model.
        seed: seed of the stochastic rounding of trained int8 weights.

    Raises:
        UserError: if no parameter requires a gradient, or paged state is configured without CUDA.
    """
    # One parameter group per component and kind: matrices and filters are decayed, vectors (norms, biases) are not.
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    components = component_by_name(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = "lora_B" if config.lora_plus_lr_ratio != 1 and ".lora_B." in name else components[name]
            groups.setdefault((component, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise UserError("No parameter of the model is trained; check model.backbone.freeze and training.lora.")
    # `base_lr` is the learning rate after the warm-up; `set_learning_rate` derives `lr` from it in every step.
    scale = {
        "decoder": config.decoder_lr_scale,
        "adapters": 1.0,
        "lora_B": config.lora_plus_lr_ratio,
        "backbone": config.backbone_lr_scale,
    }
    parameters = [
        {
            "params": group,
            "base_lr": config.lr * scale[component],
            "lr": config.lr * scale[component],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (component, decays), group in groups.items()
    ]
    if config.name == "adamw":
        return ResumableAdamW(parameters, lr=config.lr, betas=config.betas)
    check_paged_supported(config, device.type)
    # Imported here, because only these optimizers need bitsandbytes.
    from tracknet.quantization.trainable_int8 import int8_layers
    from tracknet.training import bnb_optimizers as bnb

    kinds = {"adamw8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW, "paged_adamw8bit": bnb.PagedAdamW8bit}
    optimizer: Any = kinds[config.name](parameters, lr=config.lr, betas=config.betas)
    # Attributes of `StochasticRounding` and `Resumable`.
    optimizer.layers, optimizer.seed = int8_layers(model), seed
    return optimizer


def check_paged_supported(config: OptimizerConfig, device: str) -> None:
    """Raise a ``UserError`` if a paged optimizer is configured for a device other than CUDA."""
    if config.name.startswith("paged") and device != "cuda":
        raise UserError(
            f"training.optimizer.name={config.name} pages its state between GPU and host memory, but this run is on "
            f"{device}: use {config.name.removeprefix('paged_')}."
        )


def build_schedule(config: SchedulerConfig, total_steps: int, epochs: int) -> Callable[[int], float]:
    """Return the factor on the learning rates as a function of the step, from 0.

    The schedule has no state, so a checkpoint does not need to store it.

    Args:
        config: settings of the schedule.
        total_steps: optimizer steps of the whole run.
        epochs: configured epochs. The warm-up takes the fraction ``warmup_epochs / epochs`` of the run, even if
            ``max_steps`` shortens it.
    """
    warmup = round(total_steps * min(1.0, config.warmup_epochs / epochs))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)  # above 0 in the first step, 1 in the first step after the warm-up
        if config.name == "constant":
            return 1.0
        # `max(1, ...)` avoids a division by zero if the warm-up takes the whole run.
        progress = (step - warmup) / max(1, total_steps - warmup)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the learning rate of every group to ``base_lr`` times the factor; return that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def use_paged_state(config: OptimizerConfig, offloads: bool, device: torch.device) -> OptimizerConfig:
    """Replace ``adamw8bit`` by its paged variant for offload on a GPU. The updates stay the same.

    Args:
        config: settings of the optimizer.
        offloads: whether CPU or disk offload is on.
        device: device of the model.
    """
    pages = offloads and device.type == "cuda" and config.name == "adamw8bit"
    return replace(config, name="paged_adamw8bit") if pages else config


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors in the state of an optimizer."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

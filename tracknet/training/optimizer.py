"""AdamW by name, learning rates by part, and warm-up with cosine decay by step."""

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
    """AdamW (Loshchilov and Hutter, ICLR 2019); the 8-bit and paged ones are bitsandbytes'."""

    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """``8bit`` keeps the state in one byte per value; ``paged`` lets it leave the GPU when memory is short (CUDA
    only)."""
    lr: float = 5e-4
    """Learning rate after warm-up."""
    backbone_lr_scale: float = 0.1
    """Factor on ``lr`` for the backbone's own weights: pretrained ones want small steps. Adapters take ``lr``
    itself."""
    decoder_lr_scale: float = 1.0
    """Factor on ``lr`` for the decoder, which starts at random."""
    weight_decay: float = 0.05
    """Decay of matrices and filters; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr_scale", "decoder_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"training.optimizer.{name}={getattr(self, name)}: must be a number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"training.optimizer.weight_decay={self.weight_decay}: must not be negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"training.optimizer.betas={list(self.betas)}: each is at least 0 and below 1.")


@dataclass
class SchedulerConfig:
    """Learning rate over the run."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_epochs: float = 3.0
    """Epochs of linear warm-up. Where ``max_steps`` caps the run, the schedule shrinks with it."""
    min_lr_ratio: float = 0.01
    """Where cosine ends, relative to ``lr``."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < math.inf:
            raise UserError(
                f"training.scheduler.warmup_epochs={self.warmup_epochs}: must be a number, and not negative."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"training.scheduler.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1.")


def build_optimizer(
    model: HeatmapModel, config: OptimizerConfig, device: torch.device, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer over everything that is trained.

    Args:
        model: with its mode applied.
        config: which one.
        device: where the model is.
        seed: of stochastic rounding, where int8 weights train.

    Raises:
        UserError: nothing is trained, or the device cannot page.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    components = component_by_name(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((components[name], parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise UserError("Nothing of the model is trained; check model.backbone.freeze and training.lora.")
    scale = {"decoder": config.decoder_lr_scale, "adapters": 1.0, "backbone": config.backbone_lr_scale}
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
    # Here, because bitsandbytes is only needed when asked for.
    from tracknet.quantization.trainable_int8 import int8_layers
    from tracknet.training import bnb_optimizers as bnb

    kinds = {"adamw8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW, "paged_adamw8bit": bnb.PagedAdamW8bit}
    optimizer: Any = kinds[config.name](parameters, lr=config.lr, betas=config.betas)
    optimizer.layers, optimizer.seed = int8_layers(model), seed
    return optimizer


def check_paged_supported(config: OptimizerConfig, device: str) -> None:
    """Refuse state that leaves a GPU where there is none."""
    if config.name.startswith("paged") and device != "cuda":
        raise UserError(
            f"training.optimizer.name={config.name} pages between GPU and host memory, and this run is on "
            f"{device}: use {config.name.removeprefix('paged_')}."
        )


def build_schedule(config: SchedulerConfig, total_steps: int, epochs: int) -> Callable[[int], float]:
    """Return the factor on the learning rates as a function of the step, so that nothing of it needs to be saved.

    Warm-up takes the same share of the run whether or not it is capped.
    """
    warmup = round(total_steps * min(1.0, config.warmup_epochs / epochs))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.name == "constant":
            return 1.0
        progress = (step - warmup) / max(1, total_steps - warmup)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to its own base times the factor; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def use_paged_state(config: OptimizerConfig, offloads: bool, device: torch.device) -> OptimizerConfig:
    """With offload on a GPU, 8-bit state may leave it; the numbers stay the same."""
    pages = offloads and device.type == "cuda" and config.name == "adamw8bit"
    return replace(config, name="paged_adamw8bit") if pages else config


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors that an optimizer keeps."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

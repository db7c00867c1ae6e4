"""Pretrained vision backbones through transformers: any ViT or ConvNeXt of the families below, as feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.errors import UserError


@dataclass
class BackboneConfig:
    """The pretrained network that encodes each frame."""

    name: str = field(default="facebook/dinov2-small", metadata={"changes": ("resume", "load")})
    """Hub id, local folder, or ``embedded/NAME`` for a small one that ships with this package."""
    revision: str | None = field(default=None, metadata={"changes": ("load",)})
    """Commit, tag or branch of a hub id; ``null`` = its main branch."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` builds the architecture of ``name`` without its weights."""
    freeze: bool = False
    """Train nothing of the backbone (LoRA adapters still train)."""
    local_files_only: bool = field(default=False, metadata={"changes": ("load",)})
    """Never ask the hub; use only what is in its cache."""
    layers: list[int] | None = None
    """Blocks (ViT, counted from 1) or stages (ConvNeXt) whose features are used; ``null`` = chosen by depth."""


@dataclass(frozen=True)
class Family:
    """How a transformers model type is laid out."""

    kind: Literal["vit", "convnext"]
    units: Callable[[nn.Module], list[nn.Module]]  # what `layers` counts: blocks of a ViT, stages of a ConvNeXt
    blocks: Callable[[nn.Module], list[nn.Module]]  # what is checkpointed
    norm: str = ""  # name of the ViT's last norm


def _convnext(path: str) -> Family:
    def stages(model: Any) -> list[Any]:
        return list(model.get_submodule(path))

    return Family("convnext", stages, lambda model: [block for stage in stages(model) for block in stage.layers])


def _vit(path: str, norm: str) -> Family:
    def blocks(model: Any) -> list[nn.Module]:
        return list(model.get_submodule(path))

    return Family("vit", blocks, blocks, norm)


FAMILIES = {
    "vit": _vit("layers", "layernorm"),
    "dinov2": _vit("encoder.layer", "layernorm"),
    "dinov2_with_registers": _vit("encoder.layer", "layernorm"),
    "dinov3_vit": _vit("model.layer", "norm"),
    "convnext": _convnext("encoder.stages"),
    "convnextv2": _convnext("encoder.stages"),
    "dinov3_convnext": _convnext("model.stages"),
}


def _cast_to_autocast(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    """Cast a norm's fp32 output once, so that the layers after it (q, k, v and their adapters) keep one 16-bit input
    for backward instead of a copy each. They would all cast it to the same values."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


@dataclass(frozen=True)
class Base:
    """Pretrained weights that can be had again: what a run names instead of saving them.

    Attributes:
        name: hub id, folder, or ``embedded/NAME``.
        revision: commit on the hub, else ``None``.
        sha256: of the loaded tensors: names, dtypes, shapes and bytes.
    """

    name: str
    revision: str | None
    sha256: str


class Backbone(nn.Module):
    """A transformers model that maps images to feature maps.

    Attributes:
        hf: the transformers model; quantization and LoRA act inside it and nowhere else.
        channels: channels of each map.
        strides: input pixels per cell of each map.
        base: where the weights came from, if others can have them from there too.
    """

    base: Base | None = None
    hf: Any  # which transformers gives no type that covers all families
    mean: Tensor
    std: Tensor

    def __init__(self, hf: Any, layers: list[int] | None, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        config = hf.config
        self.hf = hf
        self.family = FAMILIES[config.model_type]
        depth = len(self.family.units(hf))
        if layers is None:
            layers = [depth // 2, depth] if self.family.kind == "vit" else list(range(1, depth + 1))
        if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise UserError(f"model.backbone.layers={layers}: give increasing numbers from 1 to {depth}.")
        self.layers: list[int] = layers
        if self.family.kind == "vit":
            self.patch_size: int = config.patch_size
            self.channels: list[int] = [config.hidden_size] * len(layers)
            self.strides: list[int] = [config.patch_size] * len(layers)
        else:
            self.patch_size = 32  # the last stage's stride: other sizes would be cropped by the strided convolutions
            self.channels = [config.hidden_sizes[i - 1] for i in layers]
            self.strides = [4 * 2 ** (i - 1) for i in layers]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        for name, parameter in hf.named_parameters():
            # Only self-supervised pre-training masks tokens.
            parameter.requires_grad_(not name.endswith("mask_token"))
        for module in hf.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(_cast_to_autocast)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images.

        Args:
            images: uint8 ``[n, 3, h, w]``; sizes that the patches do not divide are stretched up to the next that
                they do, so that each map still covers exactly the picture.

        Returns:
            One map ``[n, channels, h / stride, w / stride]`` per layer.
        """
        x = (images.float() / 255 - self.mean) / self.std
        p = self.patch_size
        h, w = (-(-side // p) * p for side in x.shape[-2:])
        if (h, w) != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False)
        # A frozen backbone keeps nothing for backward.
        trains = torch.is_grad_enabled() and any(q.requires_grad for q in self.hf.parameters())
        with torch.set_grad_enabled(trains):
            features = self._collect(x)
            if self.family.kind == "convnext":
                return features
            norm = self.hf.get_submodule(self.family.norm)
            grid = (h // p, w // p)
            # Class and register tokens come first; the patches are the rest.
            return [norm(f)[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(-1, grid) for f in features]

    def _collect(self, x: Tensor) -> list[Tensor]:
        """Run the model once and return what the chosen layers put out."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable:
            def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        units = self.family.units(self.hf)
        hooks = [units[i - 1].register_forward_hook(keep(i)) for i in self.layers]
        try:
            extra = {"interpolate_pos_encoding": True} if self.hf.config.model_type == "vit" else {}
            self.hf(pixel_values=x, **extra)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[i] for i in self.layers]

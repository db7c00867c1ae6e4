"""Pretrained vision backbones from transformers, as feature maps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.errors import UserError
from tracknet.models.families import FAMILIES


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
    """Former spelling of ``training.trainable=nothing``: train nothing of the backbone except adapters."""
    local_files_only: bool = field(default=False, metadata={"changes": ("load",)})
    """Never ask the hub; use only what is in its cache."""
    layers: list[int] | None = None
    """Blocks (ViT, counted from 1) or stages (ConvNeXt) whose features are used; ``null`` = chosen by depth."""


def _cast_to_autocast(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    """Cast the fp32 output of a norm to autocast's dtype, as a forward hook.

    The layers after a norm (q, k, v and their adapters) would each cast it to the same values and keep a copy for
    backward; cast once, they share one.
    """
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


@dataclass(frozen=True)
class Base:
    """Reference to published pretrained weights, which a run records instead of saving a copy.

    Attributes:
        name: hub id, folder, or ``embedded/NAME``.
        revision: commit on the hub, else ``None``.
        sha256: hash of the loaded tensors (names, dtypes, shapes and bytes).
    """

    name: str
    revision: str | None
    sha256: str


class Backbone(nn.Module):
    """A transformers model that maps images to feature maps.

    Args:
        hf: transformers model of a registered family.
        layers: numbers of the layers whose maps are used, from 1; ``None`` selects the family's default.
        mean: per-channel mean of the pretraining images, in [0, 1].
        std: per-channel standard deviation, likewise.

    Attributes:
        hf: the transformers model; quantization and LoRA act inside it and nowhere else.
        family: layout of the model type.
        size_multiple: pixels that divide the height and width that ``hf`` sees.
        channels: channels of each map.
        strides: input pixels per cell of each map.
        base: source of the weights, if they are published; else ``None``.
    """

    base: Base | None = None
    hf: Any  # no type of transformers covers all families
    mean: Tensor
    std: Tensor

    def __init__(self, hf: Any, layers: list[int] | None, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        config = hf.config
        self.hf = hf
        self.family = FAMILIES[config.model_type]
        self.family.prepare(hf)
        depth = len(self.family.layers(hf))
        if layers is None:
            layers = self.family.default_layers(depth)
        if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise UserError(f"model.backbone.layers={layers}: give increasing numbers from 1 to {depth}.")
        self.layers: list[int] = layers
        self.size_multiple = self.family.size_multiple(config)
        self.channels: list[int] = [self.family.channels(config)[i - 1] for i in layers]
        self.strides: list[int] = [self.family.strides(config)[i - 1] for i in layers]
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
            images: uint8 RGB ``[n, 3, h, w]``. Sizes that are no multiple of ``size_multiple`` are stretched up to the
                next one, so that each map covers exactly the picture.

        Returns:
            One map ``[n, channels, h / stride, w / stride]`` per layer.
        """
        x = (images.float() / 255 - self.mean) / self.std
        h, w = (-(-side // self.size_multiple) * self.size_multiple for side in x.shape[-2:])
        if (h, w) != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False)
        # A frozen backbone keeps nothing for backward.
        is_trained = torch.is_grad_enabled() and any(q.requires_grad for q in self.hf.parameters())
        with torch.set_grad_enabled(is_trained):
            outputs = self._collect_outputs(x)
            grids = [(h // stride, w // stride) for stride in self.strides]
            return [self.family.feature_map(self.hf, output, grid) for output, grid in zip(outputs, grids)]

    def parameters_before(self, last_blocks: int) -> list[nn.Parameter]:
        """Return the parameters of everything that runs before the last blocks: embeddings and earlier blocks.

        Modules of every family are registered in the order in which they run.

        Args:
            last_blocks: number of blocks at the end of the backbone.

        Raises:
            UserError: if the backbone has fewer blocks.
        """
        blocks = self.family.blocks(self.hf)
        if last_blocks > len(blocks):
            raise UserError(f"training.train_last_blocks={last_blocks}: the backbone has {len(blocks)} blocks only.")
        first = next(blocks[-last_blocks].parameters())
        return list(itertools.takewhile(lambda parameter: parameter is not first, self.hf.parameters()))

    def _collect_outputs(self, x: Tensor) -> list[Any]:
        """Run the model once and return the outputs of the selected layers.

        Hooks, rather than ``output_hidden_states``, keep only the layers that are used.
        """
        outputs: dict[int, Any] = {}

        def make_hook(layer: int) -> Any:
            def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
                outputs[layer] = output

            return hook

        modules = self.family.layers(self.hf)
        handles = [modules[i - 1].register_forward_hook(make_hook(i)) for i in self.layers]
        try:
            self.hf(pixel_values=x, **self.family.forward_kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return [outputs[i] for i in self.layers]

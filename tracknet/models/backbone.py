"""Pretrained vision backbones through transformers: any ViT or ConvNeXt of the families below, as feature maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from tracknet.errors import UserError, nearest
from tracknet.models.architectures import known_architecture

# Loading takes a moment; downloads keep their own progress bars.
transformers_logging.disable_progress_bar()

EMBEDDED = Path(__file__).parent.parent / "weights"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class BackboneConfig:
    """The pretrained network that encodes each frame."""

    name: str = "facebook/dinov2-small"
    """Hub id, local folder, or ``embedded/NAME`` for a small one that ships with this package."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` builds the architecture of ``name`` without its weights."""
    freeze: bool = False
    """Train nothing of the backbone (LoRA adapters still train)."""
    local_files_only: bool = False
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
    def stages(model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(path))

    return Family("convnext", stages, lambda model: [block for stage in stages(model) for block in stage.layers])


def _vit(path: str, norm: str) -> Family:
    def blocks(model: nn.Module) -> list[nn.Module]:
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
# Free of licence gates; named where a backbone cannot be had.
ALTERNATIVES = {
    "vit": ("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-large"),
    "convnext": ("facebook/convnext-tiny-224", "facebook/convnext-base-224", "facebook/convnextv2-tiny-22k-224"),
}


class Backbone(nn.Module):
    """A transformers model that maps images to feature maps.

    Attributes:
        hf: the transformers model; quantisation and LoRA act inside it and nowhere else.
        channels: channels of each map.
        strides: input pixels per cell of each map.
        note: a line for the user, where something had to be assumed.
    """

    note: str | None = None

    def __init__(self, hf: nn.Module, layers: list[int] | None, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        config = hf.config
        self.hf = hf
        self.family = FAMILIES[config.model_type]
        depth = len(self.family.units(hf))
        if layers is None:
            layers = [depth // 2, depth] if self.family.kind == "vit" else list(range(1, depth + 1))
        if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise UserError(f"model.backbone.layers={layers}: give increasing numbers from 1 to {depth}.")
        self.layers = layers
        if self.family.kind == "vit":
            self.patch_size = config.patch_size
            self.channels = [config.hidden_size] * len(layers)
            self.strides = [config.patch_size] * len(layers)
        else:
            self.patch_size = 32  # the last stage's stride: other sizes would be cropped by the strided convolutions
            self.channels = [config.hidden_sizes[i - 1] for i in layers]
            self.strides = [4 * 2 ** (i - 1) for i in layers]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        for name, parameter in hf.named_parameters():
            # Only self-supervised pre-training masks tokens.
            parameter.requires_grad_(not name.endswith("mask_token"))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images.

        Args:
            images: ``[n, 3, h, w]`` in ``[0, 1]``; sizes that the patches do not divide are stretched up to the next that
                they do, so that each map still covers exactly the picture.

        Returns:
            One map ``[n, channels, h / stride, w / stride]`` per layer.
        """
        x = (images - self.mean) / self.std
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
            return [
                norm(f)[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(-1, grid) for f in features
            ]  # fmt: skip

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


def build_backbone(config: BackboneConfig, saved: dict | None = None) -> Backbone:
    """Build a backbone, with its weights unless they are random or come from a checkpoint.

    Args:
        config: which one.
        saved: what ``describe_backbone`` gave when a run was saved: builds the same architecture without asking for
            the original's files; the checkpoint brings the weights.
    """
    if saved is not None:
        architecture = AutoConfig.for_model(**saved["architecture"])
        return Backbone(_instantiate(architecture), config.layers, tuple(saved["mean"]), tuple(saved["std"]))
    known = known_architecture(config.name)
    if config.weights == "random" and known is not None:
        return Backbone(_instantiate(known), config.layers, IMAGENET_MEAN, IMAGENET_STD)
    source, local = resolve_source(config.name)
    local = local or config.local_files_only
    try:
        architecture = AutoConfig.from_pretrained(source, local_files_only=local)
        _check_family(architecture, config.name)
        if config.weights == "random":
            hf = _instantiate(architecture)
        else:
            hf = AutoModel.from_pretrained(source, config=architecture, local_files_only=local, dtype=torch.float32,
                                           use_safetensors=True, **_arguments(architecture))  # fmt: skip
    except OSError as error:
        raise UserError(_explain_missing(config.name, error)) from error
    mean, std, found = _read_normalisation(source, local)
    backbone = Backbone(hf, config.layers, mean, std)
    if not found and architecture.model_type == "vit" and config.weights == "pretrained":
        # The other families are all trained on ImageNet's constants; plain ViTs are not.
        backbone.note = (f"{config.name} has no preprocessor_config.json here: ImageNet's mean and deviation are assumed. "
                         "If it was trained with others, add the file to its folder.")  # fmt: skip
    return backbone


def describe_backbone(backbone: Backbone) -> dict:
    """Return what ``build_backbone(saved=…)`` needs, as plain JSON."""
    architecture = json.loads(backbone.hf.config.to_json_string(use_diff=True))
    architecture = {
        k: v for k, v in architecture.items() if k not in ("dtype", "transformers_version", "architectures")
    }
    return {
        "architecture": architecture,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
    }


def resolve_source(name: str) -> tuple[str, bool]:
    """Return what transformers should load for a name, and whether it lies on this disk."""
    if name.startswith("embedded/"):
        folder = EMBEDDED / name.removeprefix("embedded/")
        names = sorted(f"embedded/{p.name}" for p in EMBEDDED.iterdir() if (p / "config.json").is_file())
        if not (folder / "config.json").is_file():
            raise UserError(f"model.backbone.name={name} is not one of {', '.join(names)}{nearest(name, names)}")
        return str(folder), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.backbone.name={name}: the folder has no config.json; expected a Hugging Face model."
            )
        return str(path), True
    if name.startswith((".", "/", "~")):
        raise UserError(f"model.backbone.name={name}: there is no such folder.")
    return name, False


def _arguments(architecture: PreTrainedConfig) -> dict:
    return {"add_pooling_layer": False} if architecture.model_type == "vit" else {}


def _instantiate(architecture: PreTrainedConfig) -> nn.Module:
    return AutoModel.from_config(architecture, dtype=torch.float32, **_arguments(architecture))


def _check_family(architecture: PreTrainedConfig, name: str) -> None:
    if architecture.model_type not in FAMILIES:
        raise UserError(f"model.backbone.name={name} is a '{architecture.model_type}'; "
                        f"supported are {', '.join(FAMILIES)}.")  # fmt: skip


def _read_normalisation(source: str, local: bool) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Read mean and deviation that the weights were trained with, else ImageNet's; and whether they were found."""
    try:
        path = cached_file(source, "preprocessor_config.json", local_files_only=local,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)  # fmt: skip
    except OSError:
        path = None
    saved = json.loads(Path(path).read_text()) if path else {}
    return (
        tuple(saved.get("image_mean", IMAGENET_MEAN)),
        tuple(saved.get("image_std", IMAGENET_STD)),
        "image_mean" in saved,
    )


def _explain_missing(name: str, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0]
    kind = "convnext" if "convnext" in name.lower() else "vit"
    others = [n for n in ALTERNATIVES[kind] if n != name]
    lines = [
        f"model.backbone.name={name} cannot be loaded: {reason}",
        "Without a licence gate, from the hub: " + " or ".join(f"model.backbone.name={n}" for n in others),
        f"Without a network: model.backbone.name=embedded/{kind}_tiny, or model.backbone.name=<folder with config.json "
        "and model.safetensors>, or model.backbone.weights=random with a name whose config.json can be had.",
    ]
    if "gated" in reason.lower() or "dinov3" in name:
        lines.append(f"'{name}' is behind a licence gate: accept it on its page on the hub, then run 'hf auth login'.")
    return "\n".join(lines)

"""The model as everything else sees it: uint8 frames in, one logit map per frame out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracknet.errors import UserError
from tracknet.models.backbone import Backbone, BackboneConfig, Base
from tracknet.models.convnext_fpn_heatmap import ConvNextFpnHead
from tracknet.models.decoder import DecoderConfig
from tracknet.models.pretrained import build_backbone
from tracknet.models.tracknet_v2 import TrackNetV2
from tracknet.models.vit_heatmap import VitHead
from tracknet.models.wasb_hrnet import WasbHrnet
from tracknet.models.window_rng import WindowRng

MODELS: dict[str, Any] = {"vit_heatmap": VitHead, "convnext_fpn_heatmap": ConvNextFpnHead}
# The field's baselines, which have no pretrained backbone.
BASELINES = {"tracknet_v2": TrackNetV2, "wasb_hrnet": WasbHrnet}


@dataclass
class ModelConfig:
    """Which network, on which backbone."""

    name: Literal["vit_heatmap", "convnext_fpn_heatmap", "tracknet_v2", "wasb_hrnet"] = "vit_heatmap"
    """Architecture."""
    backbone: BackboneConfig | None = field(default_factory=BackboneConfig)
    """The pretrained encoder; ``null`` for ``tracknet_v2`` and ``wasb_hrnet``, which have none."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The part that is always trained and never quantized."""
    events: bool = False
    """Find hits and bounces too, by a second head; needs labels that say them (the ``status`` column)."""

    def __post_init__(self) -> None:
        if (self.name in BASELINES) != (self.backbone is None):
            raise UserError(
                f"model.name={self.name} {'needs' if self.backbone is None else 'has no'} backbone: "
                f"{'set model.backbone.name' if self.backbone is None else 'set model.backbone=null'}."
            )
        if self.events and self.backbone is None:
            raise UserError(
                f"model.events=true needs our decoder, and model.name={self.name} is a baseline without it."
            )


class HeatmapModel(nn.Module):
    """Backbone and head with their arithmetic.

    Attributes:
        backbone: the pretrained encoder, or ``None``.
        head: the trained rest.
        compute_dtype: dtype of matrix products under autocast; ``float32`` switches autocast off.
        rng: source of what is drawn by window; the training step sets its scope.
        config: the configuration of the run that it was loaded from, for people and for ``switch``.
    """

    config: Any = None
    backbone: Backbone | None

    def __init__(self, backbone: Backbone | None, head: nn.Module, num_frames: int):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_frames = num_frames
        self.rng = WindowRng()
        self.compute_dtype = torch.float32
        self.has_events = False

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the backbone from the first to the last; none of a model without one."""
        return self.backbone.family.blocks(self.backbone.hf) if self.backbone is not None else []

    @property
    def base(self) -> Base | None:
        """Weights that the backbone came from, if others can have them too; ``None`` of a model without one."""
        return self.backbone.base if self.backbone is not None else None

    def forward(
        self, frames: Tensor, events: bool = False, features: list[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Score every cell of every frame.

        Args:
            frames: uint8 RGB ``[batch, frame, 3, h, w]``, on any device; h and w multiples of 8.
            events: return hits and bounces too, of a model that ``has_events``.
            features: what the backbone makes of these frames, where that is known already.

        Returns:
            float32 logits ``[batch, frame, h / s, w / s]``, s = 2, of the baselines 1; with ``events`` also ``[batch,
            frame, 2]``, hit and bounce.

        Raises:
            UserError: the frames are of another dtype or shape, which would be scored as other pictures.
        """
        check_frames(frames, self.num_frames)
        frames = frames.to(next(self.parameters()).device)
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(frames.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled):
            if self.backbone is None:
                return self.head(frames.float() / 255).float()
            # Each converts the frames for itself: a float copy of them would live as long as the longest of its
            # readers.
            out = self.head(frames, self.backbone(frames.flatten(0, 1)) if features is None else features)
            logits, found = out if self.has_events else (out, None)
            return (logits.float(), found.float()) if events and found is not None else logits.float()


def check_frames(frames: Tensor, num_frames: int) -> None:
    """Refuse frames that the model was not trained on: it would find other balls in them, or none, without a word."""
    wanted = f"uint8 frames [batch, {num_frames}, 3, height, width]"
    if frames.dtype != torch.uint8:
        remedy = (
            "frames.mul(255).round().to(torch.uint8) for values from 0 to 1"
            if frames.is_floating_point()
            else "frames.to(torch.uint8)"
        )
        raise UserError(f"The model takes {wanted}, and these are {frames.dtype}: give {remedy}.")
    if frames.ndim == 4 and num_frames > 0 and frames.shape[1] == 3:
        raise UserError(
            f"The model takes {wanted}, and these are {list(frames.shape)}: a batch of one window is frames[None]."
        )
    if frames.ndim != 5:
        raise UserError(f"The model takes {wanted}, and these are {list(frames.shape)}.")
    if frames.shape[2] != 3:
        last = " channels come before height and width: frames.permute(0, 1, 4, 2, 3)." if frames.shape[-1] == 3 else ""
        raise UserError(f"The model takes {wanted}, and these are {list(frames.shape)}.{last}")
    if frames.shape[1] != num_frames:
        raise UserError(
            f"The model takes {wanted}, and these are {list(frames.shape)}: it was trained on windows of {num_frames}"
            " frames (data.sequence.length)."
        )


def build_model(
    config: ModelConfig, num_frames: int, saved: dict | None = None, max_parameters: int | None = None
) -> HeatmapModel:
    """Build a model at full precision; ``quantization.apply`` changes it from there.

    Args:
        config: which one.
        num_frames: frames per window.
        saved: architecture of the backbone as saved with a run.
        max_parameters: of what a run's file brings, as many as it can hold.

    Raises:
        UserError: the backbone cannot be had or does not fit the model, or there are more parameters.
    """
    if config.backbone is None:
        head = _build_head(partial(BASELINES[config.name], num_frames), config, num_frames, max_parameters)
        return HeatmapModel(None, head, num_frames)
    backbone = build_backbone(config.backbone, saved, max_parameters)
    kind = MODELS[config.name]
    if backbone.family.kind != kind.kind:
        fits = next(name for name, h in MODELS.items() if getattr(h, "kind", None) == backbone.family.kind)
        raise UserError(
            f"model.name={config.name} does not fit model.backbone.name={config.backbone.name} "
            f"(a {backbone.hf.config.model_type}); use --model {fits}."
        )
    if config.backbone.freeze:
        backbone.hf.requires_grad_(False)
    build = partial(kind, backbone, num_frames, config.decoder, config.events)
    model = HeatmapModel(backbone, _build_head(build, config, num_frames, max_parameters), num_frames)
    model.has_events = config.events
    return model


def _build_head(
    build: Callable[[], nn.Module], config: ModelConfig, num_frames: int, max_parameters: int | None
) -> nn.Module:
    """Build a head; first without memory where a run's file says how many parameters there can be."""
    if max_parameters is not None:
        with torch.device("meta"):
            size = sum(p.numel() for p in build().parameters())
        if size > max_parameters:
            raise UserError(
                f"model.name={config.name}, model.decoder.channels={config.decoder.channels} and data.sequence.length="
                f"{num_frames} make {size:,} parameters, and the run's model.safetensors can hold {max_parameters:,} "
                "at most: they are not of one run."
            )
    return build()

"""Complete model: uint8 frames in, one map of logits per frame out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
from tracknet.registry import Registry

# Heads by name. The ``kind`` of a head is that of the backbone families that it decodes. The published baselines have
# no backbone, and their kind is ``None``.
MODELS: Registry[Any] = Registry("model.name")
MODELS.register("vit_heatmap", VitHead)
MODELS.register("convnext_fpn_heatmap", ConvNextFpnHead)
MODELS.register("tracknet_v2", TrackNetV2)
MODELS.register("wasb_hrnet", WasbHrnet)


@dataclass
class ModelConfig:
    """Network and its backbone."""

    name: str = field(default="vit_heatmap", metadata={"choices": lambda: list(MODELS)})
    """Architecture of the network."""
    backbone: BackboneConfig | None = field(default_factory=BackboneConfig)
    """Pretrained encoder; ``null`` for ``tracknet_v2`` and ``wasb_hrnet``, which have none."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Decoder, which is always trained and never quantized."""
    events: bool = False
    """Predict hits and bounces too, with a second head; requires labels with events (the ``status`` column)."""

    def __post_init__(self) -> None:
        # Heads with a kind decode a backbone; baselines, whose kind is None, must not have one.
        if (MODELS.lookup(self.name).kind is None) != (self.backbone is None):
            raise UserError(
                f"model.name={self.name} {'requires a' if self.backbone is None else 'has no'} backbone: "
                f"{'set model.backbone.name' if self.backbone is None else 'set model.backbone=null'}."
            )
        if self.events and self.backbone is None:
            raise UserError(
                f"model.events=true requires a model with a backbone, but model.name={self.name} is a baseline without"
                " one: set model.events=false."
            )


class HeatmapModel(nn.Module):
    """Backbone and head, computed in a configurable precision.

    Args:
        backbone: pretrained encoder, or ``None``.
        head: head that fits the backbone; without one, a network that maps frames to logits.
        num_frames: frames per window.

    Attributes:
        compute_dtype: dtype of matrix products under autocast; ``float32`` disables autocast.
        rng: source of random numbers by window; the training step sets its scope.
        has_events: whether the head predicts hits and bounces too.
        config: configuration of the run that the model was loaded from, for users and for ``swap_adapter``.
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
        """Blocks of the backbone, from the first to the last; empty without a backbone."""
        return self.backbone.family.blocks(self.backbone.hf) if self.backbone is not None else []

    @property
    def base(self) -> Base | None:
        """Published weights that the backbone was loaded from; ``None`` without such weights or without a backbone."""
        return self.backbone.base if self.backbone is not None else None

    def forward(
        self, frames: Tensor, events: bool = False, features: list[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute heatmap logits of every frame.

        Args:
            frames: uint8 RGB ``[batch, frame, 3, h, w]``, on any device; h and w multiples of 8.
            events: whether to return logits of hits and bounces too; requires ``has_events``.
            features: output of the backbone for these frames, if it is available; the backbone is then not run.

        Returns:
            fp32 heatmap logits ``[batch, frame, h / s, w / s]`` with s = 2, or s = 1 for the baselines; with ``events``
            also fp32 logits of hit and bounce, ``[batch, frame, 2]``.

        Raises:
            UserError: if the frames have another dtype or shape, with which the detections would be wrong.
        """
        check_frames(frames, self.num_frames)
        # Frames are moved as uint8, a quarter of the bytes of fp32.
        frames = frames.to(next(self.parameters()).device)
        with self._autocast(frames.device.type):
            if self.backbone is None:
                return self.head(frames.float() / 255).float()
            # Backbone and head convert the frames separately: a shared float copy would stay in memory until the last
            # of them has read it.
            out = self.head(frames, self.backbone(frames.flatten(0, 1)) if features is None else features)
            logits, event_logits = out if self.has_events else (out, None)
            return (logits.float(), event_logits.float()) if events and event_logits is not None else logits.float()

    def encode(self, frames: Tensor) -> list[Tensor]:
        """Compute the features of single frames, for the argument ``features`` of forward.

        Args:
            frames: uint8 RGB ``[n, 3, h, w]`` on the model's device.

        Returns:
            One map ``[n, c, h / stride, w / stride]`` per layer of the backbone.
        """
        assert self.backbone is not None, "only a model with a backbone has features"
        with self._autocast(frames.device.type):
            return self.backbone(frames)

    def _autocast(self, device_type: str) -> torch.autocast:
        """Return the context in which the model computes."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(device_type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def check_frames(frames: Tensor, num_frames: int) -> None:
    """Raise an error for frames whose format the model was not trained on.

    The model would accept some of them, and return wrong detections, or none, without a message.

    Args:
        frames: frames of any dtype and shape.
        num_frames: frames per window of the model.

    Raises:
        UserError: if the frames are not uint8 ``[batch, num_frames, 3, h, w]``; the message contains a remedy.
    """
    expected = f"uint8 frames [batch, {num_frames}, 3, height, width]"
    if frames.dtype != torch.uint8:
        remedy = (
            "frames.mul(255).round().to(torch.uint8) for values from 0 to 1"
            if frames.is_floating_point()
            else "frames.to(torch.uint8)"
        )
        raise UserError(f"The model expects {expected}, but got {frames.dtype}: use {remedy}.")
    if frames.ndim == 4 and num_frames > 0 and frames.shape[1] == 3:
        raise UserError(
            f"The model expects {expected}, but got {list(frames.shape)}: use frames[None] for a batch of one window."
        )
    if frames.ndim != 5:
        raise UserError(f"The model expects {expected}, but got {list(frames.shape)}.")
    if frames.shape[2] != 3:
        hint = " Put the channels first: use frames.permute(0, 1, 4, 2, 3)." if frames.shape[-1] == 3 else ""
        raise UserError(f"The model expects {expected}, but got {list(frames.shape)}.{hint}")
    if frames.shape[1] != num_frames:
        raise UserError(
            f"The model expects {expected}, but got {list(frames.shape)}: it was trained on windows of {num_frames}"
            " frames (data.sequence.length)."
        )


def build_model(
    config: ModelConfig, num_frames: int, saved: dict | None = None, max_parameters: int | None = None
) -> HeatmapModel:
    """Build a model at full precision, to which ``quantization.apply`` applies a mode.

    Args:
        config: model configuration.
        num_frames: frames per window.
        saved: description of the backbone as saved with a run, see ``build_backbone``.
        max_parameters: largest number of parameters, for backbone and head each, that the run's file can hold;
            ``None`` for a new model.

    Raises:
        UserError: if the backbone cannot be loaded or does not fit the head, or if there are more parameters than
            ``max_parameters``.
    """
    if config.backbone is None:
        head = _build_head(partial(MODELS[config.name], num_frames), config, num_frames, max_parameters)
        return HeatmapModel(None, head, num_frames)
    # The head must decode the kind of maps that the backbone's family provides.
    backbone = build_backbone(config.backbone, saved, max_parameters)
    head_class = MODELS[config.name]
    if backbone.family.kind != head_class.kind:
        matching = next(name for name, head in MODELS.items() if head.kind == backbone.family.kind)
        raise UserError(
            f"model.name={config.name} does not fit model.backbone.name={config.backbone.name} "
            f"(a {backbone.hf.config.model_type}); use --model {matching}."
        )
    if config.backbone.freeze:
        backbone.hf.requires_grad_(False)
    build = partial(head_class, backbone, num_frames, config.decoder, config.events)
    model = HeatmapModel(backbone, _build_head(build, config, num_frames, max_parameters), num_frames)
    model.has_events = config.events
    return model


def _build_head(
    build: Callable[[], nn.Module], config: ModelConfig, num_frames: int, max_parameters: int | None
) -> nn.Module:
    """Build a head, after a check of its size if a run's file limits the number of parameters."""
    # The settings of a run are untrusted and may ask for more memory than the machine has: count on the meta device,
    # which allocates none.
    if max_parameters is not None:
        with torch.device("meta"):
            size = sum(p.numel() for p in build().parameters())
        if size > max_parameters:
            raise UserError(
                f"model.name={config.name}, model.decoder.channels={config.decoder.channels} and data.sequence.length="
                f"{num_frames} require {size:,} parameters, and the run's model.safetensors can hold {max_parameters:,}"
                " at most: configuration and weights are not from the same run."
            )
    return build()

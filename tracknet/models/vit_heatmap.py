"""A ViT on each frame, its maps joined to the detail branch at stride 8."""

from __future__ import annotations

from torch import Tensor, nn

from tracknet.models.backbone import Backbone
from tracknet.models.decoder import Decoder, DecoderConfig, FrameFusion


class VitHead(nn.Module):
    """Decoder for backbones whose maps all have one stride."""

    kind = "vit"

    def __init__(self, backbone: Backbone, num_frames: int, config: DecoderConfig, events: bool = False):
        super().__init__()
        self.fusion = FrameFusion(backbone.channels, num_frames, config.channels)
        self.decoder = Decoder(num_frames, config, joins=(8,), events=events)

    def forward(self, frames: Tensor, maps: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Map uint8 frames ``[batch, frame, 3, h, w]`` and backbone maps to logits ``[batch, frame, h / 2, w / 2]`` and
        perhaps events."""
        return self.decoder(frames, {8: self.fusion(maps)})

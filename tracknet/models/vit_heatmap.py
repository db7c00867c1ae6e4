"""Heatmap head for ViT backbones, whose maps join the detail branch at stride 8."""

from __future__ import annotations

from torch import Tensor, nn

from tracknet.models.backbone import Backbone
from tracknet.models.decoder import Decoder, DecoderConfig, FrameFusion


class VitHead(nn.Module):
    """Frame fusion and decoder for backbones whose maps all have the same stride.

    Args:
        backbone: backbone that encodes each frame.
        num_frames: frames per window.
        config: decoder settings.
        events: whether to predict hits and bounces too.
    """

    kind = "vit"

    def __init__(self, backbone: Backbone, num_frames: int, config: DecoderConfig, events: bool = False):
        super().__init__()
        self.fusion = FrameFusion(backbone.channels, num_frames, config.channels)
        self.decoder = Decoder(num_frames, config, joins=(8,), events=events)

    def forward(self, frames: Tensor, maps: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Decode a window; see ``Decoder.forward`` for frames and result.

        Args:
            frames: uint8 ``[batch, frame, 3, h, w]``.
            maps: backbone maps ``[batch * frame, c_i, h_i, w_i]``, all of one size.
        """
        return self.decoder(frames, {8: self.fusion(maps)})

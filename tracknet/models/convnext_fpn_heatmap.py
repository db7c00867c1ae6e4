"""A ConvNeXt on each frame, its stages merged top-down (FPN, CVPR 2017) and joined at strides 8 and 4."""

from __future__ import annotations

from torch import Tensor, nn

from tracknet.errors import UserError
from tracknet.models.backbone import Backbone
from tracknet.models.decoder import Decoder, DecoderConfig, FrameFusion, resize_maps


class ConvNextFpnHead(nn.Module):
    """Decoder for backbones with one map per stride."""

    kind = "convnext"

    def __init__(self, backbone: Backbone, num_frames: int, config: DecoderConfig, events: bool = False):
        super().__init__()
        if not {4, 8} <= set(backbone.strides):
            raise UserError(
                f"model.backbone.layers={backbone.layers}: convnext_fpn_heatmap needs stages 1 and 2 (strides 4 and 8)."
            )
        self.strides = backbone.strides
        self.lateral = nn.ModuleList(nn.Conv2d(c, config.channels, 1) for c in backbone.channels)
        self.fusion4 = FrameFusion([config.channels], num_frames, config.channels)
        self.fusion8 = FrameFusion([config.channels], num_frames, config.channels)
        self.decoder = Decoder(num_frames, config, joins=(8, 4), events=events)

    def forward(self, frames: Tensor, maps: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Map uint8 frames ``[batch, frame, 3, h, w]`` and backbone maps to logits ``[batch, frame, h / 2, w / 2]`` and
        perhaps events."""
        merged: dict[int, Tensor] = {}
        above: Tensor | None = None
        for stride, lateral, x in reversed(list(zip(self.strides, self.lateral, maps))):
            x = lateral(x)
            if above is not None:
                x = x + resize_maps(above, tuple(x.shape[-2:]))
            merged[stride] = above = x
        return self.decoder(frames, {4: self.fusion4([merged[4]]), 8: self.fusion8([merged[8]])})

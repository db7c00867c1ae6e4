"""Heatmap head for ConvNeXt backbones: stages merged top-down (FPN, CVPR 2017), joined at strides 8 and 4."""

from __future__ import annotations

from torch import Tensor, nn

from tracknet.errors import UserError
from tracknet.models.backbone import Backbone
from tracknet.models.decoder import Decoder, DecoderConfig, FrameFusion, resize_maps


class ConvNextFpnHead(nn.Module):
    """Feature pyramid and decoder for backbones with one map per stride.

    Args:
        backbone: backbone that encodes each frame; its layers must include strides 4 and 8.
        num_frames: frames per window.
        config: decoder settings.
        events: whether to predict hits and bounces too.

    Raises:
        UserError: if the selected layers lack stride 4 or 8.
    """

    kind = "hierarchical"

    def __init__(self, backbone: Backbone, num_frames: int, config: DecoderConfig, events: bool = False):
        super().__init__()
        if not {4, 8} <= set(backbone.strides):
            raise UserError(
                f"model.backbone.layers={backbone.layers}: convnext_fpn_heatmap requires stages 1 and 2 (strides 4 and"
                " 8)."
            )
        self.strides = backbone.strides
        self.lateral = nn.ModuleList(nn.Conv2d(c, config.channels, 1) for c in backbone.channels)
        self.fusion4 = FrameFusion([config.channels], num_frames, config.channels)
        self.fusion8 = FrameFusion([config.channels], num_frames, config.channels)
        self.decoder = Decoder(num_frames, config, joins=(8, 4), events=events)

    def forward(self, frames: Tensor, maps: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Decode a window; see ``Decoder.forward`` for frames and result.

        Args:
            frames: uint8 ``[batch, frame, 3, h, w]``.
            maps: backbone maps ``[batch * frame, c_i, h_i, w_i]``, from the finest to the coarsest.
        """
        # Top-down pathway, from the coarsest to the finest map: add the upsampled sum of all coarser maps.
        merged: dict[int, Tensor] = {}
        coarser: Tensor | None = None
        for stride, lateral, x in reversed(list(zip(self.strides, self.lateral, maps))):
            x = lateral(x)
            if coarser is not None:
                x = x + resize_maps(coarser, tuple(x.shape[-2:]))
            merged[stride] = coarser = x
        return self.decoder(frames, {4: self.fusion4([merged[4]]), 8: self.fusion8([merged[8]])})

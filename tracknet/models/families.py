"""Layouts of the transformers model families that can serve as a backbone.

Everything that differs between families is here: where the layers are, how wide and how coarse their maps are, and how
to turn a layer's output into a map. A new family is a subclass of ``VitFamily`` or ``HierarchicalFamily`` (or of
``BackboneFamily``) and one call of ``FAMILIES.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tracknet.models.position_embedding import interpolate_by_product_
from tracknet.registry import Registry

Kind = Literal["vit", "hierarchical"]


class BackboneFamily(ABC):
    """Layout of a transformers model type.

    Attributes:
        kind: which head fits: ``vit`` (all maps have one stride) or ``hierarchical`` (one map per stride).
        init_kwargs: further arguments of ``AutoModel.from_config`` and ``from_pretrained``.
        forward_kwargs: further arguments of the model's forward.
    """

    kind: ClassVar[Kind]
    init_kwargs: dict[str, Any]
    forward_kwargs: dict[str, Any]

    def __init__(self, init_kwargs: dict[str, Any] | None = None, forward_kwargs: dict[str, Any] | None = None):
        self.init_kwargs, self.forward_kwargs = init_kwargs or {}, forward_kwargs or {}

    @abstractmethod
    def layers(self, hf: Any) -> list[nn.Module]:
        """Return the modules that ``model.backbone.layers`` counts: blocks of a ViT, stages of a hierarchy."""

    @abstractmethod
    def blocks(self, hf: Any) -> list[nn.Module]:
        """Return the residual blocks from the first to the last: the units of checkpointing and weight streaming."""

    @abstractmethod
    def default_layers(self, depth: int) -> list[int]:
        """Return the layers whose maps are used unless configured, counted from 1."""

    @abstractmethod
    def channels(self, config: Any) -> list[int]:
        """Return the channels of each layer's map, from the transformers configuration."""

    @abstractmethod
    def strides(self, config: Any) -> list[int]:
        """Return the input pixels per cell of each layer's map."""

    def size_multiple(self, config: Any) -> int:
        """Return the number of pixels that divides height and width of the input; others are stretched up to it."""
        return self.strides(config)[-1]

    def prepare(self, hf: Any) -> None:  # noqa: B027 (optional)
        """Change modules of the transformers model for speed, in place; results stay the same except for rounding."""

    def feature_map(self, hf: Any, output: Any, grid_hw: tuple[int, int]) -> Tensor:
        """Turn the output of a layer into its map.

        Args:
            hf: the transformers model.
            output: output of the layer's forward: a tensor, or a tuple that begins with it.
            grid_hw: height and width of the map.

        Returns:
            ``[n, channels, h, w]``.
        """
        return output[0] if isinstance(output, tuple) else output


class VitFamily(BackboneFamily):
    """A column of equal blocks over one grid of patches (Dosovitskiy et al., ICLR 2021).

    Args:
        path: name of the module list that holds the blocks.
        norm: name of the last norm, which every map passes.
        antialias: whether it filters when it makes a learned position embedding smaller; ``None`` without such an
            embedding.
        kwargs: see ``BackboneFamily``.
    """

    kind = "vit"

    def __init__(self, path: str, norm: str, antialias: bool | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.path, self.norm, self.antialias = path, norm, antialias

    def prepare(self, hf: Any) -> None:
        if self.antialias is not None:
            interpolate_by_product_(hf.embeddings, hf.config.patch_size, self.antialias)

    def layers(self, hf: Any) -> list[nn.Module]:
        return list(hf.get_submodule(self.path))

    def blocks(self, hf: Any) -> list[nn.Module]:
        return self.layers(hf)

    def default_layers(self, depth: int) -> list[int]:
        return [depth // 2, depth]

    def channels(self, config: Any) -> list[int]:
        return [config.hidden_size] * config.num_hidden_layers

    def strides(self, config: Any) -> list[int]:
        return [config.patch_size] * config.num_hidden_layers

    def feature_map(self, hf: Any, output: Any, grid_hw: tuple[int, int]) -> Tensor:
        tokens = hf.get_submodule(self.norm)(super().feature_map(hf, output, grid_hw))
        # Class and register tokens come first; the patches are the rest.
        h, w = grid_hw
        return tokens[:, -h * w :].transpose(1, 2).unflatten(-1, grid_hw)


class HierarchicalFamily(BackboneFamily):
    """Stages of decreasing resolution, strides 4, 8, 16 and 32 (ConvNeXt: Liu et al., CVPR 2022).

    Args:
        path: name of the module list that holds the stages.
        stage_blocks: name of the module list inside a stage that holds its blocks.
        kwargs: see ``BackboneFamily``.
    """

    kind = "hierarchical"

    def __init__(self, path: str, stage_blocks: str = "layers", **kwargs: Any):
        super().__init__(**kwargs)
        self.path, self.stage_blocks = path, stage_blocks

    def layers(self, hf: Any) -> list[nn.Module]:
        return list(hf.get_submodule(self.path))

    def blocks(self, hf: Any) -> list[nn.Module]:
        return [block for stage in self.layers(hf) for block in stage.get_submodule(self.stage_blocks).children()]

    def default_layers(self, depth: int) -> list[int]:
        return list(range(1, depth + 1))

    def channels(self, config: Any) -> list[int]:
        return list(config.hidden_sizes)

    def strides(self, config: Any) -> list[int]:
        return [4 * 2**i for i in range(len(self.channels(config)))]

    def size_multiple(self, config: Any) -> int:
        return 32  # strided convolutions would crop other sizes at the last stage


FAMILIES: Registry[BackboneFamily] = Registry("model_type")
# ViT interpolates its position embedding only if asked to; its pooler is never used.
FAMILIES.register(
    "vit",
    VitFamily(
        "layers",
        "layernorm",
        antialias=False,
        init_kwargs={"add_pooling_layer": False},
        forward_kwargs={"interpolate_pos_encoding": True},
    ),
)
FAMILIES.register("dinov2", VitFamily("encoder.layer", "layernorm", antialias=False))
FAMILIES.register("dinov2_with_registers", VitFamily("encoder.layer", "layernorm", antialias=True))
FAMILIES.register("dinov3_vit", VitFamily("model.layer", "norm"))
FAMILIES.register("convnext", HierarchicalFamily("encoder.stages"))
FAMILIES.register("convnextv2", HierarchicalFamily("encoder.stages"))
FAMILIES.register("dinov3_convnext", HierarchicalFamily("model.stages"))

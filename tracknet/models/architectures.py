"""Architectures of well-known backbones, for random initialization and memory planning without the hub."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig


def _dinov2(width: int, depth: int, **extra: object) -> dict:
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "patch_size": 14,
        "image_size": 518,
        **extra,
    }


def _vit(width: int, depth: int) -> dict:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "patch_size": 16,
        "image_size": 224,
    }


def _dinov3(width: int, depth: int, heads: int, mlp_width: int, **extra: object) -> dict:
    return {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "patch_size": 16,
        "num_register_tokens": 4,
        **extra,
    }


def _convnext(model_type: str, depths: list[int], widths: list[int]) -> dict:
    return {"model_type": model_type, "depths": depths, "hidden_sizes": widths}


# Blocks and channels of the four stages of ConvNeXt. Small has the widths of tiny; base and large have the depths of
# small.
_TINY_DEPTHS, _SMALL_DEPTHS, _BASE_WIDTHS, _LARGE_WIDTHS = (
    [3, 3, 9, 3],
    [3, 3, 27, 3],
    [128, 256, 512, 1024],
    [192, 384, 768, 1536],
)
_TINY_WIDTHS = [96, 192, 384, 768]

# Arguments of ``AutoConfig.for_model`` by hub id. Fields that are not listed have the defaults of transformers.
ARCHITECTURES: dict[str, dict] = {
    "facebook/dinov2-small": _dinov2(384, 12),
    "facebook/dinov2-base": _dinov2(768, 12),
    "facebook/dinov2-large": _dinov2(1024, 24),
    "facebook/dinov2-giant": _dinov2(1536, 40, use_swiglu_ffn=True),
    "google/vit-base-patch16-224": _vit(768, 12),
    "google/vit-large-patch16-224": _vit(1024, 24),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(384, 12, 6, 1536),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12, 12, 3072),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16, 4096),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(
        4096, 40, 32, 8192, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False
    ),
    "facebook/convnext-tiny-224": _convnext("convnext", _TINY_DEPTHS, _TINY_WIDTHS),
    "facebook/convnext-small-224": _convnext("convnext", _SMALL_DEPTHS, _TINY_WIDTHS),
    "facebook/convnext-base-224": _convnext("convnext", _SMALL_DEPTHS, _BASE_WIDTHS),
    "facebook/convnext-large-224": _convnext("convnext", _SMALL_DEPTHS, _LARGE_WIDTHS),
    "facebook/convnextv2-tiny-22k-224": _convnext("convnextv2", _TINY_DEPTHS, _TINY_WIDTHS),
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": _convnext("dinov3_convnext", _TINY_DEPTHS, _TINY_WIDTHS),
    "facebook/dinov3-convnext-small-pretrain-lvd1689m": _convnext("dinov3_convnext", _SMALL_DEPTHS, _TINY_WIDTHS),
    "facebook/dinov3-convnext-base-pretrain-lvd1689m": _convnext("dinov3_convnext", _SMALL_DEPTHS, _BASE_WIDTHS),
    "facebook/dinov3-convnext-large-pretrain-lvd1689m": _convnext("dinov3_convnext", _SMALL_DEPTHS, _LARGE_WIDTHS),
}


def known_architecture(name: str) -> PreTrainedConfig | None:
    """Return the transformers configuration of a well-known backbone, or ``None`` for any other name."""
    return AutoConfig.for_model(**ARCHITECTURES[name]) if name in ARCHITECTURES else None

"""Count the bytes of the backbone per window in each mode, with the stock layers for comparison.

    python benchmarks/backbone_bytes.py
    python benchmarks/backbone_bytes.py --backbone facebook/dinov2-base --json bytes.json

Counts exactly, on the CPU, with random weights and under bf16 autocast as on a GPU. Prints a table, then one line of
JSON.

weights  stored weights, scales included
update   gradients and optimizer state of the trained weights
kept     tensors that autograd keeps after forward for backward, per window of three frames; in brackets with gradient
         checkpointing
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn

from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.models.backbone import BackboneConfig
from tracknet.models.decoder import DecoderConfig
from tracknet.models.heatmap_model import HeatmapModel, ModelConfig, build_model
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.apply import ModeConfig, QuantizationConfig, apply_mode, quantize_backbone

INT8 = QuantizationConfig(load_in_8bit=True, llm_int8_threshold=0.0)
NF4 = QuantizationConfig(load_in_4bit=True)
LORA = LoraConfig(lora_dropout=0.0)
# By name: the mode, and bytes of gradient and optimizer state per trained value.
MODES = {
    "default (full fine-tuning)": (ModeConfig("bf16"), 12),
    "lora": (ModeConfig("bf16", lora=LORA), 12),
    "int8 (norms and biases train)": (ModeConfig("bf16", INT8, trainable="norms"), 12),
    "int8 + lora": (ModeConfig("bf16", INT8, LORA), 12),
    "int8_full (int8 weights train)": (
        ModeConfig("bf16", QuantizationConfig(load_in_8bit=True, int8_trainable=True, llm_int8_threshold=0.0)),
        6,
    ),
    "qlora (nf4 + lora)": (ModeConfig("bf16", NF4, LORA), 12),
    "qlora, train_last_blocks=4": (ModeConfig("bf16", NF4, LORA, train_last_blocks=4), 12),
}


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone",
        default="facebook/dinov2-small",
        help="name of the backbone, see docs/models.md (default: facebook/dinov2-small)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 288), metavar=("W", "H"), help="frame size (default: 512 288)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as a JSON object")
    args = parser.parse_args()
    size = tuple(args.size)
    rows = {}
    for name, (mode, update) in MODES.items():
        rows[name] = measure(lambda mode=mode: build_mode(args.backbone, mode), size, update)
    rows["stock int8 (Linear8bitLt, biases train)"] = measure(
        lambda: build_stock(args.backbone, stock_int8, False), size, 12
    )
    rows["stock qlora (Linear4bit, peft as it is)"] = measure(
        lambda: build_stock(args.backbone, stock_nf4, True), size, 12
    )
    reference = rows["default (full fine-tuning)"]
    print(
        f"| {args.backbone}, {size[0]}x{size[1]} | weights MB | update MB | kept MB (checkpointing) | share of default"
        " at batch 8 |"
    )
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        share = [total(row, kept) / total(reference, "kept") for kept in ("kept", "kept_checkpointed")]
        print(
            f"| {name} | {row['weights'] / 1e6:.1f} | {row['update'] / 1e6:.1f} | {row['kept'] / 1e6:.0f} "
            f"({row['kept_checkpointed'] / 1e6:.0f}) | {share[0]:.0%} ({share[1]:.0%}) |"
        )
    print(json.dumps(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def total(row: dict[str, int], kept: str, windows: int = 8) -> int:
    """Return the bytes of the backbone for a batch.

    Args:
        row: result of ``measure``.
        kept: ``kept``, or ``kept_checkpointed`` with gradient checkpointing.
        windows: windows in the batch.
    """
    return row["weights"] + row["update"] + row[f"{kept}_once"] + windows * row[kept]


def measure(build, size: tuple[int, int], update: int) -> dict[str, int]:
    """Count the bytes of a model's backbone.

    Args:
        build: function that builds the model.
        size: width and height of the frames in pixels.
        update: bytes of gradient and optimizer state per trained value.

    Returns:
        ``weights`` and ``update`` in bytes; ``kept`` and ``kept_checkpointed``, the bytes kept for backward per window;
        and ``kept_once`` and ``kept_checkpointed_once``, those that do not depend on the number of windows.
    """
    result = {}
    for key, checkpointed in (("kept", False), ("kept_checkpointed", True)):
        model = build().train()
        if checkpointed:
            checkpoint_(model, "blocks")
        live = []
        for windows in (1, 2):
            x = torch.randint(0, 256, (3 * windows, 3, size[1], size[0]), dtype=torch.uint8)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    model.backbone(x)  # stock layers quantize in their first forward
                with LiveBytes([x, *model.parameters(), *model.buffers()]) as meter:
                    maps = model.backbone(x)
                live.append(meter.live)
                del maps
        # Two batch sizes separate bytes per window from bytes per batch: autocast keeps a 16-bit copy of each trained
        # weight, once per batch.
        result |= {key: live[1] - live[0], f"{key}_once": 2 * live[0] - live[1]}
    # Weights are counted by storage, because parameters can share one.
    hf = model.backbone.hf
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*hf.parameters(), *hf.buffers()]}
    trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
    return {"weights": sum(stored.values()), "update": trained * update, **result}


def build_mode(backbone: str, mode: ModeConfig) -> HeatmapModel:
    """Build a model with random weights in a mode of this package."""
    model = build_plain(backbone)
    apply_mode(model, mode, torch.device("cpu"))
    return model


def build_plain(backbone: str) -> HeatmapModel:
    """Build a full-precision model with random weights."""
    torch.manual_seed(0)
    config = BackboneConfig(backbone, weights="random")
    kind = "convnext_fpn_heatmap" if "convnext" in backbone else "vit_heatmap"
    return build_model(ModelConfig(kind, config, DecoderConfig()), 3)


def build_stock(backbone: str, replace, adapters: bool) -> HeatmapModel:
    """Build a model with the layers of bitsandbytes and peft, as in their guides.

    Args:
        backbone: name of the backbone.
        replace: function that returns the quantized layer of a linear layer.
        adapters: whether to freeze all weights and add LoRA adapters; otherwise one-dimensional parameters train.
    """
    model = build_plain(backbone)
    hf = model.backbone.hf
    # Remove the cast after norms, which this package adds and the stock models do not have.
    for module in hf.modules():
        module._forward_hooks.clear()
    for p in hf.parameters():
        p.requires_grad_(not adapters and p.numel() == max(p.shape))
    quantize_backbone(hf, replace, [])
    if adapters:
        targets = [n for n, m in hf.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
        inject_adapter_in_model(PeftConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets), hf)
    return model


class Flat(nn.Module):
    """Wrapper that flattens the input of the stock int8 layer, which accepts 2-D inputs only.

    Args:
        layer: layer to wrap.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to an input of shape ``[..., in_features]``."""
        return self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def stock_int8(linear: nn.Linear) -> nn.Module:
    """Return the int8 layer of bitsandbytes with the weights of a linear layer."""
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(linear.state_dict())
    return Flat(layer.to("cpu"))


def stock_nf4(linear: nn.Linear) -> nn.Module:
    """Return the 4-bit layer of bitsandbytes with the weights of a linear layer."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


if __name__ == "__main__":
    main()

"""Bytes that one window costs in each mode of the backbone, counted exactly, with the stock layers beside ours.

    python benchmarks/backbone_bytes.py
    python benchmarks/backbone_bytes.py --backbone facebook/dinov2-base --json bytes.json

Counts on the CPU, at random weights, under bf16 autocast, as on a GPU. `weights`: stored, scales included. `update`:
gradients and optimizer state of what trains. `kept`: what backward holds on to after forward, for each window of three
frames; in brackets with gradient checkpointing. Prints a table, then one JSON line.
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
from tracknet.quantization.apply import ModeConfig, QuantizationConfig, apply_mode, quantize
from tracknet.quantization.lora import LoraConfig

INT8 = QuantizationConfig(load_in_8bit=True, llm_int8_threshold=0.0)
NF4 = QuantizationConfig(load_in_4bit=True)
LORA = LoraConfig(lora_dropout=0.0)
# name: quantization, lora, what else trains, bytes of gradient and optimizer state for each trained value
MODES = {
    "default (full fine-tuning)": (None, None, "auto", 12),
    "lora": (None, LORA, "auto", 12),
    "int8 (norms and biases train)": (INT8, None, "norms", 12),
    "int8 + lora": (INT8, LORA, "auto", 12),
    "int8_full (int8 weights train)": (
        QuantizationConfig(load_in_8bit=True, int8_trainable=True, llm_int8_threshold=0.0),
        None,
        "auto",
        6,
    ),
    "qlora (nf4 + lora)": (NF4, LORA, "auto", 12),
    "qlora, lora.layers=last-4": (NF4, LoraConfig(lora_dropout=0.0, layers="last-4"), "auto", 12),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", default="facebook/dinov2-small", help="a name that tracknet knows, see docs/models.md"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(512, 288), metavar=("W", "H"), help="frame size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    size = tuple(args.size)
    rows = {}
    for name, (quantization, lora, trains, update) in MODES.items():
        rows[name] = measure(lambda q=quantization, lo=lora, t=trains: ours(args.backbone, q, lo, t), size, update)
    rows["stock int8 (Linear8bitLt, biases train)"] = measure(lambda: stock(args.backbone, stock_int8, False), size, 12)
    rows["stock qlora (Linear4bit, peft as it is)"] = measure(lambda: stock(args.backbone, stock_nf4, True), size, 12)
    whole = rows["default (full fine-tuning)"]
    print(
        f"| {args.backbone}, {size[0]}x{size[1]} | weights MB | update MB | kept MB (checkpointing) | of default at"
        " batch 8 |"
    )
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        share = [total(row, kept) / total(whole, "kept") for kept in ("kept", "kept_checkpointed")]
        print(
            f"| {name} | {row['weights'] / 1e6:.1f} | {row['update'] / 1e6:.1f} | {row['kept'] / 1e6:.0f} "
            f"({row['kept_checkpointed'] / 1e6:.0f}) | {share[0]:.0%} ({share[1]:.0%}) |"
        )
    print(json.dumps(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def total(row: dict[str, int], kept: str, windows: int = 8) -> int:
    """Bytes of the backbone for a batch."""
    return row["weights"] + row["update"] + row[f"{kept}_once"] + windows * row[kept]


def measure(build, size: tuple[int, int], update: int) -> dict[str, int]:
    """Count a model's weights, updates and what backward keeps of one window, without and with checkpointing."""
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
        # Autocast also keeps 16-bit copies of the weights that train, once for the batch.
        result |= {key: live[1] - live[0], f"{key}_once": 2 * live[0] - live[1]}
    hf = model.backbone.hf
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*hf.parameters(), *hf.buffers()]}
    trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
    return {"weights": sum(stored.values()), "update": trained * update, **result}


def ours(backbone: str, quantization, lora, trains: str) -> HeatmapModel:
    """Build one of our modes at random weights."""
    model = plain(backbone)
    apply_mode(model, ModeConfig("bf16", quantization, lora, trains), torch.device("cpu"))
    return model


def plain(backbone: str) -> HeatmapModel:
    """Build a full-precision model at random weights."""
    torch.manual_seed(0)
    config = BackboneConfig(backbone, weights="random")
    kind = "convnext_fpn_heatmap" if "convnext" in backbone else "vit_heatmap"
    return build_model(ModelConfig(kind, config, DecoderConfig()), 3)


def stock(backbone: str, replace, adapters: bool) -> HeatmapModel:
    """Build a model of the libraries' own layers, as their guides do."""
    model = plain(backbone)
    hf = model.backbone.hf
    for module in hf.modules():
        module._forward_hooks.clear()  # our cast after norms is not theirs
    for p in hf.parameters():
        p.requires_grad_(not adapters and p.numel() == max(p.shape))
    quantize(hf, replace, [])
    if adapters:
        targets = [n for n, m in hf.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
        inject_adapter_in_model(PeftConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets), hf)
    return model


class Flat(nn.Module):
    """Gives the stock int8 layer the 2-D input that it needs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Flatten, apply, restore."""
        return self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def stock_int8(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' int8 layer."""
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(linear.state_dict())
    return Flat(layer.to("cpu"))


def stock_nf4(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' 4-bit layer."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


if __name__ == "__main__":
    main()

"""Gradients of int8 products in int8, against those in fp32: by kind of layer, and in short training runs.

    python benchmarks/int8_backward.py --backbone facebook/dinov2-small
    python benchmarks/int8_backward.py --backbone facebook/dinov2-small --frames FOLDER --seeds 3 --steps 60

Takes the inputs and output gradients of every int8 layer in one step of a real backbone, on rendered frames or on the
pictures of FOLDER, and on Gaussian noise of the same shape. With --seeds, also trains `vit_tiny_heatmap` (int8_full,
which multiplies both gradients) with and without. Writes benchmarks/results/int8_backward.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.models.heatmap_model import HeatmapModel, build_model
from tracknet.quantization import int8, int8_backward
from tracknet.quantization.apply import apply_mode
from tracknet.training.losses import heatmap_loss

RESULT = Path(__file__).parent / "results/int8_backward.json"
WH = (512, 288)


def read_frames(folder: Path | None, windows: int) -> Tensor:
    """Return uint8 ``[windows, 3, 3, h, w]``: pictures of a folder, or noise without one."""
    if folder is None:
        return torch.randint(0, 256, (windows, 3, 3, WH[1], WH[0]), dtype=torch.uint8)
    files = sorted(folder.glob("*.jpg"))[: 3 * windows]
    images = [cv2.cvtColor(cv2.resize(cv2.imread(str(file)), WH), cv2.COLOR_BGR2RGB) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).reshape(windows, 3, 3, WH[1], WH[0])


def capture(model: HeatmapModel, frames: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the input, the gradient of the output, the codes and the scales of every int8 layer in one step."""
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, int8.Int8Linear)}

    def keep(name: str, _module: object, args: tuple, output: Tensor) -> None:
        inputs[name] = args[0].detach().flatten(0, -2)
        output.register_hook(lambda grad: grads.update({name: grad.flatten(0, -2)}))

    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: keep(name, *args))
    windows = len(frames)
    batch = {
        "frames": frames,
        "xy": torch.tensor([WH[0] / 2, WH[1] / 2]).expand(windows, 3, 2),
        "visible": torch.ones(windows, 3, dtype=torch.bool),
        "weight": torch.ones(windows, 3),
    }
    config = compose("synthetic", "vit_heatmap", "int8")
    heatmap_loss(model.train()(frames), batch, config.training.loss).backward()
    return {name: (inputs[name], grads[name], layer.weight, layer.scale) for name, layer in layers.items()}


def compare(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the cosine of two gradients, and the norm of their difference relative to the wanted one."""
    a, b = got.flatten().double(), wanted.flatten().double()
    return float(a @ b / (a.norm() * b.norm())), float((a - b).norm() / b.norm())


def check_layers(captured: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Return cosine and relative error (the worst layer of each kind) of both gradients, by kind of layer."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, (x, grad, codes, scale) in captured.items():
        kind = name.rsplit(".", 1)[-1]
        weight = codes.float() * (scale / 127)[:, None]
        exact = grad.float() @ weight
        found[kind]["input"].append(compare(int8_backward.input_gradient(grad.float(), codes, scale), exact))
        exact = grad.float().T @ x.float()
        found[kind]["weight"].append(compare(int8_backward.weight_gradient(grad, x), exact))
    return {
        kind: {what: [min(c for c, _ in pairs), max(e for _, e in pairs)] for what, pairs in gradients.items()}
        for kind, gradients in found.items()
    }


def train_losses(seeds: int, steps: int, folder: Path) -> dict[str, list[dict]]:
    """Train with and without int8 gradients; return the validation scores of every seed."""
    runs: dict[str, list[dict]] = {}
    for backward in ("false", "true"):
        for seed in range(seeds):
            overrides = [
                "data.synthetic.games=16",
                f"data.root={folder / 'rallies'}",
                "data.split.train_games=[1,2,3,4,5,6,7,8,9,10,11,12]",
                "data.split.val_games=[13,14]",
                "data.split.test_games=[15,16]",
                "data.augment.crop=[256,144]",
                f"data.cache_dir={folder / 'cache'}",
                "training.batch_size=8",
                f"training.max_steps={steps}",
                "training.scheduler.warmup_epochs=0.1",
                "training.validate_every_epochs=1000",
                "training.optimizer.lr=2e-3",
                "training.optimizer.backbone_lr_scale=0.3",
                "training.optimizer.decoder_lr_scale=1",
                "training.memory_optimization.gradient_checkpointing=none",
                f"training.quantization.int8_backward={backward}",
                f"seed={seed}",
            ]
            config = compose("synthetic", "vit_tiny_heatmap", "int8_full", overrides)
            run = folder / "runs" / f"{backward}-{seed}"
            result = train_run(config, run)
            row = {"seed": seed, "val_f1_strict": result["val_f1_strict"], "losses": read_losses(run)}
            runs.setdefault(backward, []).append(row)
            print(backward, {key: value for key, value in row.items() if key != "losses"}, flush=True)
    return runs


def read_losses(run: Path) -> list[float]:
    """Return the training loss of every step of a run, from its TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.parent.parent / "logs" / run.name))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def main() -> None:
    """Compare gradients and runs, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="facebook/dinov2-small", help="hub id or folder")
    parser.add_argument("--frames", type=Path, help="folder with *.jpg of consecutive frames")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of the training runs (default: none)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training run")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = compose(
        "synthetic", "vit_heatmap", "int8", [f"model.backbone.name={args.backbone}", "training.train_last_blocks=null"]
    )
    model = build_model(config.model, 3)
    apply_mode(model, config.training.mode, torch.device("cpu"))
    captured = capture(model, read_frames(args.frames, 2))
    random = {
        name: (torch.randn_like(x), torch.randn_like(grad), codes, scale)
        for name, (x, grad, codes, scale) in captured.items()
    }
    result: dict = {"real": check_layers(captured), "random": check_layers(random)}
    for source in ("real", "random"):
        print(f"{source}: worst layer of each kind, cosine and relative error")
        for kind, gradients in result[source].items():
            print(f"  {kind:10s} " + "   ".join(f"{what} {c:.5f} {e:.4f}" for what, (c, e) in gradients.items()))
    if args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            result["runs"] = train_losses(args.seeds, args.steps, Path(folder))
        for backward, runs in result["runs"].items():
            ends = [statistics.mean(run["losses"][-10:]) for run in runs]
            scores = " / ".join(f"{run['val_f1_strict']:.3f}" for run in runs)
            print(f"int8_backward={backward}: loss of the last ten steps {ends}, F1 {scores}")
    RESULT.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

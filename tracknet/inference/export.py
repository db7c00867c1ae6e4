"""What can be taken out of a run: a merged model, an adapter, a backbone, an ONNX file."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tracknet.config import Config, save_config
from tracknet.data.clips import WindowDataset
from tracknet.data.splits import read_split
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import read_video
from tracknet.errors import UserError
from tracknet.files import write_json
from tracknet.inference.onnx import FILE, SIDECAR, OnnxModel, Parity, compare, hash_file, write_onnx
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.apply import without_kernel
from tracknet.quantization.merge import merge_
from tracknet.quantization.storage import divide
from tracknet.training.checkpoint import save_checkpoint

MAX_DIFFERENCE = 1e-3  # of a heatmap cell, between ONNX and torch in fp32; what is usual is a hundredth of it


@contextmanager
def new_folder_whole(out: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``out`` when all went well, and leaves nothing behind otherwise."""
    made = [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    try:
        yield work
        work.chmod(0o755)
        for path in work.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            if not out.exists() and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def write_run(
    folder: Path, config: Config, model: HeatmapModel, state: dict, self_contained: bool, **more: str
) -> None:
    """Write a model as a run that can be loaded, scored and published: ``config.yaml`` and ``best/``.

    Args:
        folder: an empty one.
        config: of the run.
        model: its model.
        state: of the checkpoint it comes from; what resuming needs is left out.
        self_contained: with all weights, or with those only that do not come from the base.
        more: further entries of the state.
    """
    # Whoever loads it has a device of their own.
    training = dataclasses.replace(
        config.training,
        self_contained=self_contained,
        device="auto",
        quantization=without_kernel(config.training.quantization),
    )
    config = dataclasses.replace(config, training=training)
    save_config(config, folder / "config.yaml")
    kept = {key: state[key] for key in ("progress", "best") if key in state}
    save_checkpoint(folder / "best", model, divide(model, self_contained), {**kept, **more})


def write_merged(
    folder: Path, config: Config, model: HeatmapModel, state: dict, dtype: Literal["fp32", "bf16"]
) -> None:
    """Write the model with its adapters in its dequantised base: a run of plain weights (the model is merged in place)."""
    merge_(model)
    model.float()
    more = {}
    if dtype == "bf16":
        for parameter in model.parameters():  # the constants that the input is normalised by keep their digits
            parameter.data = parameter.data.to(torch.bfloat16)
        more["stored_as"] = "bf16"
    training = dataclasses.replace(config.training, quantization=None, lora=None, backbone_trains="auto")
    write_run(folder, dataclasses.replace(config, training=training), model, state, self_contained=True, **more)


def write_adapter(folder: Path, config: Config, model: HeatmapModel, state: dict) -> None:
    """Write what was trained alone: adapters and decoder, to be loaded onto the same base.

    Raises:
        UserError: the run's weights have no base that others can have.
    """
    if not divide(model).from_base:
        raise UserError("--format adapter leaves the base out, and this run has none that can be had again: its weights were all "
                        "trained, started at random, or were saved with --self-contained. Use --format merged.")  # fmt: skip
    write_run(folder, config, model, state, self_contained=False)


def write_backbone(folder: Path, model: HeatmapModel) -> None:
    """Write the merged backbone in fp16 as a Hugging Face folder, with the constants that its input is normalised by.

    Raises:
        UserError: the model has no backbone.
    """
    if model.backbone is None:
        raise UserError("--format backbone: this model has no backbone.")
    backbone = merge_(model).backbone
    backbone.hf.to(torch.float16).save_pretrained(folder)
    normalisation = {
        "image_mean": backbone.mean.flatten().tolist(),
        "image_std": backbone.std.flatten().tolist(),
    }
    write_json(folder / "preprocessor_config.json", normalisation)


def write_onnx_checked(folder: Path, config: Config, model: HeatmapModel, checkpoint: Path) -> tuple[Parity, str]:
    """Export to ONNX and compare what onnxruntime makes of it with the merged model in torch.

    Returns:
        The comparison, and what it was made on.

    Raises:
        UserError: the two compute different things.
    """
    merge_(model).float().cpu()
    model.compute_dtype = torch.float32
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, device="auto"))
    input_wh = config.data.preprocess.resize
    write_onnx(model, input_wh, folder / FILE)
    save_config(config, folder / "config.yaml")
    windows, source = example_windows(config)
    parity = compare(model, OnnxModel(folder / FILE, torch.device("cpu")), windows, config.evaluation.threshold)
    if parity.max_heatmap_difference > MAX_DIFFERENCE:
        raise UserError(f"The ONNX model differs from torch by {parity.max_heatmap_difference:.1e} in a heatmap cell, more than "
                        f"{MAX_DIFFERENCE:.0e}: it is not written. Another version of onnx, onnxscript or onnxruntime may do "
                        "better.")  # fmt: skip
    write_json(folder / SIDECAR, {"source_sha256": hash_file(checkpoint / "model.safetensors"), "checkpoint":
               checkpoint.name.removesuffix(".old"), "input": "frames uint8 [batch, "
               f"{model.num_frames}, 3, {input_wh[1]}, {input_wh[0]}]", "output": "logits float32",
               **dataclasses.asdict(parity)})  # fmt: skip
    return parity, source


def example_windows(config: Config, number: int = 16) -> tuple[Tensor, str]:
    """Return windows to compare models on, uint8 ``[n, frame, 3, h, w]``, and where they are from.

    They are the run's own validation windows where its data is at hand, else a rendered rally.
    """
    if not Path(config.data.root).expanduser().is_dir():
        return _rendered_windows(config, number), "a rendered rally (the run's data is not here)"
    dataset = WindowDataset(read_split(config.data, "val"), config.data, training=False)
    picked = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist()
    return torch.stack([dataset[i]["frames"] for i in picked]), "the run's validation clips"


def _rendered_windows(config: Config, number: int) -> Tensor:
    length = config.data.sequence.length
    with tempfile.TemporaryDirectory() as folder:
        settings = SyntheticConfig(frames_per_clip=max(4, number * length), size=tuple(config.data.preprocess.resize))
        write_clip(Path(folder) / "rally", settings, 1, 1)
        frames = torch.stack([torch.from_numpy(image) for _, image in read_video(Path(folder) / "rally" / "clip.mp4")])
    return frames[: number * length].permute(0, 3, 1, 2).unflatten(0, (number, length)).contiguous()

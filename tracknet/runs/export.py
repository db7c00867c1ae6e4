"""What can be taken out of a run: a merged model, an adapter, a backbone, an ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tracknet.config import Config, save_config
from tracknet.data.clips import WindowDataset
from tracknet.data.config import DataConfig
from tracknet.data.splits import read_split
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import read_video
from tracknet.errors import UserError
from tracknet.files import expand_user, hash_file, write_json
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.merge import merge_
from tracknet.quantization.storage import split_state_dict
from tracknet.runs.load import HUB_ID
from tracknet.runs.onnx import FILE, SIDECAR, OnnxModel, Parity, compare, write_onnx
from tracknet.training.checkpoint import save_checkpoint

MAX_DIFFERENCE = 1e-3  # of a heatmap cell, between ONNX and torch in fp32; what is usual is a hundredth of it


def publishable(config: Config) -> Config:
    """Return a run's configuration without what is of this machine alone: paths and its device."""
    plain = DataConfig()
    mix = [replace(other, root=Path(other.root).name or plain.root) for other in config.data.mix]
    data = replace(config.data, root=plain.root, cache_dir=plain.cache_dir, mix=mix)
    training = replace(
        config.training,
        device="auto",
        int8_kernel="auto",
        init_from=config.training.init_from and public_name(config.training.init_from),
    )
    backbone = config.model.backbone and replace(config.model.backbone, name=public_name(config.model.backbone.name))
    return replace(config, data=data, training=training, model=replace(config.model, backbone=backbone))


def public_name(name: str) -> str:
    """Return a hub id or a name of this package as it is, and of a folder its last part."""
    return Path(name).name if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a name of weights means a folder of this machine, rather than a hub id or ``embedded/NAME``."""
    return expand_user(name, "model.backbone.name").exists() or not HUB_ID.fullmatch(name)


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
    config = publishable(config)
    config = replace(config, training=replace(config.training, self_contained=self_contained))
    save_config(config, folder / "config.yaml")
    kept = {key: state[key] for key in ("progress", "best") if key in state}
    with _public_base(model):
        save_checkpoint(folder / "best", model, split_state_dict(model, self_contained), {**kept, **more})


@contextmanager
def _public_base(model: HeatmapModel) -> Iterator[None]:
    """Let a model's base be called by what others can call it."""
    backbone, base = model.backbone, model.base
    if backbone is None or base is None:
        yield
        return
    backbone.base = replace(base, name=public_name(base.name))
    try:
        yield
    finally:
        backbone.base = base


def write_merged(
    folder: Path, config: Config, model: HeatmapModel, state: dict, dtype: Literal["fp32", "bf16"]
) -> None:
    """Write the model with its adapters in its dequantized base: a run of plain weights (the model is merged in
    place)."""
    merge_(model)
    model.float()
    more = {}
    if dtype == "bf16":
        for parameter in model.parameters():  # the constants that the input is normalized by keep their digits
            parameter.data = parameter.data.to(torch.bfloat16)
        more["stored_as"] = "bf16"
    training = replace(config.training, quantization=None, lora=None, trainable="auto")
    write_run(folder, replace(config, training=training), model, state, self_contained=True, **more)


def write_adapter(folder: Path, config: Config, model: HeatmapModel, state: dict) -> None:
    """Write what was trained alone: adapters and decoder, to be loaded onto the same base.

    Raises:
        UserError: the run's weights have no base that others can have.
    """
    if not split_state_dict(model).base_keys:
        raise UserError(
            "--format adapter leaves the base out, and this run has none that can be had again: its weights were all "
            "trained, started at random, or were saved with --self-contained. Use --format merged."
        )
    write_run(folder, config, model, state, self_contained=False)


def write_backbone(folder: Path, model: HeatmapModel) -> None:
    """Write the merged backbone in fp16 as a Hugging Face folder, with the constants that its input is normalized by.

    Raises:
        UserError: the model has no backbone.
    """
    if model.backbone is None:
        raise UserError("--format backbone: this model has no backbone.")
    backbone = model.backbone
    merge_(model)
    backbone.hf.config._name_or_path = ""  # where this machine had it from
    backbone.hf.to(torch.float16).save_pretrained(folder)
    normalization = {
        "image_mean": backbone.mean.flatten().tolist(),
        "image_std": backbone.std.flatten().tolist(),
    }
    write_json(folder / "preprocessor_config.json", normalization)


def write_onnx_checked(folder: Path, config: Config, model: HeatmapModel, checkpoint: Path) -> tuple[Parity, str]:
    """Export to ONNX and compare what onnxruntime makes of it with the merged model in torch.

    Returns:
        The comparison, and what it was made on.

    Raises:
        UserError: the two compute different things.
    """
    merge_(model).float().cpu()
    model.compute_dtype = torch.float32
    input_wh = config.data.preprocess.resize
    write_onnx(model, input_wh, folder / FILE)
    save_config(publishable(config), folder / "config.yaml")
    windows, source = example_windows(config)
    parity = compare(model, OnnxModel(folder / FILE, torch.device("cpu")), windows, config.evaluation.threshold)
    if parity.max_heatmap_difference > MAX_DIFFERENCE:
        raise UserError(
            f"The ONNX model differs from torch by {parity.max_heatmap_difference:.1e} in a heatmap cell, more than "
            f"{MAX_DIFFERENCE:.0e}: it is not written. Another version of onnx, onnxscript or onnxruntime may do "
            "better."
        )
    write_json(
        folder / SIDECAR,
        {
            "source_sha256": hash_file(checkpoint / "model.safetensors"),
            "checkpoint": checkpoint.name.removesuffix(".old"),
            "input": f"frames uint8 [batch, {model.num_frames}, 3, {input_wh[1]}, {input_wh[0]}]",
            "output": "logits float32",
            **asdict(parity),
        },
    )
    return parity, source


def example_windows(config: Config, number: int = 16) -> tuple[Tensor, str]:
    """Return windows to compare models on, uint8 ``[n, frame, 3, h, w]``, and where they are from.

    They are the run's own validation windows where its data is at hand, else a rendered rally.
    """
    if not expand_user(config.data.root, "data.root").is_dir():
        return _rendered_windows(config, number), "a rendered rally (the run's data is not here)"
    dataset = WindowDataset(read_split(config.data, "val", render=False), config.data, training=False)
    picked = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist()
    return torch.stack([dataset[i]["frames"] for i in picked]), "the run's validation clips"


def _rendered_windows(config: Config, number: int) -> Tensor:
    length = config.data.sequence.length
    with tempfile.TemporaryDirectory() as folder:
        settings = SyntheticConfig(frames_per_clip=max(4, number * length), size=config.data.preprocess.resize)
        write_clip(Path(folder) / "rally", settings, 1, 1)
        frames = torch.stack([torch.from_numpy(image) for _, image in read_video(Path(folder) / "rally" / "clip.mp4")])
    return frames[: number * length].permute(0, 3, 1, 2).unflatten(0, (number, length)).contiguous()

"""Export of a run as a merged model, an adapter, a backbone or an ONNX file."""

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

# Largest accepted difference of a heatmap cell between ONNX and torch in fp32; the usual one is a hundredth of it.
MAX_DIFFERENCE = 1e-3


def publishable(config: Config) -> Config:
    """Return a run's configuration without the settings that belong to this machine: its paths and its device."""
    plain = DataConfig()
    # Of the roots of further datasets the folder name is kept, to tell them apart.
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
    """Return a hub id or ``embedded/NAME`` unchanged, and the last part of the path of a folder."""
    return Path(name).name if is_local(name) else name


def is_local(name: str) -> bool:
    """Return whether a name of weights is a folder on this machine, and not a hub id or ``embedded/NAME``."""
    return expand_user(name, "model.backbone.name").exists() or not HUB_ID.fullmatch(name)


def write_run(
    folder: Path, config: Config, model: HeatmapModel, state: dict, self_contained: bool, **more: str
) -> None:
    """Write a model as a run that can be loaded, scored and published: ``config.yaml`` and ``best/``.

    Args:
        folder: empty folder to write to.
        config: configuration of the run; settings of this machine are removed.
        model: model to save.
        state: state of the checkpoint that the model comes from; entries needed only to resume are left out.
        self_contained: whether to save all weights, or only those that do not come from the base.
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
    """Replace the name of the model's base by its public name within the context; the checkpoint stores that name."""
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
    """Write a model with its adapters merged into its dequantized base, as a run of plain weights.

    Args:
        folder: empty folder to write to.
        config: configuration of the run.
        model: model to save; merged in place.
        state: state of the checkpoint that the model comes from.
        dtype: dtype of the saved parameters.
    """
    merge_(model)
    model.float()
    more = {}
    if dtype == "bf16":
        # Buffers are not converted: the mean and deviation that normalize the input keep their precision.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        more["stored_as"] = "bf16"
    # The configuration must describe the merged model: neither quantized nor adapted.
    training = replace(config.training, quantization=None, lora=None, trainable="auto")
    write_run(folder, replace(config, training=training), model, state, self_contained=True, **more)


def write_adapter(folder: Path, config: Config, model: HeatmapModel, state: dict) -> None:
    """Write only the trained weights of a run, adapters and decoder, which load onto the same base.

    Args:
        folder: empty folder to write to.
        config: configuration of the run.
        model: model to save.
        state: state of the checkpoint that the model comes from.

    Raises:
        UserError: if the run has no base that is available elsewhere.
    """
    if not split_state_dict(model).base_keys:
        raise UserError(
            "--format adapter leaves the base out, and this run has no base that is available elsewhere: its weights "
            "were all trained, started at random, or were saved with --self-contained. Use --format merged."
        )
    write_run(folder, config, model, state, self_contained=False)


def write_backbone(folder: Path, model: HeatmapModel) -> None:
    """Write the merged backbone in fp16 as a Hugging Face folder, with the mean and deviation that normalize its input.

    Args:
        folder: folder to write to.
        model: model with the backbone; merged in place.

    Raises:
        UserError: if the model has no backbone.
    """
    if model.backbone is None:
        raise UserError("--format backbone: this model has no backbone. Use --format merged.")
    backbone = model.backbone
    merge_(model)
    backbone.hf.config._name_or_path = ""  # transformers would save the path on this machine
    backbone.hf.to(torch.float16).save_pretrained(folder)
    normalization = {
        "image_mean": backbone.mean.flatten().tolist(),
        "image_std": backbone.std.flatten().tolist(),
    }
    write_json(folder / "preprocessor_config.json", normalization)


def write_onnx_checked(folder: Path, config: Config, model: HeatmapModel, checkpoint: Path) -> tuple[Parity, str]:
    """Export a model to ONNX and compare the result in onnxruntime with the merged model in torch.

    Args:
        folder: empty folder to write to.
        config: configuration of the run.
        model: model to export; merged in place, and moved to the CPU.
        checkpoint: folder of the checkpoint that the model comes from.

    Returns:
        Comparison, and description of the windows that it was made on.

    Raises:
        UserError: if the results differ.
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
            f"{MAX_DIFFERENCE:.0e}, so it was not written. Try another version of onnx, onnxscript or onnxruntime."
        )
    # The sidecar ties the file to its checkpoint: `find_onnx` compares the hash with the run's current weights.
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
    """Return windows to compare models on: from the run's validation data if it exists here, else a rendered rally.

    Args:
        config: configuration of the run.
        number: largest number of windows.

    Returns:
        Windows, uint8 ``[n, frame, 3, h, w]``, and a description of their source.
    """
    if not expand_user(config.data.root, "data.root").is_dir():
        return _rendered_windows(config, number), "a rendered rally (the run's data is not on this machine)"
    dataset = WindowDataset(read_split(config.data, "val", render=False), config.data, training=False)
    # Evenly spaced over the whole split.
    picked = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist()
    return torch.stack([dataset[i]["frames"] for i in picked]), "the run's validation clips"


def _rendered_windows(config: Config, number: int) -> Tensor:
    """Render a rally at the size of the run's frames and return its windows, uint8 ``[number, frame, 3, h, w]``."""
    length = config.data.sequence.length
    with tempfile.TemporaryDirectory() as folder:
        settings = SyntheticConfig(frames_per_clip=max(4, number * length), size=config.data.preprocess.resize)
        write_clip(Path(folder) / "rally", settings, 1, 1)
        frames = torch.stack([torch.from_numpy(image) for _, image in read_video(Path(folder) / "rally" / "clip.mp4")])
    return frames[: number * length].permute(0, 3, 1, 2).unflatten(0, (number, length)).contiguous()

"""Where a backbone's weights come from: the hub, a folder, this package, or a run that was saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from tracknet.errors import UserError, first_line, nearest, one_line
from tracknet.files import expand_user, read_json
from tracknet.models.architectures import known_architecture
from tracknet.models.backbone import Backbone, BackboneConfig, Base
from tracknet.models.foreign import MAX_BYTES, check_architecture, check_files, find_file

logger = logging.getLogger(__name__)

# Loading takes a moment; downloads keep their own progress bars.
transformers_logging.disable_progress_bar()

EMBEDDED = Path(__file__).parent.parent / "weights"
MAX_PARAMETERS = 20_000_000_000  # the largest of these families has a third of that
# What building from numbers that do not fit together raises in transformers and torch.
UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Free of license gates; named where a backbone cannot be had.
ALTERNATIVES = {
    "vit": ("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-large"),
    "convnext": ("facebook/convnext-tiny-224", "facebook/convnext-base-224", "facebook/convnextv2-tiny-22k-224"),
}


def build_backbone(config: BackboneConfig, saved: dict | None = None, max_parameters: int | None = None) -> Backbone:
    """Build a backbone, with its weights unless they are random or come from a checkpoint.

    Args:
        config: which one.
        saved: what ``describe_backbone`` gave when a run was saved. Without a base, builds the same architecture and
            asks for no files, because the checkpoint brings the weights; else loads the base and checks that it is the
            same.
        max_parameters: of a backbone that a checkpoint brings: as many as its file can hold.

    Raises:
        UserError: it cannot be had, is damaged or incomplete, or is another than the run was trained on.
    """
    if saved is not None and saved["base"] is None:
        architecture = _read_architecture(saved["architecture"], "state.json: backbone.architecture")
        limit = MAX_PARAMETERS if max_parameters is None else max_parameters
        hf = _instantiate(architecture, "state.json: backbone.architecture", limit)
        return Backbone(hf, config.layers, tuple(saved["mean"]), tuple(saved["std"]))
    if saved is not None:
        return _load_base(config, saved)
    known = known_architecture(config.name)
    source, local = resolve_source(config.name)
    if config.revision is not None and (local or config.weights == "random"):
        raise UserError(
            f"model.backbone.revision={config.revision} chooses among the versions of a hub id's weights, and "
            f"{'weights=random takes none' if config.weights == 'random' else f'{config.name} is a folder'}: set it to "
            "null."
        )
    if config.weights == "random" and known is not None:
        return Backbone(_instantiate(known, config.name), config.layers, IMAGENET_MEAN, IMAGENET_STD)
    local = local or config.local_files_only
    architecture, hf = _load(config, source, local)
    mean, std, found = _read_normalization(source, local, config.revision)
    backbone = Backbone(hf, config.layers, mean, std)
    if not found and architecture.model_type == "vit" and config.weights == "pretrained":
        # The other families are all trained on ImageNet's constants; plain ViTs are not.
        logger.warning(
            f"{config.name} has no preprocessor_config.json here: ImageNet's mean and deviation are assumed. "
            "If it was trained with others, add the file to its folder."
        )
    if config.weights == "pretrained":
        revision = (
            None if config.name != source or Path(source).is_dir() else getattr(architecture, "_commit_hash", None)
        )
        backbone.base = Base(config.name, revision, hash_tensors(hf.state_dict()))
    return backbone


def _load_base(config: BackboneConfig, saved: dict) -> Backbone:
    """Load the base that a run names, and make sure that it is the one."""
    base = Base(**saved["base"])
    if config.weights == "random":
        raise UserError(
            f"The run's state.json names a base ({base.name}), and its config.yaml says "
            "model.backbone.weights=random: the two are not of one run."
        )
    # The recorded commit, even if the configuration names a branch: that one moves.
    revision = base.revision if config.name == base.name else config.revision
    try:
        backbone = build_backbone(dataclasses.replace(config, revision=revision))
    except UserError as error:
        raise UserError(
            f"The run keeps no copy of its frozen base weights ({base.name}), and they cannot be loaded. Where a copy "
            f"lies: model.backbone.name=<folder>.\n{error}"
        ) from error
    if backbone.base is None or backbone.base.sha256 != base.sha256:
        raise UserError(
            f"model.backbone.name={config.name} holds other weights than the base that this run was trained on "
            f"({base.name}{f' at {base.revision}' if base.revision else ''}, sha256 {base.sha256[:12]}…): give "
            "the right one by model.backbone.name=<id or folder>."
        )
    # Name and constants as they were, wherever the copy lay.
    backbone.base = base
    backbone.mean.copy_(torch.tensor(saved["mean"]).view_as(backbone.mean))
    backbone.std.copy_(torch.tensor(saved["std"]).view_as(backbone.std))
    return backbone


def _load(config: BackboneConfig, source: str, local: bool) -> tuple[PreTrainedConfig, nn.Module]:
    """Read architecture and weights; every weight, or an error."""
    name, revision = f"model.backbone.name={config.name}", config.revision or "main"
    try:
        file = find_file(source, "config.json", local, revision)
        if file is None:
            # Asked again for its own words: no such repository, no such file, a license gate, or no network.
            file = cached_file(source, "config.json", local_files_only=local, revision=revision)
        architecture = _read_architecture(read_json(Path(file), MAX_BYTES), name)
        architecture._commit_hash = extract_commit_hash(str(file), None)
        if config.weights == "random":
            return architecture, _instantiate(architecture, name)
        check_files(source, local, revision)
        hf, info = AutoModel.from_pretrained(
            source,
            config=architecture,
            local_files_only=local,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_arguments(architecture),
        )
    except OSError as error:
        raise UserError(_explain_missing(config.name, error)) from error
    except UserError:
        raise
    except (*UNBUILDABLE, SafetensorError) as error:
        raise UserError(f"{name} is damaged, or its weights are not of its config.json: {one_line(error)}") from error
    # transformers leaves what a file lacks at random.
    lacking = sorted(k for k in info["missing_keys"] if not k.endswith("mask_token"))
    if lacking:
        raise UserError(
            f"model.backbone.name={config.name}: its file lacks {len(lacking)} of the weights, such as {lacking[0]}. "
            "Get the complete file, or start at random with model.backbone.weights=random."
        )
    return architecture, hf


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_backbone(backbone: Backbone) -> dict:
    """Return what ``build_backbone(saved=…)`` needs, as plain JSON."""
    architecture = json.loads(backbone.hf.config.to_json_string(use_diff=True))
    architecture = {
        # What begins with a line is of this machine, such as the folder that the weights were loaded from.
        k: v
        for k, v in architecture.items()
        if k not in ("dtype", "transformers_version", "architectures") and k[0] != "_"
    }
    return {
        "architecture": architecture,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "base": dataclasses.asdict(backbone.base) if backbone.base is not None else None,
    }


def embedded_names(file: str) -> list[str]:
    """Return ``embedded/NAME`` of what ships with this package and has a file of this name."""
    return sorted(f"embedded/{p.name}" for p in EMBEDDED.iterdir() if (p / file).is_file())


def resolve_source(name: str) -> tuple[str, bool]:
    """Return what transformers should load for a name, and whether it lies on this disk."""
    if name.startswith("embedded/"):
        folder = EMBEDDED / name.removeprefix("embedded/")
        names = embedded_names("config.json")
        if name not in names:
            raise UserError(f"model.backbone.name={name} is not one of {', '.join(names)}{nearest(name, names)}")
        return str(folder), True
    path = expand_user(name, "model.backbone.name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.backbone.name={name}: the folder has no config.json; expected a Hugging Face model."
            )
        return str(path), True
    if name.startswith((".", "/", "~")):
        raise UserError(f"model.backbone.name={name}: there is no such folder.")
    if "/" not in name:
        # The last part of a folder that somebody else had, or a slip: nothing to ask the hub for.
        raise UserError(f"model.backbone.name={name}: there is no such folder, and a hub id is owner/name.")
    return name, False


def _arguments(architecture: PreTrainedConfig) -> dict:
    return {"add_pooling_layer": False} if architecture.model_type == "vit" else {}


def _read_architecture(values: object, source: str) -> PreTrainedConfig:
    """Turn JSON into transformers' configuration; see ``check_architecture``."""
    values = check_architecture(values, source)
    try:
        return AutoConfig.for_model(**values)
    except UNBUILDABLE as error:
        raise UserError(f"{source} is damaged: {one_line(error)}") from error


def _instantiate(architecture: PreTrainedConfig, source: str, max_parameters: int = MAX_PARAMETERS) -> nn.Module:
    """Build a backbone with weights that start at random.

    Raises:
        UserError: its numbers do not fit together, or make more parameters than there can be.
    """
    try:
        # First without memory: what a stranger's numbers ask for may be more than a machine has.
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(architecture, **_arguments(architecture)).parameters())
        if size <= max_parameters:
            return AutoModel.from_config(
                architecture, dtype=torch.float32, trust_remote_code=False, **_arguments(architecture)
            )
    except UNBUILDABLE as error:
        raise UserError(f"{source} is damaged: {one_line(error)}") from error
    raise UserError(f"{source} makes {size:,} parameters, and there can be {max_parameters:,} at most.")


def _read_normalization(
    source: str, local: bool, revision: str | None
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Read mean and deviation that the weights were trained with, else ImageNet's; and whether they were found."""
    try:
        path = find_file(source, "preprocessor_config.json", local, revision)
    except OSError:
        path = None
    if path is None:
        return IMAGENET_MEAN, IMAGENET_STD, False
    try:
        saved = read_json(path, MAX_BYTES)
        constants = [
            tuple(float(v) for v in saved.get(key, default))
            for key, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
        ]
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: damaged, or its image_mean and image_std are no lists of numbers ({error})."
        ) from error
    if any(len(c) != 3 or not all(map(math.isfinite, c)) for c in constants) or min(constants[1]) <= 0:
        raise UserError(f"{path}: image_mean and image_std are three numbers each, the latter above 0.")
    return constants[0], constants[1], "image_mean" in saved


def _explain_missing(name: str, error: OSError) -> str:
    reason = first_line(error)
    kind = "convnext" if "convnext" in name.lower() else "vit"
    others = [n for n in ALTERNATIVES[kind] if n != name]
    lines = [
        f"model.backbone.name={name} cannot be loaded: {reason}",
        "Without a license gate, from the hub: " + " or ".join(f"model.backbone.name={n}" for n in others),
        (
            f"Without a network: model.backbone.name=embedded/{kind}_tiny, or model.backbone.name=<folder with"
            " config.json and model.safetensors>, or model.backbone.weights=random with a name whose config.json can"
            " be had."
        ),
    ]
    if "gated" in reason.lower() or "dinov3" in name:
        lines.append(f"'{name}' is behind a license gate: accept it on its page on the hub, then run 'hf auth login'.")
    return "\n".join(lines)

"""Construction of backbones with weights from the hub, a folder, this package or a saved run."""

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
from tracknet.models.families import FAMILIES
from tracknet.models.foreign import MAX_BYTES, check_architecture, check_files, find_file

logger = logging.getLogger(__name__)

# Loading takes a moment only. Downloads keep their own progress bars.
transformers_logging.disable_progress_bar()

EMBEDDED = Path(__file__).parent.parent / "weights"  # folder of the weights that ship with the package
MAX_PARAMETERS = 20_000_000_000  # limit for a backbone, three times the size of the largest of these families
# Errors that transformers and torch raise for a configuration whose values do not fit together.
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
# Backbones without a license gate, by kind, to suggest when another one cannot be loaded.
ALTERNATIVES = {
    "vit": ("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-large"),
    "hierarchical": ("facebook/convnext-tiny-224", "facebook/convnext-base-224", "facebook/convnextv2-tiny-22k-224"),
}


def build_backbone(config: BackboneConfig, saved: dict | None = None, max_parameters: int | None = None) -> Backbone:
    """Build a backbone, with its weights unless they are random or come from a checkpoint.

    Args:
        config: backbone configuration.
        saved: result of ``describe_backbone`` from a saved run. If it has no base, the same architecture is built
            without any files, because the checkpoint contains the weights. If it has one, the base is loaded and
            compared with the recorded hash.
        max_parameters: largest number of parameters of a backbone whose weights the checkpoint contains;
            ``None`` for ``MAX_PARAMETERS``.

    Raises:
        UserError: if the backbone cannot be loaded, is damaged or incomplete, or is not the one that the run was
            trained on.
    """
    # A saved run: its own architecture, or the base that it names.
    if saved is not None and saved["base"] is None:
        architecture = _read_architecture(saved["architecture"], "state.json: backbone.architecture")
        limit = MAX_PARAMETERS if max_parameters is None else max_parameters
        hf = _instantiate(architecture, "state.json: backbone.architecture", limit)
        return Backbone(hf, config.layers, tuple(saved["mean"]), tuple(saved["std"]))
    if saved is not None:
        return _load_base(config, saved)
    # A new model.
    known_config = known_architecture(config.name)
    source, local = resolve_source(config.name)
    if config.revision is not None and (local or config.weights == "random"):
        raise UserError(
            f"model.backbone.revision={config.revision} selects a version of a hub id's weights, but "
            f"{'weights=random loads none' if config.weights == 'random' else f'{config.name} is a folder'}: set it to "
            "null."
        )
    if config.weights == "random" and known_config is not None:
        return Backbone(_instantiate(known_config, config.name), config.layers, IMAGENET_MEAN, IMAGENET_STD)
    local = local or config.local_files_only
    architecture, hf = _load(config, source, local)
    mean, std, has_constants = _read_normalization(source, local, config.revision)
    backbone = Backbone(hf, config.layers, mean, std)
    if not has_constants and architecture.model_type == "vit" and config.weights == "pretrained":
        # All other families are trained with ImageNet's constants; plain ViTs are not.
        logger.warning(
            f"{config.name} has no preprocessor_config.json: using ImageNet's mean and standard deviation. "
            "If it was trained with other values, add the file to its folder."
        )
    # Record the published weights. A folder, or a name that resolves to one, has no commit.
    if config.weights == "pretrained":
        revision = (
            None if config.name != source or Path(source).is_dir() else getattr(architecture, "_commit_hash", None)
        )
        backbone.base = Base(config.name, revision, hash_tensors(hf.state_dict()))
    return backbone


def _load_base(config: BackboneConfig, saved: dict) -> Backbone:
    """Load the base that a run names, and check that its weights are the recorded ones.

    Args:
        config: backbone configuration of the run.
        saved: result of ``describe_backbone`` with a base.
    """
    base = Base(**saved["base"])
    if config.weights == "random":
        raise UserError(
            f"The run's state.json names a base ({base.name}), but its config.yaml sets "
            "model.backbone.weights=random: the two files are not from the same run."
        )
    # Use the recorded commit even if the configuration names a branch, because branches move.
    revision = base.revision if config.name == base.name else config.revision
    try:
        backbone = build_backbone(dataclasses.replace(config, revision=revision))
    except UserError as error:
        raise UserError(
            f"The run keeps no copy of its frozen base weights ({base.name}), and they cannot be loaded. If you "
            f"have a copy, set model.backbone.name=<folder>.\n{error}"
        ) from error
    if backbone.base is None or backbone.base.sha256 != base.sha256:
        raise UserError(
            f"model.backbone.name={config.name} contains other weights than the base that this run was trained on "
            f"({base.name}{f' at {base.revision}' if base.revision else ''}, sha256 {base.sha256[:12]}…): set "
            "model.backbone.name=<id or folder> to that base."
        )
    # Keep the recorded name and constants, whatever the source of the copy.
    backbone.base = base
    backbone.mean.copy_(torch.tensor(saved["mean"]).view_as(backbone.mean))
    backbone.std.copy_(torch.tensor(saved["std"]).view_as(backbone.std))
    return backbone


def _load(config: BackboneConfig, source: str, local: bool) -> tuple[PreTrainedConfig, nn.Module]:
    """Load architecture and weights.

    Args:
        config: backbone configuration.
        source: folder or hub id.
        local: whether to use only local files.

    Returns:
        Configuration of transformers, and model with random or complete pretrained weights.

    Raises:
        UserError: if files are missing or damaged, or if the file lacks a weight.
    """
    name, revision = f"model.backbone.name={config.name}", config.revision or "main"
    try:
        file = find_file(source, "config.json", local, revision)
        if file is None:
            # Ask again with errors enabled to get the reason: no such repository or file, a license gate, no network.
            file = cached_file(source, "config.json", local_files_only=local, revision=revision)
        architecture = _read_architecture(read_json(Path(file), MAX_BYTES), name)
        architecture._commit_hash = extract_commit_hash(str(file), None)
        if config.weights == "random":
            return architecture, _instantiate(architecture, name)
        check_files(source, local, revision)
        # With the checked configuration as an argument, transformers does not read config.json again.
        hf, info = AutoModel.from_pretrained(
            source,
            config=architecture,
            local_files_only=local,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **FAMILIES[architecture.model_type].init_kwargs,
        )
    except OSError as error:
        raise UserError(_explain_missing(config.name, error)) from error
    except UserError:
        raise
    except (*UNBUILDABLE, SafetensorError) as error:
        raise UserError(f"{name} is damaged, or its weights do not fit its config.json: {one_line(error)}") from error
    # transformers initializes weights that the file lacks at random, without an error.
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("mask_token"))
    if missing:
        raise UserError(
            f"model.backbone.name={config.name}: the file lacks {len(missing)} of the weights, such as {missing[0]}. "
            "Download the complete file, or set model.backbone.weights=random to start from random weights."
        )
    return architecture, hf


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of named tensors: names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # A view as bytes, because NumPy has no bf16; hashlib reads it without a copy.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_backbone(backbone: Backbone) -> dict:
    """Return the description of a backbone that ``build_backbone(saved=...)`` reads, as JSON values."""
    architecture = json.loads(backbone.hf.config.to_json_string(use_diff=True))
    architecture = {
        # Keys with a leading underscore belong to this machine, such as the folder that the weights were loaded from.
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
    """Return the names ``embedded/NAME`` of the folders in this package that contain a given file."""
    return sorted(f"embedded/{p.name}" for p in EMBEDDED.iterdir() if (p / file).is_file())


def resolve_source(name: str) -> tuple[str, bool]:
    """Resolve ``model.backbone.name`` to a folder or hub id.

    Returns:
        Folder or hub id for transformers, and whether it is a local folder.

    Raises:
        UserError: if an embedded name or a folder does not exist, or if the folder contains no model.
    """
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
                f"model.backbone.name={name}: the folder contains no config.json; expected a Hugging Face model."
            )
        return str(path), True
    if name.startswith((".", "/", "~")):
        raise UserError(f"model.backbone.name={name}: no such folder exists.")
    if "/" not in name:
        # The last part of a folder on another machine, or a typing error: there is nothing to request from the hub.
        raise UserError(f"model.backbone.name={name}: no such folder exists, and it is not a hub id (owner/name).")
    return name, False


def _read_architecture(values: object, source: str) -> PreTrainedConfig:
    """Check parsed JSON with ``check_architecture`` and convert it to a configuration of transformers."""
    values = check_architecture(values, source)
    try:
        return AutoConfig.for_model(**values)
    except UNBUILDABLE as error:
        raise UserError(f"{source} is damaged: {one_line(error)}") from error


def _instantiate(architecture: PreTrainedConfig, source: str, max_parameters: int = MAX_PARAMETERS) -> nn.Module:
    """Build a backbone with random weights.

    Args:
        architecture: configuration of transformers.
        source: file or setting to name in messages.
        max_parameters: largest number of parameters.

    Raises:
        UserError: if the values of the configuration do not fit together, or if there are more parameters than
            ``max_parameters``.
    """
    kwargs = FAMILIES[architecture.model_type].init_kwargs
    try:
        # First on the meta device: an untrusted configuration may ask for more memory than the machine has.
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(architecture, **kwargs).parameters())
        if size <= max_parameters:
            return AutoModel.from_config(architecture, dtype=torch.float32, trust_remote_code=False, **kwargs)
    except UNBUILDABLE as error:
        raise UserError(f"{source} is damaged: {one_line(error)}") from error
    raise UserError(f"{source} requires {size:,} parameters; at most {max_parameters:,} are possible.")


def _read_normalization(
    source: str, local: bool, revision: str | None
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Read the mean and standard deviation of the images that the weights were trained with.

    Returns:
        Mean and standard deviation per channel, those of ImageNet if none are found, and whether a mean was found.

    Raises:
        UserError: if the file is damaged or contains other values.
    """
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
            f"{path}: damaged, or its image_mean and image_std are not lists of numbers ({error})."
        ) from error
    if any(len(c) != 3 or not all(map(math.isfinite, c)) for c in constants) or min(constants[1]) <= 0:
        raise UserError(f"{path}: image_mean and image_std must be three finite numbers each, and image_std above 0.")
    return constants[0], constants[1], "image_mean" in saved


def _explain_missing(name: str, error: OSError) -> str:
    """Return a message with the reason why a backbone cannot be loaded, and with alternatives."""
    reason = first_line(error)
    is_convnext = "convnext" in name.lower()
    alternatives = [n for n in ALTERNATIVES["hierarchical" if is_convnext else "vit"] if n != name]
    embedded = "embedded/convnext_tiny" if is_convnext else "embedded/vit_tiny"
    lines = [
        f"model.backbone.name={name} cannot be loaded: {reason}",
        "Alternatives on the hub without a license gate: "
        + " or ".join(f"model.backbone.name={n}" for n in alternatives),
        (
            f"Alternatives without a network: model.backbone.name={embedded}, or model.backbone.name=<folder with"
            " config.json and model.safetensors>, or model.backbone.weights=random with a name whose config.json is"
            " available."
        ),
    ]
    if "gated" in reason.lower() or "dinov3" in name:
        lines.append(f"'{name}' is behind a license gate: accept it on its page on the hub, then run 'hf auth login'.")
    return "\n".join(lines)

"""Checks of the untrusted files of a backbone, before anything is built from them.

transformers reads more from a config.json than an architecture: code to fetch and run (``auto_map``, kernels named by
an attention implementation), other files to load, and a quantization. None of these is supported here, so each is
refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers.utils import cached_file

from tracknet.errors import UserError
from tracknet.files import read_json
from tracknet.models.families import FAMILIES

MAX_BYTES = 5_000_000  # largest size of a JSON file beside weights
MAX_NUMBER = 65_536  # largest value of any number, such as a width or an image size
MAX_LAYERS = 512  # largest number of layers, stages or register tokens
MAX_LENGTH = 64  # largest number of entries of a list or dict
ATTENTION = (None, "eager", "sdpa")  # attention implementations that do not fetch a kernel
# Keys that must be absent or null, with the reason, which follows the key in the message.
REFUSED = {
    "auto_map": "names code to fetch and run",
    "custom_pipelines": "names code to fetch and run",
    "quantization_config": "stores weights in another format (training.quantization sets quantization here)",
    "transformers_weights": "names another file for the weights",
    "experts_implementation": "names another implementation",
    "_experts_implementation": "names another implementation",
}
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # names of weights in pickle format
# Keys that are dropped before the check because nothing here reads them. Class labels alone are a few thousand strings.
IGNORED = ("id2label", "label2id", "out_features", "stage_names", "task_specific_params")


def check_architecture(values: object, source: str) -> dict:
    """Check the configuration of a backbone, from a config.json or a checkpoint's state.

    Args:
        values: parsed JSON.
        source: file or setting to name in messages.

    Returns:
        The configuration without the keys in ``IGNORED``.

    Raises:
        UserError: if the model family is not supported, if the configuration requests code, files or kernels, or if a
            value has a wrong type or is out of bounds.
    """
    # The family first: it gives the other keys their meaning.
    if not isinstance(values, dict):
        raise UserError(f"{source}: not a model configuration; expected a JSON object with model_type.")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{source}: model_type is '{str(kind)[:60]}'; supported are {', '.join(FAMILIES)}.")
    values = {key: value for key, value in values.items() if key not in IGNORED}
    # Then every entry: no requests for code or files, and only values of bounded size.
    for key, value in values.items():
        if value is not None and key in REFUSED:
            raise UserError(f"{source}: {key} {REFUSED[key]}, which is not supported; remove the entry.")
        if key.endswith(("attn_implementation", "attn_implementation_internal")) and value not in ATTENTION:
            raise UserError(f"{source}: {key} may fetch and run a kernel, which is not supported; remove the entry.")
        limit = (
            MAX_LAYERS if key in ("num_hidden_layers", "depths", "num_stages", "num_register_tokens") else MAX_NUMBER
        )
        if not _is_bounded(value, limit):
            raise UserError(
                f"{source}: {key} is {str(value)[:60]}; expected numbers from 0 to {limit}, text, or a list of at most"
                f" {MAX_LENGTH} entries."
            )
    # transformers divides the width by the number of heads when it builds the model.
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and (heads == 0 or width % heads):
        raise UserError(f"{source}: damaged: hidden_size {width} is not a multiple of num_attention_heads {heads}.")
    return values


def _is_bounded(value: object, limit: int, depth: int = 0) -> bool:
    """Return whether a JSON value is small: numbers from 0 to ``limit``, short strings, and short containers of those.

    Containers may be nested three deep.
    """
    if isinstance(value, dict):
        return depth < 3 and len(value) <= MAX_LENGTH and all(_is_bounded(v, limit, depth + 1) for v in value.values())
    if isinstance(value, list):
        return depth < 3 and len(value) <= MAX_LENGTH and all(_is_bounded(v, limit, depth + 1) for v in value)
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, (int, float)):
        return 0 <= value <= limit  # False for NaN
    return isinstance(value, str) and len(value) <= 300


def find_file(source: str, name: str, local: bool, revision: str | None) -> Path | None:
    """Return the path of a file in a folder, or in a repository on the hub, which is downloaded.

    Args:
        source: folder or hub id.
        name: name of the file.
        local: whether to use only the hub's cache.
        revision: commit, tag or branch of a hub id.

    Returns:
        Path of the file; ``None`` if the folder or repository does not contain it, or the hub cannot be reached.

    Raises:
        OSError: if the hub refuses access, for example because the repository does not exist or is gated.
    """
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    cached_path = cached_file(
        source,
        name,
        local_files_only=local,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(cached_path) if cached_path is not None else None


def _refuse_pickled(source: str, local: bool, revision: str | None) -> None:
    """Raise a ``UserError`` with a remedy if the weights exist in pickle format only."""
    if find_file(source, "model.safetensors", local, revision) is not None:
        return
    for name in PICKLED:
        if find_file(source, name, local, revision) is not None:
            raise UserError(
                f"model.backbone.name={source}: stores its weights only as {name}, which can run code when it is read"
                " and is therefore not read. If you trust it, write model.safetensors once: python -c"
                ' "from transformers import AutoModel;'
                f" AutoModel.from_pretrained({source!r}).save_pretrained('converted')\", and set"
                " model.backbone.name=converted."
            )


def check_files(source: str, local: bool, revision: str | None) -> None:
    """Check that transformers would load nothing but the safetensors of a backbone.

    Args:
        source: folder or hub id.
        local: whether to use only the hub's cache.
        revision: commit, tag or branch of a hub id.

    Raises:
        UserError: if there is an adapter, if the weights exist in pickle format only, or if the index is damaged or
            lists other files.
        OSError: if the hub refuses access.
    """
    if find_file(source, "adapter_config.json", local, revision) is not None:
        raise UserError(
            f"model.backbone.name={source}: contains an adapter_config.json, and transformers would attach the"
            " adapter that it names. Remove it; use training.lora to add adapters."
        )
    # Sharded weights have an index, which must list only files of the same folder.
    index = find_file(source, "model.safetensors.index.json", local, revision)
    if index is None:
        _refuse_pickled(source, local, revision)
        return
    content = read_json(index, MAX_BYTES)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{index}: damaged; expected a weight_map from names of weights to names of files.")
    for file in weights.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise UserError(
                f"{index}: lists the file {str(file)[:100]!r}; only .safetensors files beside it are loaded."
            )

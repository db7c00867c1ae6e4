"""What a backbone's files may say. They come from strangers, and are checked here before anything is built from them.

transformers reads more from a config.json than an architecture: code to fetch and run (``auto_map``, kernels named by
an attention implementation), other files to load, a quantization of its own. None of that is wanted here, so it is
refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers.utils import cached_file

from tracknet.errors import UserError
from tracknet.files import read_json
from tracknet.models.backbone import FAMILIES

MAX_BYTES = 5_000_000  # of a JSON file beside weights
MAX_NUMBER = 65_536  # of a width, a size, a number of anything
MAX_LAYERS = 512
MAX_LENGTH = 64  # of a list of widths or depths
ATTENTION = (None, "eager", "sdpa")
REFUSED = {
    "auto_map": "names code to fetch and run",
    "custom_pipelines": "names code to fetch and run",
    "quantization_config": "stores weights in a way of its own (quantization is set by training.quantization here)",
    "transformers_weights": "names another file for the weights",
    "experts_implementation": "names another implementation",
    "_experts_implementation": "names another implementation",
}
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Labels of classes are a few thousand texts, and nothing reads them here.
IGNORED = ("id2label", "label2id", "out_features", "stage_names", "task_specific_params")


def check_architecture(values: object, source: str) -> dict:
    """Check what a config.json, or a checkpoint's state, says of a backbone.

    Args:
        values: as read from JSON.
        source: file or setting that messages name.

    Returns:
        The same, without what nothing reads.

    Raises:
        UserError: it is of no supported family, asks for something to be run or fetched, or a value is of a wrong kind
            or out of bounds.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: is no model's configuration; expected an object with model_type.")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{source}: is a '{str(kind)[:60]}'; supported are {', '.join(FAMILIES)}.")
    values = {key: value for key, value in values.items() if key not in IGNORED}
    for key, value in values.items():
        if value is not None and key in REFUSED:
            raise UserError(f"{source}: {key} {REFUSED[key]}, which is not done here; take the entry out.")
        if key.endswith(("attn_implementation", "attn_implementation_internal")) and value not in ATTENTION:
            raise UserError(f"{source}: {key} may fetch and run a kernel, which is not done here; take the entry out.")
        limit = (
            MAX_LAYERS if key in ("num_hidden_layers", "depths", "num_stages", "num_register_tokens") else MAX_NUMBER
        )
        if not _is_bounded(value, limit):
            raise UserError(
                f"{source}: {key} is {str(value)[:60]}; expected numbers from 0 to {limit}, text, or a list of up to"
                f" {MAX_LENGTH}."
            )
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and (heads == 0 or width % heads):
        raise UserError(f"{source}: is damaged: hidden_size {width} is no multiple of num_attention_heads {heads}.")
    return values


def _is_bounded(value: object, limit: int, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 3 and len(value) <= MAX_LENGTH and all(_is_bounded(v, limit, depth + 1) for v in value.values())
    if isinstance(value, list):
        return depth < 3 and len(value) <= MAX_LENGTH and all(_is_bounded(v, limit, depth + 1) for v in value)
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, (int, float)):
        return 0 <= value <= limit  # a NaN is not
    return isinstance(value, str) and len(value) <= 300


def find_file(source: str, name: str, local: bool, revision: str | None) -> Path | None:
    """Return a file of a folder or of a repository on the hub, ``None`` where it has none.

    Raises:
        OSError: the hub does not give it.
    """
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    found = cached_file(
        source,
        name,
        local_files_only=local,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found is not None else None


def _refuse_pickled(source: str, local: bool, revision: str | None) -> None:
    """Say what to do about weights that are there in no other form than pickled."""
    if find_file(source, "model.safetensors", local, revision) is not None:
        return
    for name in PICKLED:
        if find_file(source, name, local, revision) is not None:
            raise UserError(
                f"model.backbone.name={source}: holds its weights as {name} alone, which can run code when it is read,"
                ' so it is not read here. If you trust it, write model.safetensors once: python -c "from transformers'
                f" import AutoModel; AutoModel.from_pretrained({source!r}).save_pretrained('converted')\", and say"
                " model.backbone.name=converted."
            )


def check_files(source: str, local: bool, revision: str | None) -> None:
    """Refuse files beside a backbone that would load something else than its own safetensors.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    if find_file(source, "adapter_config.json", local, revision) is not None:
        raise UserError(
            f"model.backbone.name={source}: an adapter_config.json lies there, and transformers would attach the"
            " adapter that it names. Remove it; adapters are set by training.lora here."
        )
    index = find_file(source, "model.safetensors.index.json", local, revision)
    if index is None:
        _refuse_pickled(source, local, revision)
        return
    content = read_json(index, MAX_BYTES)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{index}: damaged; expected a weight_map from names of weights to files.")
    for file in weights.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise UserError(
                f"{index}: names the file {str(file)[:100]!r}; only .safetensors files beside it are loaded."
            )

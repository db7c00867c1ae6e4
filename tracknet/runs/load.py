"""From a run's folder back to exactly the model that was trained."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tracknet.config import Config, load_config
from tracknet.config.changes import changeable_settings, find_unchangeable
from tracknet.data.cache import is_cache
from tracknet.data.config import DataConfig
from tracknet.errors import UserError, first_line, nearest
from tracknet.files import expand_user
from tracknet.models.heatmap_model import HeatmapModel, build_model
from tracknet.models.pretrained import EMBEDDED, embedded_names
from tracknet.quantization.apply import apply_mode
from tracknet.runs.onnx import OnnxModel, find_onnx
from tracknet.training.checkpoint import find_checkpoint, load_weights
from tracknet.training.state import load_state

logger = logging.getLogger(__name__)

# The hub's own errors, and those of the network layer that they derive from (httpx or httpx2, by version).
HUB_ERRORS: tuple[type[Exception], ...] = (
    *(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"),
    HFValidationError,
    LocalEntryNotFoundError,
    OSError,
)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

LOADABLE = tuple(changeable_settings(Config, "load"))


def resolve_device(name: str) -> torch.device:
    """Return the device that ``training.device`` means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device=cuda, but torch sees no CUDA device: set training.device=cpu, or check the driver "
            "and that the CUDA build of torch is installed."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # One GPU for each process of those that train together.
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def check_base_override(saved: dict | None, overrides: Sequence[str]) -> None:
    """Refuse to name a base for a run that has all its weights itself."""
    named = next((o for o in overrides if o.startswith("model.backbone.name=")), None)
    if named and (saved is None or saved["base"] is None):
        raise UserError(f"'{named}': this run holds all its weights itself and asks for no base; leave it out.")


def locate_run(run: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a run: of this package's own for ``embedded/NAME``, else as it is where it exists, else
    downloaded by its hub id ``owner/name``.

    Raises:
        UserError: neither a folder nor a hub id, or the hub does not give it.
    """
    if str(run).startswith("embedded/"):
        names = embedded_names("config.yaml")
        if str(run) not in names or revision is not None:
            raise UserError(
                f"{run}: the trained models that ship with this package are {', '.join(names)}, without revisions"
                f"{nearest(str(run), names)}"
            )
        return EMBEDDED / str(run).removeprefix("embedded/")
    folder = expand_user(run, "run")
    if folder.exists() or not HUB_ID.fullmatch(str(run)):
        if revision is not None:
            raise UserError(f"{run} is a folder; revision={revision} is for hub ids.")
        return folder
    try:
        return Path(
            snapshot_download(str(run), revision=revision, allow_patterns=["config.yaml", "best/*", "README.md"])
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{run}: there is no such folder, and as a hub id it cannot be had either: {first_line(error)}"
        ) from error


def _check_loadable(overrides: Sequence[str]) -> None:
    if (override := find_unchangeable(Config, "load", overrides)) is not None:
        raise UserError(
            f"'{override}' would make another model than the one that was trained. What may be set here: "
            f"{', '.join(LOADABLE)}."
        )


def load_run(
    run: Path, checkpoint: str = "best", overrides: Sequence[str] = (), said: str = "--run "
) -> tuple[Config, HeatmapModel, torch.device]:
    """Load a run: its configuration, its model with the same quantization and adapters, ready to predict.

    Args:
        run: folder of the run.
        checkpoint: ``best`` or ``last``.
        overrides: ``section.key=value`` on top of the saved configuration.
        said: what the user named the run by, for messages.

    Returns:
        Configuration, model and its device.

    Raises:
        UserError: no such run or checkpoint, or its files do not fit together.
    """
    _check_loadable(overrides)
    folder = find_checkpoint(run, checkpoint, said)
    config = keep_own_cache(load_config(run / "config.yaml", overrides), overrides)
    device = resolve_device(config.training.device)
    saved = load_state(folder)["backbone"]
    check_base_override(saved, overrides)
    model = build_model(config.model, config.data.sequence.length, saved, parameters_in(folder / "model.safetensors"))
    apply_mode(model, config.training.mode, device, initialize=False)
    load_weights(folder, model)
    model.config = config
    return config, model.eval(), device


def parameters_in(weights: Path) -> int:
    """Return how many parameters a file of weights can hold at most: of 4 bits each."""
    return 2 * weights.stat().st_size if weights.is_file() else 0


def keep_own_cache(config: Config, overrides: Sequence[str]) -> Config:
    """Return a run's configuration with a cache folder that this machine's user chose.

    A run may be a stranger's: what it says of where frames are kept counts only where that is a cache of ours already.
    """
    default = DataConfig().cache_dir
    is_chosen = any(override.startswith("data.cache_dir=") for override in overrides)
    if is_chosen or config.data.cache_dir == default or is_cache(expand_user(config.data.cache_dir, "data.cache_dir")):
        return config
    if config.data.cache == "disk":
        logger.warning(
            f"The run's data.cache_dir={config.data.cache_dir} is no cache on this machine: frames are kept in "
            f"{default}; another place is yours to say by data.cache_dir=<folder>."
        )
    return replace(config, data=replace(config.data, cache_dir=default))


def load_onnx(
    run: Path, checkpoint: str = "best", overrides: Sequence[str] = ()
) -> tuple[Config, OnnxModel, torch.device]:
    """Load what ``tracknet export --format onnx`` made of a run; arguments and result as of ``load_run``."""
    _check_loadable(overrides)
    path = find_onnx(run, checkpoint)
    config = keep_own_cache(load_config(run / "config.yaml", overrides), overrides)
    device = resolve_device(config.training.device)
    model = OnnxModel(path, device)
    wh = config.data.preprocess.resize
    if model.input_shape != (config.data.sequence.length, 3, wh[1], wh[0]):
        raise UserError(
            f"{path} takes windows of {model.input_shape}, (frame, 3, height, width), and the configuration says "
            f"{(config.data.sequence.length, 3, wh[1], wh[0])}: size and length are fixed when exporting."
        )
    logger.info(f"onnxruntime on {model.providers[0]}: {path}")
    return config, model.eval(), device

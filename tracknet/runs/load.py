"""Loading of runs: from a folder, hub id or embedded name to exactly the model that was trained."""

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

# Errors of the hub client, and of the network library below it. The base class of that library (httpx or httpx2,
# depending on the version of huggingface_hub) is found by name among the bases of the client's own error.
HUB_ERRORS: tuple[type[Exception], ...] = (
    *(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"),
    HFValidationError,
    LocalEntryNotFoundError,
    OSError,
)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name

LOADABLE = tuple(changeable_settings(Config, "load"))  # settings that may be overridden when a run is loaded


def resolve_device(name: str) -> torch.device:
    """Return the device of this process for a value of ``training.device``.

    Raises:
        UserError: if the value is ``cuda`` and torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device=cuda, but torch finds no CUDA device: set training.device=cpu, or check the driver "
            "and that the CUDA build of torch is installed."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Processes that train together use one GPU each; the launcher numbers them in LOCAL_RANK.
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def check_base_override(saved: dict | None, overrides: Sequence[str]) -> None:
    """Check that a base is set only for a run that needs one.

    Args:
        saved: entry ``backbone`` of the run's state, or ``None``.
        overrides: ``section.key=value`` settings on top of the saved configuration.

    Raises:
        UserError: if ``model.backbone.name`` is set for a run that contains all its weights.
    """
    named = next((o for o in overrides if o.startswith("model.backbone.name=")), None)
    if named and (saved is None or saved["base"] is None):
        raise UserError(f"'{named}': this run holds all its weights itself and requires no base; remove the setting.")


def report_folder(run: str | Path, path: Path) -> Path:
    """Return the folder in which the reports of a run are written, as ``report/``.

    Args:
        run: run as the user named it.
        path: folder of the run, as returned by ``locate_run``.

    Returns:
        ``path`` for a run that was named by its folder. Reports of downloaded and embedded runs go to ``outputs/hub/``,
        not into the hub's cache or this package.
    """
    return path if path == expand_user(run, "run") else Path("outputs") / "hub" / str(run)


def locate_run(run: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a run.

    Args:
        run: ``embedded/NAME`` for a model that ships with this package, an existing folder, or a hub id ``owner/name``,
            which is downloaded.
        revision: commit, tag or branch of a hub id; ``None`` for the default branch.

    Raises:
        UserError: if ``run`` is neither a folder nor a hub id, or the download fails.
    """
    if str(run).startswith("embedded/"):
        names = embedded_names("config.yaml")
        if str(run) not in names or revision is not None:
            raise UserError(
                f"{run}: no such embedded model or revision. The trained models that ship with this package are "
                f"{', '.join(names)}, without revisions{nearest(str(run), names)}"
            )
        return EMBEDDED / str(run).removeprefix("embedded/")
    folder = expand_user(run, "run")
    # A name that cannot be a hub id is returned as a folder, so that the caller reports what the folder lacks.
    if folder.exists() or not HUB_ID.fullmatch(str(run)):
        if revision is not None:
            raise UserError(f"{run} is a folder, and revision={revision} applies to hub ids only: remove the revision.")
        return folder
    try:
        return Path(
            snapshot_download(str(run), revision=revision, allow_patterns=["config.yaml", "best/*", "README.md"])
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{run}: no such folder exists, and it cannot be downloaded as a hub id either: {first_line(error)}"
        ) from error


def _check_loadable(overrides: Sequence[str]) -> None:
    """Refuse overrides that change the model.

    Raises:
        UserError: if a setting is not one of ``LOADABLE``.
    """
    if (override := find_unchangeable(Config, "load", overrides)) is not None:
        raise UserError(
            f"'{override}' would make another model than the one that was trained. Settings that can be changed here: "
            f"{', '.join(LOADABLE)}."
        )


def load_run(
    run: Path, checkpoint: str = "best", overrides: Sequence[str] = (), option: str = "--run "
) -> tuple[Config, HeatmapModel, torch.device]:
    """Load the model of a run with its quantization and adapters, ready for prediction.

    Args:
        run: folder of the run.
        checkpoint: ``best`` or ``last``.
        overrides: ``section.key=value`` settings on top of the saved configuration.
        option: option or setting with which the user named the run, as a prefix of the run in messages.

    Returns:
        Configuration, model in evaluation mode, and its device.

    Raises:
        UserError: if the run or checkpoint does not exist, or its files do not fit together.
    """
    _check_loadable(overrides)
    folder = find_checkpoint(run, checkpoint, option)
    config = keep_own_cache(load_config(run / "config.yaml", overrides), overrides)
    device = resolve_device(config.training.device)
    saved = load_state(folder)["backbone"]
    check_base_override(saved, overrides)
    # The file's size limits the model's size, so that the configuration of an untrusted run cannot exhaust the memory.
    model = build_model(config.model, config.data.sequence.length, saved, parameters_in(folder / "model.safetensors"))
    apply_mode(model, config.training.mode, device, initialize=False)
    load_weights(folder, model)
    model.config = config
    return config, model.eval(), device


def parameters_in(weights: Path) -> int:
    """Return the largest number of parameters that a file of weights can contain, at 4 bits each; 0 without a file."""
    return 2 * weights.stat().st_size if weights.is_file() else 0


def keep_own_cache(config: Config, overrides: Sequence[str]) -> Config:
    """Return a run's configuration with a cache folder that was chosen on this machine.

    A run may come from a stranger, and must not decide where frames are written. Its ``data.cache_dir`` is used only if
    that folder is a TrackNet cache already, and replaced by the default otherwise.

    Args:
        config: configuration of the run.
        overrides: ``section.key=value`` settings of the user; a ``data.cache_dir`` among them is always used.
    """
    default = DataConfig().cache_dir
    is_chosen = any(override.startswith("data.cache_dir=") for override in overrides)
    if is_chosen or config.data.cache_dir == default or is_cache(expand_user(config.data.cache_dir, "data.cache_dir")):
        return config
    if config.data.cache == "disk":
        logger.warning(
            f"The run's data.cache_dir={config.data.cache_dir} is not a cache on this machine: frames are stored in "
            f"{default}; set data.cache_dir=<folder> to use another folder."
        )
    return replace(config, data=replace(config.data, cache_dir=default))


def load_onnx(
    run: Path, checkpoint: str = "best", overrides: Sequence[str] = ()
) -> tuple[Config, OnnxModel, torch.device]:
    """Load a model exported by ``tracknet export --format onnx``.

    Args:
        run: folder of the export, or of the run that contains it.
        checkpoint: ``best`` or ``last``.
        overrides: ``section.key=value`` settings on top of the saved configuration.

    Returns:
        Configuration, model in evaluation mode, and its device.

    Raises:
        UserError: if the file does not exist, or does not fit the run or the configuration.
    """
    _check_loadable(overrides)
    path = find_onnx(run, checkpoint)
    config = keep_own_cache(load_config(run / "config.yaml", overrides), overrides)
    device = resolve_device(config.training.device)
    model = OnnxModel(path, device)
    wh = config.data.preprocess.resize
    if model.input_shape != (config.data.sequence.length, 3, wh[1], wh[0]):
        raise UserError(
            f"{path} takes windows of {model.input_shape}, (frame, 3, height, width), but the configuration sets "
            f"{(config.data.sequence.length, 3, wh[1], wh[0])}: size and length are fixed by the export. Export the run"
            " again, or use the configuration that it was exported with."
        )
    logger.info(f"onnxruntime on {model.providers[0]}: {path}")
    return config, model.eval(), device

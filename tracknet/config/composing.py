"""Composition of a configuration from defaults, YAML files and overrides; saving and loading.

Precedence, from lowest to highest: defaults of the dataclasses, the selected YAML file of each section, overrides
``section.key=value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracknet.config.errors import explain, suggest
from tracknet.config.names import BUILT_IN, SECTIONS, config_names
from tracknet.config.reading import Reader, hint_of, member_hint
from tracknet.config.renamed import current_override, rename_keys
from tracknet.data.config import DataConfig
from tracknet.errors import UserError, nearest
from tracknet.files import write_text
from tracknet.models.heatmap_model import ModelConfig
from tracknet.quantization.apply import active
from tracknet.tracking.predictor import EvaluationConfig
from tracknet.training.config import TrainingConfig


@dataclass
class Config:
    """Configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig, metadata={"changes": ("load",)})
    """Frames and labels, selected by ``--data``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network, selected by ``--model``."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Training and quantization, selected by ``--training``."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"changes": ("load",)})
    """Detection and scoring."""
    seed: int = 0
    """Seed of the weight initialization, data order, augmentation and dropout (``--seed``)."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be from 0 to 2^63 - 1.")
        if (self.evaluation.stride or 0) > self.data.sequence.length:
            raise UserError(
                f"evaluation.stride={self.evaluation.stride}: windows of {self.data.sequence.length} frames"
                " (data.sequence.length) would skip the frames between them; use at most that length, or null."
            )
        _check_freeze(self)
        _check_cached_features(self)


def _check_freeze(config: Config) -> None:
    """Raise a ``UserError`` if ``model.backbone.freeze`` contradicts the settings that determine what is trained."""
    backbone, training = config.model.backbone, config.training
    if backbone is None:
        return
    quantization, lora = active(training.quantization), active(training.lora)
    # A frozen backbone, with a setting that trains it.
    trains = {
        f"training.trainable={training.trainable}": training.trainable in ("all", "norms"),
        "training.quantization.int8_trainable=true": quantization is not None and quantization.int8_trainable,
        "training.quantization.llm_int8_has_fp16_weight=true": (
            quantization is not None and quantization.llm_int8_has_fp16_weight
        ),
        f"training.train_last_blocks={training.train_last_blocks}": training.train_last_blocks is not None
        and lora is None,
    }
    for setting, is_set in trains.items():
        if backbone.freeze and is_set:
            raise UserError(f"model.backbone.freeze=true and {setting} contradict each other: change one of them.")


def _check_cached_features(config: Config) -> None:
    """Raise a ``UserError`` if features are to be cached although training or augmentation would change them."""
    if not config.training.cache_features:
        return
    problem = None
    backbone, training = config.model.backbone, config.training
    if backbone is None:
        problem = "this model has no backbone: set it to false"
    elif not (backbone.freeze or training.trainable == "nothing") or active(training.lora) is not None:
        problem = "the backbone is trained: set training.trainable=nothing and training.lora=null (--training frozen)"
    elif not config.data.augment.only_flips:
        problem = (
            "augmentation changes the images: set data.augment.enabled=false, or allow only flips by setting"
            " data.augment.crop=null, 'data.augment.scale=[1,1]', and brightness, contrast, saturation, blur and noise"
            " to 0"
        )
    elif config.data.cache != "disk":
        problem = "they are stored next to the cache of frames: set data.cache=disk"
    if problem:
        raise UserError(
            f"training.cache_features=true stores the features of each frame from a frozen backbone, but {problem}."
        )


def compose(
    data: str, model: str, training: str, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> Config:
    """Compose a configuration from one YAML file per section and overrides.

    Args:
        data: name of a file in ``configs/data``, without ``.yaml``.
        model: name of a file in ``configs/model``, without ``.yaml``.
        training: name of a file in ``configs/training``, without ``.yaml``.
        overrides: arguments ``section.key=value`` with the value in YAML; ``null`` turns an optional section off.
        config_dir: folder with the user's own ``data/``, ``model/`` and ``training/``, searched first.

    Raises:
        UserError: if a name or key is unknown, or a value has a wrong type or is out of range; the message names the
            key.
    """
    merged = OmegaConf.structured(Config)
    for section, name in (("data", data), ("model", model), ("training", training)):
        path = _find(section, name, config_dir)
        merged = _merge(merged, OmegaConf.create({section: _read_section(path, section)}), str(path))
    return to_config(apply_overrides(merged, overrides))


def compose_data(name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> DataConfig:
    """Compose the data section alone.

    Args:
        name: name of a file in ``configs/data``, without ``.yaml``.
        overrides: arguments ``data.key=value``.
        config_dir: folder with the user's own ``data/``, searched first.

    Raises:
        UserError: as ``compose``, and if an override belongs to another section, which would have no effect.
    """
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in SECTIONS and section != "data":
            raise UserError(f"'{override}': this command uses the data section only; remove it.")
    path = _find("data", name, config_dir)
    merged = _merge(OmegaConf.structured(Config), OmegaConf.create({"data": _read_section(path, "data")}), str(path))
    return to_config(apply_overrides(merged, overrides)).data


def apply_overrides(merged: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Merge arguments ``section.key=value`` into a structured configuration.

    Raises:
        UserError: if a section or key is unknown, or a value has a wrong type.
    """
    for override in overrides:
        override = current_override(override)
        key, _, text = override.partition("=")
        section = key.partition(".")[0]
        if section not in SECTIONS:
            raise UserError(
                f"'{override}': unknown section '{section}' (sections: {', '.join(SECTIONS)})"
                f"{nearest(section, SECTIONS) or suggest(key, Config)}"
            )
        try:
            hint = hint_of(key, Config)
        except KeyError:
            raise UserError(f"'{override}': unknown setting '{key}'{suggest(key, Config)}") from None
        value: Any = Reader(f"'{override}'", allows_references=True).read_argument(text, hint, key)
        # Merged one by one, so that an error is reported with its override, and later overrides take precedence.
        for name in reversed(key.split(".")):
            value = {name: value}
        merged = _merge(merged, OmegaConf.create(value), f"'{override}'", key)
    return merged


def to_config(merged: DictConfig) -> Config:
    """Convert a merged tree to dataclasses, which validate their values.

    Raises:
        UserError: if a value is invalid.
    """
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        # OmegaConf wraps the errors of `__post_init__`; the original one has the message for the user.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(explain(error, "configuration", Config)) from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load a saved configuration and apply overrides.

    Args:
        path: file written by ``save_config``.
        overrides: arguments ``section.key=value``.

    Raises:
        UserError: if the file is missing or damaged, or a value is invalid.
    """
    if not path.is_file():
        raise UserError(f"{path}: file not found. Set --run to the folder of a run, <output-dir>/runs/<run_id>.")
    content = _read_yaml(path, Config, allows_references=False)
    if missing := [section for section in SECTIONS if section not in content]:
        raise UserError(
            f"{path}: damaged ({', '.join(missing)} missing); the configuration of a run contains all sections."
        )
    content = rename_keys(content, str(path))
    merged = _merge(OmegaConf.structured(Config), OmegaConf.create(content), str(path))
    return to_config(apply_overrides(merged, overrides))


def _find(section: str, name: str, config_dir: Path | None) -> Path:
    """Return the YAML file of a section by its name; the user's own folder takes precedence."""
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: folder not found.")
    for folder in (config_dir, BUILT_IN):
        if folder is not None and (folder / section / f"{name}.yaml").is_file():
            return folder / section / f"{name}.yaml"
    names = config_names(section, config_dir)
    raise UserError(
        f"--{section} {name}: configs/{section}/{name}.yaml not found (available: {', '.join(names)})"
        f"{nearest(name, names)}"
    )


def _read_section(path: Path, section: str) -> dict:
    """Read the YAML file of a section, with old names of settings replaced."""
    content = _read_yaml(path, member_hint(Config, section), allows_references=True)
    return rename_keys({section: content}, str(path))[section]


def _read_yaml(path: Path, hint: object, allows_references: bool) -> dict:
    """Read a YAML file whose top level is a mapping; an empty file is an empty mapping."""
    content = Reader(str(path), allows_references).read_file(path, hint)
    content = {} if content is None else content  # a mode that changes no setting is a file of comments only
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines at the top level, found a {type(content).__name__}.")
    return content


def _merge(base: DictConfig, other: DictConfig, source: str, key: str | None = None) -> DictConfig:
    """Merge two configurations, and convert errors to a ``UserError`` that names the source and the key."""
    try:
        return cast(DictConfig, OmegaConf.merge(base, other))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(explain(error, source, Config, key)) from error

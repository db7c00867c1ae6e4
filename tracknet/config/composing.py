"""From YAML and command line to one typed object: ``compose(data, model, training, overrides) -> Config``.

Precedence: dataclass defaults, then the chosen YAML of each section, then ``section.key=value``.
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
    """Everything that a run depends on."""

    data: DataConfig = field(default_factory=DataConfig, metadata={"changes": ("load",)})
    """Frames and labels; chosen by ``--data``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network; chosen by ``--model``."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The mode; chosen by ``--training``."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"changes": ("load",)})
    """Scoring."""
    seed: int = 0
    """Of weights that start at random, of augmentation, order and dropout (``--seed``)."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be from 0 to 2^63 - 1.")
        if (self.evaluation.stride or 0) > self.data.sequence.length:
            raise UserError(
                f"evaluation.stride={self.evaluation.stride}: windows of {self.data.sequence.length} frames"
                " (data.sequence.length) would leave frames between them out; take at most that, or null."
            )
        _check_freeze(self)
        _check_cached_features(self)


def _check_freeze(config: Config) -> None:
    """Refuse a frozen backbone that is told to train, and one that is not frozen and has no way to."""
    backbone, training = config.model.backbone, config.training
    if backbone is None:
        return
    quantization, lora = active(training.quantization), active(training.lora)
    trains = {
        f"training.trainable={training.trainable}": training.trainable in ("all", "norms"),
        "training.quantization.int8_trainable=true": quantization is not None and quantization.int8_trainable,
        "training.quantization.llm_int8_has_fp16_weight=true": (
            quantization is not None and quantization.llm_int8_has_fp16_weight
        ),
    }
    for setting, is_set in trains.items():
        if backbone.freeze and is_set:
            raise UserError(f"model.backbone.freeze=true and {setting} contradict each other: change one of them.")
    if not backbone.freeze and training.trainable == "nothing" and lora is None:
        raise UserError(
            "model.backbone.freeze=false, but nothing of the backbone trains: training.trainable=nothing and "
            "there is no training.lora. Add adapters (--training qlora), set training.trainable=norms, or say "
            "model.backbone.freeze=true to train the decoder alone."
        )


def _check_cached_features(config: Config) -> None:
    """Features can be kept where nothing changes them: neither training nor augmentation."""
    if not config.training.cache_features:
        return
    problem = None
    lora = config.training.lora
    if config.model.backbone is None:
        problem = "this model has no backbone: set it to false"
    elif not config.model.backbone.freeze or (lora is not None and lora.enabled):
        problem = "the backbone trains: set model.backbone.freeze=true and training.lora=null"
    elif not config.data.augment.only_flips:
        problem = (
            "augmentation changes the pictures: set data.augment.enabled=false, or leave flips alone with"
            " data.augment.crop=null 'data.augment.scale=[1,1]' and brightness, contrast, saturation, blur and noise"
            " at 0"
        )
    elif config.data.cache != "disk":
        problem = "it lies beside the cache of frames: set data.cache=disk"
    if problem:
        raise UserError(
            f"training.cache_features=true keeps what a frozen backbone makes of each frame, and {problem}."
        )


def compose(
    data: str, model: str, training: str, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> Config:
    """Compose a configuration from one YAML per section and overrides.

    Args:
        data: name of a file in ``configs/data``, without ``.yaml``; likewise model and training.
        model: likewise.
        training: likewise.
        overrides: ``section.key=value``, the value in YAML; ``null`` switches a part off.
        config_dir: a folder with ``data/``, ``model/``, ``training/`` of your own, which is looked into first.

    Raises:
        UserError: an unknown name or key, a wrong type or a value outside its choice; names the key.
    """
    merged = OmegaConf.structured(Config)
    for section, name in (("data", data), ("model", model), ("training", training)):
        path = _find(section, name, config_dir)
        merged = _merge(merged, OmegaConf.create({section: _read_section(path, section)}), str(path))
    return to_config(apply_overrides(merged, overrides))


def compose_data(name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> DataConfig:
    """Compose the data section alone; a setting of another section is an error, because nothing would read it."""
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in SECTIONS and section != "data":
            raise UserError(f"'{override}': this command reads the data section alone; leave it out.")
    path = _find("data", name, config_dir)
    merged = _merge(OmegaConf.structured(Config), OmegaConf.create({"data": _read_section(path, "data")}), str(path))
    return to_config(apply_overrides(merged, overrides)).data


def apply_overrides(merged: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Merge ``section.key=value`` arguments into a structured configuration."""
    for override in overrides:
        override = current_override(override)
        key, _, text = override.partition("=")
        section = key.partition(".")[0]
        if section not in SECTIONS:
            raise UserError(
                f"'{override}': there is no section '{section}' (sections: {', '.join(SECTIONS)})"
                f"{nearest(section, SECTIONS) or suggest(key, Config)}"
            )
        try:
            hint = hint_of(key, Config)
        except KeyError:
            raise UserError(f"'{override}': there is no setting '{key}'{suggest(key, Config)}") from None
        value: Any = Reader(f"'{override}'", allows_references=True).read_argument(text, hint, key)
        for name in reversed(key.split(".")):
            value = {name: value}
        merged = _merge(merged, OmegaConf.create(value), f"'{override}'", key)
    return merged


def to_config(merged: DictConfig) -> Config:
    """Turn a merged tree into dataclasses, which check their values."""
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(explain(error, "configuration", Config)) from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a saved configuration; equal to the one that was saved, but for the overrides."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. --run takes the folder of a run, <output-dir>/runs/<run_id>.")
    content = _read_yaml(path, Config, allows_references=False)
    if missing := [section for section in SECTIONS if section not in content]:
        raise UserError(f"{path}: damaged ({', '.join(missing)} missing); a run's configuration is saved whole.")
    content = rename_keys(content, str(path))
    merged = _merge(OmegaConf.structured(Config), OmegaConf.create(content), str(path))
    return to_config(apply_overrides(merged, overrides))


def _find(section: str, name: str, config_dir: Path | None) -> Path:
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder.")
    for folder in (config_dir, BUILT_IN):
        if folder is not None and (folder / section / f"{name}.yaml").is_file():
            return folder / section / f"{name}.yaml"
    names = config_names(section, config_dir)
    raise UserError(
        f"--{section} {name}: there is no configs/{section}/{name}.yaml (there are: {', '.join(names)})"
        f"{nearest(name, names)}"
    )


def _read_section(path: Path, section: str) -> dict:
    content = _read_yaml(path, member_hint(Config, section), allows_references=True)
    return rename_keys({section: content}, str(path))[section]


def _read_yaml(path: Path, hint: object, allows_references: bool) -> dict:
    content = Reader(str(path), allows_references).read_file(path, hint)
    content = {} if content is None else content  # a mode that changes nothing is a file of comments
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines at the top, found a {type(content).__name__}.")
    return content


def _merge(base: DictConfig, other: DictConfig, source: str, key: str | None = None) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, other))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(explain(error, source, Config, key)) from error

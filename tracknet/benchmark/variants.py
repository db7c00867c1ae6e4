"""Variants that are compared: modes as shipped, each ingredient added alone, and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tracknet.config import Config, compose
from tracknet.errors import UserError
from tracknet.quantization.apply import active

# Keys and overrides that the variants are built from.
LEVEL = "training.memory_optimization.gradient_checkpointing"
NONE, FULL = f"{LEVEL}=none", f"{LEVEL}=full"
ALL, HALF = "training.train_last_blocks=null", "training.train_last_blocks=50%"
OFFLOAD = "training.memory_optimization.use_cpu_offload=true"
KERNELS = {"Triton": "training.int8_kernel=triton", "bitsandbytes' operators": "training.int8_kernel=bitsandbytes"}
OPTIMIZER = "training.optimizer.name=adamw8bit"
FROZEN = ("training.trainable=nothing",)
CONTROLS = ("frozen", "lora")  # training sections without quantization that every mode is compared with
# Features of a frozen backbone can be cached only if the frames are not augmented.
CACHED = ("training.cache_features=true", "data.augment.enabled=false")
# Batch size and precision differ between the modes as shipped; shared values make them do the same work.
SHARED = ("training.batch_size=8", "training.precision=bf16")
# Keys that define a mode. Setting one of them for all modes would make the modes equal.
OF_A_MODE = (
    "training.quantization",
    "training.lora",
    "training.memory_optimization",
    "training.trainable",
    "training.train_last_blocks",
    "training.optimizer.name",
    "model.backbone.freeze",
)


@dataclass(frozen=True)
class Subject:
    """Data and model that the modes are compared on.

    Attributes:
        data: name of the data section.
        model: name of the model section.
        overrides: ``section.key=value`` overrides of the user, applied to every mode.
        config_dir: folder with the user's own configurations, or ``None``.

    Raises:
        UserError: if an override sets a key that defines a mode.
    """

    data: str
    model: str
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None

    def __post_init__(self) -> None:
        for override in self.overrides:
            if override.startswith(OF_A_MODE):
                raise UserError(
                    f"'{override}' cannot be overridden here: the modes differ in this key, and the override would"
                    " apply to all of them. Write it to your own DIR/training/NAME.yaml, and use --config-dir DIR"
                    " --modes NAME."
                )

    def compose(self, mode: str, *changes: str) -> Config:
        """Return the configuration of a mode on this data and model.

        Args:
            mode: name of the training section.
            changes: further overrides, which take precedence over those of the user.
        """
        return compose(self.data, self.model, mode, [*SHARED, *self.overrides, *changes], self.config_dir)


@dataclass(frozen=True)
class Variant:
    """Configuration that is measured, and its row in a table.

    Attributes:
        name: title of the row.
        config: complete configuration.
        compiled: whether the blocks are compiled with ``torch.compile``.
    """

    name: str
    config: Config
    compiled: bool = False


def shipped(subject: Subject, modes: list[str]) -> list[Variant]:
    """Return the modes as shipped, that is, as configured by their YAML files."""
    return [Variant(mode, subject.compose(mode)) for mode in modes]


def ingredients(subject: Subject) -> list[Variant]:
    """Return full fine-tuning with one change at a time, then int8 and QLoRA assembled step by step.

    Each quantized step stands beside the same one with weights in 16 bits, which shows what quantization itself saves.
    """
    rows = [
        ("full fine-tuning", "default", (NONE,)),
        ("full, 8-bit optimizer", "default", (NONE, OPTIMIZER)),
        ("full, checkpointing of blocks", "default", (f"{LEVEL}=blocks",)),
        ("full, checkpointing in full", "default", (FULL,)),
        ("full, activations in host memory", "default", (NONE, OFFLOAD)),
        ("full, last half of the blocks", "default", (NONE, HALF)),
        ("frozen backbone, 16 bit", "frozen", (NONE,)),
        ("frozen backbone, NF4", "qlora", (NONE, ALL, "training.lora=null", *FROZEN)),
        ("norms, 16 bit", "default", (NONE, "training.trainable=norms")),
        ("norms, int8", "int8", (NONE, ALL)),
        ("norms, 16 bit, checkpointing in full", "default", (FULL, "training.trainable=norms")),
        ("norms, int8, checkpointing in full", "int8", (FULL, ALL)),
        ("int8.yaml, checkpointing in full", "int8", (FULL,)),
        ("int8.yaml, in full, 8-bit optimizer", "int8", (FULL, OPTIMIZER)),
        ("int8.yaml, in full, 8-bit optimizer, offload", "int8", (FULL, OPTIMIZER, OFFLOAD)),
        ("LoRA, 16 bit", "lora", (NONE,)),
        ("LoRA, NF4", "qlora", (NONE, ALL)),
        ("LoRA, 16 bit, checkpointing in full", "lora", (FULL,)),
        ("LoRA, NF4, checkpointing in full", "qlora", (FULL, ALL)),
        ("qlora.yaml, checkpointing in full", "qlora", (FULL,)),
        ("qlora.yaml, in full, 8-bit optimizer", "qlora", (FULL, OPTIMIZER)),
        ("qlora.yaml, in full, 8-bit optimizer, offload", "qlora", (FULL, OPTIMIZER, OFFLOAD)),
    ]
    return [Variant(name, subject.compose(mode, *changes)) for name, mode, changes in rows]


def timed(subject: Subject, modes: list[str], compiled: bool, fused: bool = False) -> list[Variant]:
    """Return the variants to time: modes with and without checkpointing, and the controls in 16 bit.

    The controls are a frozen backbone, a frozen backbone with cached features, and LoRA, unless they are among the
    modes. Models without a backbone have neither checkpointing nor controls.

    Args:
        subject: data and model of the benchmark.
        modes: names of the modes.
        compiled: whether to add each mode with compiled blocks.
        fused: whether to add each int8 mode with each of its kernels.
    """
    rows: list[Variant] = []
    for mode in modes:
        config = subject.compose(mode)
        rows.append(Variant(mode, config))
        if config.model.backbone is None:
            continue
        # The extremes of checkpointing, unless the mode is one of them. Without a budget, it plans for none.
        memory = config.training.memory_optimization
        own = "none" if memory.checkpointing == "auto" and memory.budget == "free" else memory.checkpointing
        for level, label in (("none", "no checkpointing"), ("full", "checkpointing in full")):
            if level != own:
                rows.append(Variant(f"{mode}, {label}", subject.compose(mode, f"{LEVEL}={level}")))
        if compiled:
            rows.append(Variant(f"{mode}, no checkpointing, compiled", subject.compose(mode, f"{LEVEL}=none"), True))
        quantization = active(config.training.quantization)
        if fused and quantization is not None and quantization.load_in_8bit:
            for name, kernel in KERNELS.items():
                rows.append(
                    Variant(f"{mode}, no checkpointing, {name}", subject.compose(mode, f"{LEVEL}=none", kernel))
                )
    if subject.compose(modes[0]).model.backbone is not None:
        rows += [Variant(mode, subject.compose(mode)) for mode in CONTROLS if mode not in modes]
        rows.append(Variant("frozen, features cached", subject.compose("frozen", *CACHED)))
    return rows

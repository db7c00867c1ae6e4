"""What is compared: modes as they ship, each ingredient added alone, and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tracknet.config import Config, compose
from tracknet.errors import UserError
from tracknet.quantization.apply import active

LEVEL = "training.memory_optimization.gradient_checkpointing"
OFFLOAD = "training.memory_optimization.use_cpu_offload=true"
KERNELS = {"Triton": "training.int8_kernel=triton", "bitsandbytes' operators": "training.int8_kernel=bitsandbytes"}
OPTIMIZER = "training.optimizer.name=adamw8bit"
LORA = ("training.lora.r=16", "training.lora.lora_alpha=32", "training.lora.lora_dropout=0.1")
FROZEN = ("model.backbone.freeze=true",)
# Pictures as they are, so that a frozen backbone's features can be kept.
CACHED = (*FROZEN, "training.cache_features=true", "data.augment.enabled=false")
# The same work in the same arithmetic: what modes ship with differs in both.
SHARED = ("training.batch_size=8", "training.precision=bf16")
# What makes a mode what it is; all modes would become the same.
OF_A_MODE = (
    "training.quantization",
    "training.lora",
    "training.memory_optimization",
    "training.trainable",
    "training.optimizer.name",
    "model.backbone.freeze",
)


@dataclass(frozen=True)
class Subject:
    """What the modes are tried on.

    Attributes:
        data: name of the data section.
        model: name of the model section.
        overrides: the user's, on every mode.
        config_dir: folder with YAML of the user's own.
    """

    data: str
    model: str
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None

    def __post_init__(self) -> None:
        for override in self.overrides:
            if override.startswith(OF_A_MODE):
                raise UserError(
                    f"'{override}' is what modes differ in, and would be set for all of them: write it into a YAML of"
                    " your own and name it in --modes (--config-dir DIR, with DIR/training/NAME.yaml)."
                )

    def compose(self, mode: str, *changes: str) -> Config:
        """Return a mode's configuration on this work, with changes of our own."""
        return compose(self.data, self.model, mode, [*SHARED, *self.overrides, *changes], self.config_dir)


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: for people.
        config: what is built.
        compiled: blocks go through ``torch.compile``.
    """

    name: str
    config: Config
    compiled: bool = False


def shipped(subject: Subject, modes: list[str]) -> list[Variant]:
    """Modes as their YAML says."""
    return [Variant(mode, subject.compose(mode)) for mode in modes]


def ingredients(subject: Subject) -> list[Variant]:
    """Full fine-tuning with one thing changed at a time, then int8 and QLoRA put together step by step."""
    rows = [
        ("full fine-tuning", "default", ()),
        ("full, 8-bit optimizer", "default", (OPTIMIZER,)),
        ("full, checkpointing of blocks", "default", (f"{LEVEL}=blocks",)),
        ("full, checkpointing in full", "default", (f"{LEVEL}=full",)),
        ("full, activations in host memory", "default", (OFFLOAD,)),
        ("frozen backbone, 16 bit", "default", FROZEN),
        ("LoRA, 16 bit", "default", LORA),
        ("int8 weights", "int8", (f"{LEVEL}=none",)),
        ("int8 weights, LoRA", "int8", (f"{LEVEL}=none", "training.trainable=auto", *LORA)),
        ("int8.yaml (checkpointing in full)", "int8", (f"{LEVEL}=full",)),
        ("int8.yaml, 8-bit optimizer", "int8", (f"{LEVEL}=full", OPTIMIZER)),
        ("int8.yaml, 8-bit optimizer, offload", "int8", (f"{LEVEL}=full", OPTIMIZER, OFFLOAD)),
        ("NF4 weights, frozen", "qlora", (f"{LEVEL}=none", "training.lora=null", *FROZEN)),
        ("NF4 weights, LoRA", "qlora", (f"{LEVEL}=none",)),
        ("qlora.yaml (checkpointing in full)", "qlora", (f"{LEVEL}=full",)),
        ("qlora.yaml, 8-bit optimizer", "qlora", (f"{LEVEL}=full", OPTIMIZER)),
        ("qlora.yaml, 8-bit optimizer, offload", "qlora", (f"{LEVEL}=full", OPTIMIZER, OFFLOAD)),
    ]
    return [Variant(name, subject.compose(mode, *changes)) for name, mode, changes in rows]


def timed(subject: Subject, modes: list[str], compiled: bool, fused: bool = False) -> list[Variant]:
    """Modes with and without checkpointing, compiled, with fused int8 kernels, and the controls: frozen backbone and
    LoRA in 16 bit."""
    rows: list[Variant] = []
    for mode in modes:
        config = subject.compose(mode)
        rows.append(Variant(mode, config))
        if config.model.backbone is None:
            continue
        other = "full" if config.training.memory_optimization.checkpointing == "none" else "none"
        label = "checkpointing in full" if other == "full" else "no checkpointing"
        rows.append(Variant(f"{mode}, {label}", subject.compose(mode, f"{LEVEL}={other}")))
        if compiled:
            rows.append(Variant(f"{mode}, no checkpointing, compiled", subject.compose(mode, f"{LEVEL}=none"), True))
        quantization = active(config.training.quantization)
        if fused and quantization is not None and quantization.load_in_8bit:
            for name, kernel in KERNELS.items():
                rows.append(
                    Variant(f"{mode}, no checkpointing, {name}", subject.compose(mode, f"{LEVEL}=none", kernel))
                )
    if subject.compose(modes[0]).model.backbone is not None:
        rows.append(Variant("frozen backbone, 16 bit", subject.compose("default", *FROZEN)))
        rows.append(Variant("frozen backbone, features cached", subject.compose("default", *CACHED)))
        rows.append(Variant("LoRA, 16 bit", subject.compose("default", *LORA)))
    return rows

"""Advice for a run from its memory estimate: the expected peak, and the settings that would reduce it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tracknet.memory.checkpointing import Level
from tracknet.models.heatmap_model import ModelConfig
from tracknet.planning.estimate import MemoryEstimate, estimate_memory
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.apply import QuantizationConfig, active
from tracknet.training.config import TrainingConfig

# Levels of checkpointing, from the least to the most memory saved.
LEVELS: tuple[Level, ...] = ("none", "selective", "blocks", "full")
_ESTIMATES: dict[str, MemoryEstimate] = {}  # cache of all planners, by everything that the bytes depend on
WORTH = 0.02  # smallest saving, as a share of the peak, for which a setting is suggested


@dataclass(frozen=True)
class Planner:
    """Memory plan of a configuration and of its alternatives.

    Attributes:
        model: model configuration.
        training: training configuration, with the mode and the memory settings.
        num_frames: frames per window.
        input_wh: width and height of the frames in pixels.
        device: ``cuda`` or ``cpu``, which decides what can be offloaded.
    """

    model: ModelConfig
    training: TrainingConfig
    num_frames: int
    input_wh: tuple[int, int]
    device: str = "cuda"

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of checkpointing that the configuration allows, from the least to the most memory saved."""
        memory = self.training.memory_optimization
        if memory.checkpointing != "auto":
            return (memory.checkpointing,)
        if self.model.backbone is None:
            return ("none",)
        # Offload takes much more time than recomputation, and frees most memory where blocks are recomputed.
        if memory.use_disk_offload or (memory.use_cpu_offload and self.device == "cuda"):
            return ("full",)
        return tuple(level for level in LEVELS if self._supports(level))

    def _supports(self, level: Level) -> bool:
        """Return whether checkpointing at a level can be combined with the other settings."""
        return level != "selective" or not (self.training.compile or self.training.memory_optimization.offloads)

    def at(self, level: Level) -> Planner:
        """Return the planner of the same configuration at one level of checkpointing."""
        memory = replace(self.training.memory_optimization, gradient_checkpointing=level, budget="free")
        return replace(self, training=replace(self.training, memory_optimization=memory))

    def full_fine_tuning(self) -> Planner:
        """Return the planner of full fine-tuning of the same model, without any technique that saves memory."""
        model = self.model
        if model.backbone is not None:
            model = replace(model, backbone=replace(model.backbone, freeze=False))
        # The defaults train all weights with AdamW. Of the other settings, only these change the bytes.
        training = TrainingConfig(precision=self.training.precision, loss=self.training.loss)
        return replace(self, model=model, training=training).at("none")

    @property
    def estimate(self) -> MemoryEstimate:
        """Bytes of a training step; the first access takes seconds.

        If checkpointing is ``auto``, this is the step that recomputes the least.
        """
        if self.training.memory_optimization.checkpointing == "auto":
            return self.at(self.levels[0]).estimate
        t = self.training
        # Everything that the bytes depend on. Many configurations differ only in other settings and share an estimate.
        key = repr(
            (
                self.model,
                self.num_frames,
                self.input_wh,
                self.device,
                t.precision,
                t.optimizer.name,
                t.loss,
                t.quantization,
                t.lora,
                t.trainable,
                t.train_last_blocks,
                t.memory_optimization,
            )
        )
        if key not in _ESTIMATES:
            _ESTIMATES[key] = estimate_memory(self.model, t, self.num_frames, self.input_wh, self.device)
        return _ESTIMATES[key]

    def alternatives(self) -> Iterator[tuple[str, Planner]]:
        """Yield each setting that takes less memory, as on the command line, with the planner of that configuration.

        The settings come from the mildest (more checkpointing) to the last resort (smaller frames).
        """
        training, memory = self.training, self.training.memory_optimization

        def changed(**settings: Any) -> Planner:
            return replace(self, training=replace(training, **settings))

        # Settings of the backbone: more checkpointing, and quantized weights with adapters.
        if self.model.backbone is not None:
            (current,) = self.levels
            for level in LEVELS[LEVELS.index(current) + 1 :]:
                if self._supports(level):
                    yield (
                        f"training.memory_optimization.gradient_checkpointing={level}",
                        changed(memory_optimization=replace(memory, gradient_checkpointing=level)),
                    )
            if active(training.quantization) is None or active(training.lora) is None:
                qlora = {
                    "quantization": QuantizationConfig(load_in_4bit=True),
                    "lora": LoraConfig(),
                    "trainable": "auto",
                    "train_last_blocks": "50%",
                }
                yield "--training qlora", changed(**qlora)
        if training.optimizer.name == "adamw":
            name: Literal["adamw8bit"] = "adamw8bit"
            yield f"training.optimizer.name={name}", changed(optimizer=replace(training.optimizer, name=name))
        # Host memory first, because files are much slower; a CPU gains from files only.
        kind = "cpu" if self.device == "cuda" and not memory.use_cpu_offload else "disk"
        if kind == "cpu" or not memory.use_disk_offload:
            setting = f"training.memory_optimization.use_{kind}_offload=true"
            offload: dict[str, Any] = {f"use_{kind}_offload": True}
            if memory.checkpointing == "selective":  # which offload does not support
                setting += " training.memory_optimization.gradient_checkpointing=full"
                offload["gradient_checkpointing"] = "full"
            yield setting, changed(memory_optimization=replace(memory, **offload))
        # Three quarters of the size, rounded to the multiples of 8 pixels that a model takes.
        width, height = (max(8, round(side * 0.75 / 8) * 8) for side in self.input_wh)
        yield (
            f"data.preprocess.resize=[{width},{height}] (also makes the ball smaller)",
            replace(self, input_wh=(width, height)),
        )

    def suggest_settings(self, micro_batch: int) -> str:
        """Return advice for micro-batches of this size: the largest kind of memory, and up to three settings.

        The settings are those that save the most; one that saves 2% of the peak or less is left out.
        """
        kinds = self.estimate.bytes_by_kind(micro_batch)
        peak, (largest, size) = sum(kinds.values()), max(kinds.items(), key=lambda item: item[1])
        lines = [
            f"A step takes {peak / 1e6:,.0f} MB, most of it ({size / 1e6:,.0f} MB) for {largest.replace('_', ' ')}."
        ]
        savings = [(peak - other.estimate.peak_bytes(micro_batch), setting) for setting, other in self.alternatives()]
        best = [
            f"  {setting}: {saved / 1e6:,.0f} MB less"
            for saved, setting in sorted(savings, reverse=True)[:3]
            if saved > WORTH * peak
        ]
        return "\n".join([*lines, "What would save most:", *best] if best else lines)

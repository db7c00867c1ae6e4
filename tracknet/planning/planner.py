"""What the plan says to a run: how large to begin, what to expect, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tracknet.models.heatmap_model import ModelConfig
from tracknet.planning.estimate import MemoryEstimate, estimate_memory
from tracknet.quantization.apply import QuantizationConfig, active
from tracknet.quantization.lora import LoraConfig
from tracknet.training.config import TrainingConfig

LEVELS = ("none", "blocks", "full")
_ESTIMATES: dict[str, MemoryEstimate] = {}
WORTH = 0.02  # of the peak: less is no advice


@dataclass(frozen=True)
class Planner:
    """The plan of one configuration, and of its neighbors.

    Attributes:
        model: which network.
        training: the mode.
        num_frames: frames per window.
        input_wh: size of the frames.
        device: ``cuda`` or ``cpu``; says what offload can do.
    """

    model: ModelConfig
    training: TrainingConfig
    num_frames: int
    input_wh: tuple[int, int]
    device: str = "cuda"

    @property
    def estimate(self) -> MemoryEstimate:
        """Bytes of a step; takes seconds the first time."""
        t = self.training
        # All that the bytes depend on: many configurations differ in other things only.
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
                t.memory_optimization,
            )
        )
        if key not in _ESTIMATES:
            _ESTIMATES[key] = estimate_memory(self.model, t, self.num_frames, self.input_wh, self.device)
        return _ESTIMATES[key]

    def alternatives(self) -> Iterator[tuple[str, Planner]]:
        """Settings that take less memory, with the plan of each."""
        training, memory = self.training, self.training.memory_optimization

        def changed(**settings: Any) -> Planner:
            return replace(self, training=replace(training, **settings))

        if self.model.backbone is not None:
            for level in LEVELS[LEVELS.index(memory.checkpointing) + 1 :]:
                yield (
                    f"training.memory_optimization.gradient_checkpointing={level}",
                    changed(memory_optimization=replace(memory, gradient_checkpointing=level)),
                )
            if active(training.quantization) is None or active(training.lora) is None:
                qlora = {
                    "quantization": QuantizationConfig(load_in_4bit=True),
                    "lora": LoraConfig(),
                    "trainable": "auto",
                }
                yield "--training qlora", changed(**qlora)
        if training.optimizer.name == "adamw":
            name: Literal["adamw8bit"] = "adamw8bit"
            yield f"training.optimizer.name={name}", changed(optimizer=replace(training.optimizer, name=name))
        if self.device == "cuda" and not memory.use_cpu_offload:
            yield (
                "training.memory_optimization.use_cpu_offload=true",
                changed(memory_optimization=replace(memory, use_cpu_offload=True)),
            )
        elif not memory.use_disk_offload:
            yield (
                "training.memory_optimization.use_disk_offload=true",
                changed(memory_optimization=replace(memory, use_disk_offload=True)),
            )
        width, height = (max(8, round(side * 0.75 / 8) * 8) for side in self.input_wh)
        yield (
            f"data.preprocess.resize=[{width},{height}] (a smaller ball, too)",
            replace(self, input_wh=(width, height)),
        )

    def suggest_settings(self, micro_batch: int) -> str:
        """Say what a step with such micro-batches takes most for, and which three settings would save most."""
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

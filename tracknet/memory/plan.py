"""How many bytes a training step takes, known before it is run: no GPU, no weights, any size of model.

The real model is built on the meta device, quantised and adapted as for training, and one step of it is run on fake
tensors, which have shapes and dtypes but no content. Storages are counted as in ``meter.LiveBytes``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tracknet.memory.checkpointing import checkpoint_
from tracknet.memory.meter import LiveBytes
from tracknet.models.heatmap_model import HeatmapModel, ModelConfig, build_model
from tracknet.quantization.apply import apply_mode
from tracknet.quantization.precision import DTYPES
from tracknet.training.config import TrainingConfig
from tracknet.training.losses import heatmap_loss

CONTEXT_BYTES = 600_000_000  # what CUDA and its libraries hold before the first tensor
ALLOCATOR_SHARE = 0.94  # of the rest; the allocator rounds up and leaves gaps


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step by kind.

    Attributes:
        weights: frozen weights, scales and buffers.
        trained_weights: weights that train.
        gradients: of those.
        optimizer: its state.
        once: activations that do not grow with the micro-batch (16-bit copies of weights).
        per_window: activations and temporary tensors at the peak, for each window of the micro-batch.
        update: temporary tensors of the optimizer's step.
    """

    weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    once: int
    per_window: int
    update: int

    @property
    def persistent(self) -> int:
        """Bytes that are there between steps, and gradients."""
        return self.weights + self.trained_weights + self.gradients + self.optimizer

    def peak_bytes(self, micro_batch: int) -> int:
        """Peak of a step whose gradients are accumulated over micro-batches of this size."""
        return self.persistent + max(self.once + micro_batch * self.per_window, self.update)

    def bytes_by_kind(self, micro_batch: int) -> dict[str, int]:
        """What the peak is made of."""
        return {
            "weights": self.weights, "trained_weights": self.trained_weights, "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.peak_bytes(micro_batch) - self.persistent,
        }  # fmt: skip

    def largest_micro_batch(self, gpu_bytes: int, batch: int) -> int:
        """Windows that fit into a GPU of this size at once, at most the batch; 0 = not even one."""
        room = int((gpu_bytes - CONTEXT_BYTES) * ALLOCATOR_SHARE) - self.persistent
        if room < self.update:
            return 0
        return max(0, min(batch, (room - self.once) // self.per_window))


def estimate(model: ModelConfig, training: TrainingConfig, num_frames: int, input_wh: tuple[int, int]) -> Footprint:
    """Count the bytes of a training step.

    Args:
        model: which network; only its architecture is looked at, never its weights.
        training: the mode.
        num_frames: frames per window.
        input_wh: size of the frames.

    Raises:
        UserError: what training would refuse too, or an architecture whose config.json cannot be had.
    """

    built = _build(model, training, num_frames, input_wh)
    one, two = (_measure(built, training, windows, input_wh) for windows in (1, 2))
    sizes = {name: t.numel() * t.element_size() for name, t in built.state_dict().items()}
    trained = {n: p for n, p in built.named_parameters() if p.requires_grad}
    codes = {f"{n}.weight" for n, m in built.named_modules() if hasattr(m, "gradient_of")}
    trained_bytes = sum(size for name, size in sizes.items() if name in trained or name in codes)
    total = sum(sizes.values()) + sum(b.numel() * b.element_size() for n, b in built.named_buffers() if n not in sizes)
    per_window = two - one
    return Footprint(
        weights=total - trained_bytes,
        trained_weights=trained_bytes,
        gradients=sum(4 * p.numel() for p in trained.values()),
        optimizer=sum(_state_bytes(p.numel(), training.optimizer.name) for p in trained.values()),
        once=max(0, one - per_window),
        per_window=per_window,
        update=_update_bytes(trained, training.optimizer.name, bool(codes)),
    )


def _build(model: ModelConfig, training: TrainingConfig, num_frames: int, input_wh: tuple[int, int]) -> HeatmapModel:
    if model.backbone is not None:
        model = replace(model, backbone=replace(model.backbone, weights="random", revision=None))
    if training.quantization is not None:
        # Outlier columns depend on the content; few and small, they do not count.
        training = replace(training, quantization=replace(training.quantization, llm_int8_threshold=0.0))
    if training.quantization is not None and training.quantization.load_in_4bit:
        import bitsandbytes.functional as bnb

        # bitsandbytes would make this table on the first tensor's device, and keep it for all that come later.
        bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())
    with torch.device("meta"):
        built = build_model(model, num_frames, input_wh)
    apply_mode(built, training.precision, training.quantization, training.lora, torch.device("meta"),
               training.backbone_trains, initialise=False)  # fmt: skip
    # 16 bits are 16 bits; bf16 is what a CPU's autocast knows.
    built.compute_dtype = torch.float32 if DTYPES[training.precision] == torch.float32 else torch.bfloat16
    for module in built.modules():
        if hasattr(module, "compute_dtype") and module is not built:
            module.compute_dtype = torch.float32 if module.compute_dtype == torch.float32 else torch.bfloat16
    if training.memory_optimization.checkpointing != "none":
        checkpoint_(built, training.memory_optimization.checkpointing)
    return built.train()


def _measure(model: HeatmapModel, training: TrainingConfig, windows: int, input_wh: tuple[int, int]) -> int:
    """Return the peak of forward and backward, without weights, gradients and what else stays."""
    width, height = input_wh
    _forget_cached(model)
    with FakeTensorMode(), torch.device("cpu"):
        _to_fake_(model)
        batch = {
            "frames": torch.empty(windows, model.num_frames, 3, height, width, dtype=torch.uint8),
            "xy": torch.empty(windows, model.num_frames, 2), "visible": torch.empty(windows, model.num_frames, dtype=torch.bool),
            "weight": torch.empty(windows, model.num_frames),
        }  # fmt: skip
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:  # as from the second micro-batch on
            parameter.grad = torch.empty(parameter.shape)
        existing = [*model.parameters(), *model.buffers(), *(p.grad for p in trained)]
        with LiveBytes(existing) as meter:
            (heatmap_loss(model(batch["frames"]), batch, training.loss) / 1.0).backward()
    _forget_cached(model)
    return meter.peak + sum(t.numel() * t.element_size() for t in batch.values())


def _forget_cached(model: HeatmapModel) -> None:
    """Empty the caches in which some of transformers' models keep tensors by size; fake ones must not meet real ones."""
    if model.backbone is None:
        return
    for function in vars(sys.modules[type(model.backbone.hf).__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _to_fake_(model: nn.Module) -> None:
    """Replace meta tensors by fake ones of the CPU, whose autocast and operators behave as on a device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                shape = () if name == "gradient_of" else tensor.shape
                fake = torch.empty(shape, dtype=tensor.dtype)
                fake = fake.expand(tensor.shape) if name == "gradient_of" else fake
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


def _state_bytes(numel: int, optimizer: str) -> int:
    """Bytes of AdamW's two moments for one parameter."""
    if optimizer.endswith("8bit") and numel >= 4096:  # bitsandbytes keeps smaller ones in 32 bits
        return 2 * numel + 2 * 4 * -(-numel // 256)
    return 8 * numel


def _update_bytes(trained: dict[str, nn.Parameter], optimizer: str, int8: bool) -> int:
    """Bytes that the optimizer's step takes besides."""
    largest = max((p.numel() for p in trained.values()), default=0)
    if int8:
        return 4 * 4 * largest  # one layer in fp32, its new value, noise and quotient
    if optimizer == "adamw":
        return 4 * sum(p.numel() for p in trained.values())  # torch takes the root of all second moments at once
    return 0

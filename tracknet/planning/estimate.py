"""How many bytes a training step takes, known before it is run: no GPU, no weights, any size of model.

The real model is built on the meta device, quantized and adapted as for training, and one step of it is run on fake
tensors, which have shapes and dtypes but no content. Storages are counted as in ``step_meter.StepMeter``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tracknet.memory.checkpointing import PART, checkpoint_
from tracknet.memory.offload import offload_activations
from tracknet.memory.step_meter import KINDS, Peak, StepMeter, split_trained_weights
from tracknet.memory.streaming import stream_weights_
from tracknet.models.heatmap_model import HeatmapModel, ModelConfig, build_model
from tracknet.quantization.apply import apply_mode
from tracknet.quantization.precision import DTYPES
from tracknet.training.config import TrainingConfig
from tracknet.training.losses import heatmap_loss
from tracknet.training.optimizer import check_paged_supported

CONTEXT_BYTES = 600_000_000  # what CUDA and its libraries hold before the first tensor
ALLOCATOR_SHARE = 0.94  # of the rest; the allocator rounds up and leaves gaps


@dataclass
class MemoryEstimate:
    """Bytes of a training step by kind.

    Attributes:
        weights: frozen weights, scales and buffers.
        trained_weights: weights that train.
        gradients: of those.
        optimizer: its state.
        update: temporary tensors of the optimizer's step.
        measure: peak of forward and backward at a number of windows; takes seconds, and remembers.
        parts: windows of the smallest and of the largest part, where blocks go in parts; ``None`` where they do not.
    """

    weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    update: int
    measure: Callable[[int], Peak]
    parts: tuple[int, int] | None = None

    def peak_bytes(self, micro_batch: int) -> int:
        """Peak of a step whose gradients are accumulated over micro-batches of this size."""
        return sum(self.bytes_by_kind(micro_batch).values())

    def bytes_by_kind(self, micro_batch: int) -> dict[str, int]:
        """What the peak is made of, by ``step_meter.KINDS``."""
        activations, temporary = self._at(micro_batch)
        if self.update > activations + temporary:
            activations, temporary = 0, self.update
        return dict(
            zip(KINDS, (self.weights, self.trained_weights, self.gradients, self.optimizer, activations, temporary))
        )

    def largest_micro_batch(self, available: int, batch: int) -> int:
        """Windows, at most the batch, whose step fits into this many bytes at once; 0 = not even one."""
        if self.peak_bytes(batch) <= available:
            return batch
        fits, not_fits = 0, batch
        # Measuring takes seconds: the line between what fits and what does not says where to look next.
        while not_fits - fits > 1:
            low, high = self.peak_bytes(max(1, fits)), self.peak_bytes(not_fits)
            share = (available - low) / max(1, high - low)
            size = min(max(int(fits + share * (not_fits - fits)), fits + 1), not_fits - 1)
            if self.peak_bytes(size) <= available:
                fits = size
            else:
                not_fits = size
        return fits

    def bytes_per_window(self, batch: int) -> int:
        """Activations and temporary tensors, by window, at this number of them."""
        return sum(self._at(batch)) // batch

    def _at(self, windows: int) -> tuple[int, int]:
        """Activations and temporary tensors at the peak; measured where they must be, else on the line through two
        measurements."""
        if self.parts is None or windows <= self.parts[0]:
            first, second = 1, 2
        else:
            # A batch of one part and one of several are put together differently, so the line begins at two parts.
            first, second = 2 * self.parts[1], 3 * self.parts[1]
        if windows > second:
            (a, b), (c, d) = (self._measured(n) for n in (first, second))
            share = (windows - first) / (second - first)
            return max(0, round(a + share * (c - a))), max(0, round(b + share * (d - b)))
        return self._measured(windows)

    def _measured(self, windows: int) -> tuple[int, int]:
        kinds = self.measure(windows).by_kind
        return kinds["activations"], kinds["temporary"]


def usable_bytes(gpu_bytes: int) -> int:
    """What tensors can have of a GPU of this size."""
    return int((gpu_bytes - CONTEXT_BYTES) * ALLOCATOR_SHARE)


def estimate_memory(
    model: ModelConfig, training: TrainingConfig, num_frames: int, input_wh: tuple[int, int], device: str = "cuda"
) -> MemoryEstimate:
    """Count the bytes of a training step.

    Args:
        model: which network; only its architecture is looked at, never its weights.
        training: the mode.
        num_frames: frames per window.
        input_wh: size of the frames.
        device: ``cuda`` or ``cpu``; says what offload can do. The rest is the same for both.

    Raises:
        UserError: what training would refuse too, or an architecture whose config.json cannot be had.
    """
    check_paged_supported(training.optimizer, device)
    memory = training.memory_optimization
    leaves = memory.use_cpu_offload and device == "cuda"
    offload_ctx = "nowhere" if leaves or (memory.use_disk_offload and not memory.use_cpu_offload) else None
    streams = memory.streams_weights and model.backbone is not None and (device == "cuda" or memory.use_disk_offload)
    built, offloaded_bytes = _build(model, training, num_frames, streams, device)
    trained, frozen = (sum(t.numel() * t.element_size() for t in part) for part in split_trained_weights(built))
    pages = memory.offloads and (
        training.optimizer.name == "adamw8bit" if device == "cuda" else memory.use_disk_offload
    )
    gradients = [p.numel() for p in built.parameters() if p.requires_grad]

    @lru_cache
    def measure(windows: int) -> Peak:
        # Streamed copies of one measurement must not meet the next one's; else one model serves for all.
        measured = _build(model, training, num_frames, streams, device)[0] if streams else built
        return _measure(measured, training, windows, input_wh, offload_ctx)

    return MemoryEstimate(
        weights=frozen - offloaded_bytes,
        trained_weights=trained,
        gradients=4 * sum(gradients),
        optimizer=0 if pages else sum(_state_bytes(numel, training.optimizer.name) for numel in gradients),
        update=_update_bytes(built),
        measure=measure,
        parts=_parts(built, input_wh, measure) if memory.checkpointing == "full" else None,
    )


def _parts(model: HeatmapModel, input_wh: tuple[int, int], measure: Callable[[int], Peak]) -> tuple[int, int]:
    """Windows of the smallest and the largest part in which a batch goes through blocks, and the decoder if it is the
    peak."""
    (width, height), backbone = input_wh, model.backbone
    assert backbone is not None, "only a backbone is gone through in parts"
    if backbone.family.kind == "vit":
        patch = backbone.patch_size
        of_a_frame = [math.ceil(width / patch) * math.ceil(height / patch) * backbone.channels[0]]
    else:
        of_a_frame = [
            channels * math.ceil(width / 32) * math.ceil(height / 32) * (8 // 2**i) ** 2
            for i, channels in enumerate(backbone.hf.config.hidden_sizes)
        ]
    blocks = [max(1, PART // (model.num_frames * values)) for values in of_a_frame]
    decoder = max(1, PART // (model.num_frames * 3 * width * height))
    decides = decoder > max(blocks) and measure(min(decoder, 2 * max(blocks))).place.startswith("head")
    return min(decoder, *blocks), decoder if decides else max(blocks)


def _build(
    model: ModelConfig, training: TrainingConfig, num_frames: int, streams: bool, device: str
) -> tuple[HeatmapModel, int]:
    """Return the model as it is trained, and the bytes of its weights that wait elsewhere."""
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
        built = build_model(model, num_frames)
    apply_mode(built, training.mode, torch.device("meta"), initialize=False)
    # 16 bits are 16 bits; bf16 is what a CPU's autocast knows.
    built.compute_dtype = torch.float32 if DTYPES[training.precision] == torch.float32 else torch.bfloat16
    module: Any
    for module in built.modules():
        if hasattr(module, "compute_dtype") and module is not built:
            module.compute_dtype = torch.float32 if module.compute_dtype == torch.float32 else torch.bfloat16
    offloaded_bytes = 0
    if streams:
        # Copies that come to a GPU count; files are computed from as they are.
        offloaded_bytes = stream_weights_(built, torch.device("cpu"), None, torch.clone if device == "cuda" else None)
    if training.memory_optimization.checkpointing != "none":
        checkpoint_(built, training.memory_optimization.checkpointing)
    return built.train(), offloaded_bytes


def _measure(
    model: HeatmapModel, training: TrainingConfig, windows: int, input_wh: tuple[int, int], offload_ctx: str | None
) -> Peak:
    """Return the peak of forward and backward; its activations and temporary tensors are what is wanted of it."""
    width, height = input_wh
    _forget_cached(model)
    with FakeTensorMode(), torch.device("cpu"):
        _to_fake_(model)
        batch = {
            "frames": torch.empty(windows, model.num_frames, 3, height, width, dtype=torch.uint8),
            "xy": torch.empty(windows, model.num_frames, 2),
            "visible": torch.empty(windows, model.num_frames, dtype=torch.bool),
            "weight": torch.empty(windows, model.num_frames),
        }
        for parameter in model.parameters():  # as from the second micro-batch on
            parameter.grad = torch.empty(parameter.shape) if parameter.requires_grad else None
        with StepMeter(model, [], list(batch.values())) as meter:
            with offload_activations(model, torch.device("cuda"), offload_ctx):
                loss = heatmap_loss(model(batch["frames"]), batch, training.loss) / 1.0
            loss.backward()
    _forget_cached(model)
    return meter.result()


def _forget_cached(model: HeatmapModel) -> None:
    """Empty the caches in which some of transformers' models keep tensors by size; fake ones must not meet real
    ones."""
    if model.backbone is None:
        return
    for function in vars(sys.modules[type(model.backbone.hf).__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _to_fake_(model: nn.Module) -> None:
    """Replace meta tensors by fake ones of the CPU, whose autocast and operators behave as on a device."""
    for module in model.modules():
        stores: list[Any] = [module._parameters, module._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                shape = () if name == "weight_grad_proxy" else tensor.shape
                fake = torch.empty(shape, dtype=tensor.dtype)
                fake = fake.expand(tensor.shape) if name == "weight_grad_proxy" else fake
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


def _state_bytes(numel: int, optimizer: str) -> int:
    """Bytes of AdamW's two moments for one parameter."""
    if optimizer.endswith("8bit") and numel >= 4096:  # bitsandbytes keeps smaller ones in 32 bits
        return 2 * numel + 2 * 4 * -(-numel // 256)
    return 8 * numel


def _update_bytes(model: HeatmapModel) -> int:
    """Bytes that the optimizer's step takes besides: it updates in place, but for int8 codes, which become fp32 in
    passing."""
    layers = [p.numel() for name, p in model.named_parameters() if name.endswith("weight_grad_proxy")]
    return 4 * 4 * max(layers, default=0)  # one layer, its new value, noise and quotient

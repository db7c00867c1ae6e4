"""Estimate of the memory of a training step before it runs, for any size of model, without a GPU or weights.

The real model is built on the meta device, and quantized and adapted as for training. One step of it then runs on fake
tensors, which have shapes and dtypes but no content. Storages are counted as in ``step_meter.StepMeter``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tracknet.memory.checkpointing import PART, checkpoint_
from tracknet.memory.offload import offload_activations
from tracknet.memory.step_meter import KINDS, StepMeter, StepPeak, split_trained_weights
from tracknet.memory.streaming import stream_weights_
from tracknet.models.heatmap_model import HeatmapModel, ModelConfig, build_model
from tracknet.quantization.apply import apply_mode
from tracknet.quantization.precision import DTYPES
from tracknet.training.config import TrainingConfig
from tracknet.training.losses import heatmap_loss
from tracknet.training.optimizer import check_paged_supported

CONTEXT_BYTES = 600_000_000  # bytes that CUDA and its libraries hold before the first tensor
ALLOCATOR_SHARE = 0.94  # usable share of the remaining memory; the allocator rounds up and leaves gaps


@dataclass
class MemoryEstimate:
    """Bytes of a training step by kind.

    Attributes:
        weights: bytes of frozen weights, scales and buffers.
        trained_weights: bytes of trained weights.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizer's state.
        update: bytes of temporary tensors in the optimizer's step.
        measure: function that returns the peak of forward and backward for a number of windows. It takes seconds and
            caches its results.
        parts: windows of the smallest and of the largest part in which blocks process a batch; ``None`` if they process
            it at once.
    """

    weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    update: int
    measure: Callable[[int], StepPeak]
    parts: tuple[int, int] | None = None

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the peak in bytes of a step that accumulates gradients over micro-batches of this many windows."""
        return sum(self.bytes_by_kind(micro_batch).values())

    def bytes_by_kind(self, micro_batch: int) -> dict[str, int]:
        """Return the bytes at the peak by ``step_meter.KINDS``."""
        activations, temporary = self._step_bytes(micro_batch)
        # The peak may be in the optimizer's step, when the activations are gone.
        if self.update > activations + temporary:
            activations, temporary = 0, self.update
        return dict(
            zip(KINDS, (self.weights, self.trained_weights, self.gradients, self.optimizer, activations, temporary))
        )

    def largest_micro_batch(self, available: int, batch: int) -> int:
        """Return the largest number of windows, at most ``batch``, whose step fits into ``available`` bytes.

        The result is 0 if not even one window fits.
        """
        if self.peak_bytes(batch) <= available:
            return batch
        fits, not_fits = 0, batch
        # Each measurement takes seconds. The peak is close to linear in the windows, so the line between the two bounds
        # gives the next candidate, which takes fewer measurements than bisection.
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
        """Return the bytes of activations and temporary tensors per window, for a micro-batch of ``batch`` windows."""
        return sum(self._step_bytes(batch)) // batch

    def _step_bytes(self, windows: int) -> tuple[int, int]:
        """Return the bytes of activations and of temporary tensors at the peak.

        Small numbers of windows are measured. Larger ones are extrapolated on the line through two measurements.
        """
        if self.parts is None or windows <= self.parts[0]:
            # Every block processes all windows at once, so that both kinds grow linearly from the first window on.
            first, second = 1, 2
        else:
            # A batch of several parts has another composition than a batch of one part, so the line starts at two
            # parts of the largest size.
            first, second = 2 * self.parts[1], 3 * self.parts[1]
        if windows > second:
            (a, b), (c, d) = (self._measured_bytes(n) for n in (first, second))
            share = (windows - first) / (second - first)
            return max(0, round(a + share * (c - a))), max(0, round(b + share * (d - b)))
        return self._measured_bytes(windows)

    def _measured_bytes(self, windows: int) -> tuple[int, int]:
        kinds = self.measure(windows).by_kind
        return kinds["activations"], kinds["temporary"]


def usable_bytes(gpu_bytes: int) -> int:
    """Return the bytes that tensors can use on a GPU with ``gpu_bytes`` of memory."""
    return int((gpu_bytes - CONTEXT_BYTES) * ALLOCATOR_SHARE)


def estimate_memory(
    model: ModelConfig, training: TrainingConfig, num_frames: int, input_wh: tuple[int, int], device: str = "cuda"
) -> MemoryEstimate:
    """Count the bytes of a training step.

    Args:
        model: model configuration; only the architecture is read, never the weights.
        training: training configuration, with the mode and the memory settings.
        num_frames: frames per window.
        input_wh: width and height of the frames in pixels.
        device: ``cuda`` or ``cpu``, which decides what can be offloaded; all else is the same for both.

    Raises:
        UserError: if training would refuse the configuration too, or the architecture's config.json is not available.
    """
    check_paged_supported(training.optimizer, device)
    memory = training.memory_optimization
    # Activations go to host memory with use_cpu_offload, else to files with use_disk_offload. Streamed weights go to
    # either. On a CPU host memory is the device's own memory, so only files free any.
    offloads_to_host = memory.use_cpu_offload and device == "cuda"
    offload_ctx = "nowhere" if offloads_to_host or (memory.use_disk_offload and not memory.use_cpu_offload) else None
    streams = training.streams_weights and model.backbone is not None and (device == "cuda" or memory.use_disk_offload)
    built, offloaded_bytes = build_on_meta(model, training, num_frames, streams, device)
    trained, frozen = (sum(t.numel() * t.element_size() for t in part) for part in split_trained_weights(built))
    # State of the optimizer that leaves the device: paged 8-bit state on a GPU, files on a CPU.
    offloads_state = memory.offloads and (
        training.optimizer.name == "adamw8bit" if device == "cuda" else memory.use_disk_offload
    )
    gradients = [p.numel() for p in built.parameters() if p.requires_grad]

    @lru_cache
    def measure(windows: int) -> StepPeak:
        # A model that streams keeps copies of weights after a measurement, which must not appear in the next one, so
        # each gets a new model. Otherwise one model serves all.
        measured = build_on_meta(model, training, num_frames, streams, device)[0] if streams else built
        return _measure(measured, training, windows, input_wh, offload_ctx)

    return MemoryEstimate(
        weights=frozen - offloaded_bytes,
        trained_weights=trained,
        gradients=4 * sum(gradients),  # fp32
        optimizer=0 if offloads_state else sum(_state_bytes(numel, training.optimizer.name) for numel in gradients),
        update=_update_bytes(built),
        measure=measure,
        parts=_part_sizes(built, input_wh, measure) if memory.checkpointing == "full" else None,
    )


def _part_sizes(model: HeatmapModel, input_wh: tuple[int, int], measure: Callable[[int], StepPeak]) -> tuple[int, int]:
    """Return the windows of the smallest and of the largest part in which blocks and decoder process a batch.

    The decoder's part counts as the largest only if the peak is in the decoder.
    """
    (width, height), backbone = input_wh, model.backbone
    assert backbone is not None, "only a model with a backbone processes a batch in parts"
    # Values of one frame in the input of the blocks of each layer.
    config, family = backbone.hf.config, backbone.family
    h, w = (-(-side // backbone.size_multiple) * backbone.size_multiple for side in (height, width))
    values_per_frame = [
        channels * (h // stride) * (w // stride)
        for channels, stride in zip(family.channels(config), family.strides(config))
    ]
    # Windows per part as in `checkpointing`. The decoder's first argument is the frames, with 3 values per pixel.
    blocks = [max(1, PART // (model.num_frames * values)) for values in values_per_frame]
    decoder = max(1, PART // (model.num_frames * 3 * width * height))
    decoder_is_peak = decoder > max(blocks) and measure(min(decoder, 2 * max(blocks))).place.startswith("head")
    return min(decoder, *blocks), decoder if decoder_is_peak else max(blocks)


def build_on_meta(
    model: ModelConfig, training: TrainingConfig, num_frames: int, streams: bool, device: str
) -> tuple[HeatmapModel, int]:
    """Build the model on the meta device as for training.

    Args:
        model: model configuration.
        training: training configuration.
        num_frames: frames per window.
        streams: whether the frozen weights of blocks are streamed.
        device: ``cuda`` or ``cpu``.

    Returns:
        Model in training mode, and bytes of its weights that are offloaded.
    """
    # The architecture is enough: no weights are read.
    if model.backbone is not None:
        model = replace(model, backbone=replace(model.backbone, weights="random", revision=None))
    if training.quantization is not None:
        # Outlier columns depend on the content of activations. They are few and small, so they are not counted.
        training = replace(training, quantization=replace(training.quantization, llm_int8_threshold=0.0))
    if training.quantization is not None and training.quantization.load_in_4bit:
        import bitsandbytes.functional as bnb

        # Create the table of codes here, with content: bitsandbytes would create it on the first tensor's device (meta)
        # and keep it for all later tensors.
        bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())
    with torch.device("meta"):
        built = build_model(model, num_frames)
    apply_mode(built, training.mode, torch.device("meta"), initialize=False)
    # Any 16-bit dtype takes the same memory. bf16 is the one that a CPU's autocast supports.
    built.compute_dtype = torch.float32 if DTYPES[training.precision] == torch.float32 else torch.bfloat16
    module: Any
    for module in built.modules():
        if hasattr(module, "compute_dtype") and module is not built:
            module.compute_dtype = torch.float32 if module.compute_dtype == torch.float32 else torch.bfloat16
    offloaded_bytes = 0
    if streams:
        # On a GPU the copies of streamed weights count. On a CPU no copies are made: mapped files are used directly.
        offloaded_bytes = stream_weights_(built, torch.device("cpu"), None, torch.clone if device == "cuda" else None)
    level = training.memory_optimization.level
    if level != "none":
        checkpoint_(built, level)
    return built.train(), offloaded_bytes


def _measure(
    model: HeatmapModel, training: TrainingConfig, windows: int, input_wh: tuple[int, int], offload_ctx: str | None
) -> StepPeak:
    """Run forward and backward on fake tensors and return the peak; only activations and temporary tensors are used."""
    clear_tensor_caches(model)
    with FakeTensorMode(), torch.device("cpu"):
        batch = fake_batch(model, windows, input_wh)
        # As from the second micro-batch on: gradients exist, and backward adds new ones to them.
        for parameter in model.parameters():
            parameter.grad = torch.empty(parameter.shape) if parameter.requires_grad else None
        with StepMeter(model, [], list(batch.values())) as meter:
            with offload_activations(model, torch.device("cuda"), offload_ctx):
                # As in training, where the loss is divided by the normalizer: the result is one more tensor.
                loss = heatmap_loss(model(batch["frames"]), batch, training.loss) / 1.0
            loss.backward()
    clear_tensor_caches(model)
    return meter.result()


def fake_batch(model: HeatmapModel, windows: int, input_wh: tuple[int, int]) -> dict[str, Tensor]:
    """Make the tensors of a model fake, in a fake mode, and return a batch of fake windows."""
    width, height = input_wh
    _to_fake_(model)
    return {
        "frames": torch.empty(windows, model.num_frames, 3, height, width, dtype=torch.uint8),
        "xy": torch.empty(windows, model.num_frames, 2),
        "visible": torch.empty(windows, model.num_frames, dtype=torch.bool),
        "weight": torch.empty(windows, model.num_frames),
    }


def clear_tensor_caches(model: HeatmapModel) -> None:
    """Clear the caches in which some models of transformers keep tensors by size.

    Fake and real tensors must not meet in them.
    """
    if model.backbone is None:
        return
    # Such a cache is an `lru_cache` function in the closure of a decorated function of the model's module.
    for function in vars(sys.modules[type(model.backbone.hf).__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _to_fake_(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors, with which autocast and operators behave as on a device."""
    for module in model.modules():
        stores: list[Any] = [module._parameters, module._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                # The gradient proxy of int8 codes is a single zero, expanded to a matrix.
                shape = () if name == "weight_grad_proxy" else tensor.shape
                fake = torch.empty(shape, dtype=tensor.dtype)
                fake = fake.expand(tensor.shape) if name == "weight_grad_proxy" else fake
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


def _state_bytes(numel: int, optimizer: str) -> int:
    """Return the bytes of AdamW's two moments for a parameter of ``numel`` values."""
    if optimizer.endswith("8bit") and numel >= 4096:  # bitsandbytes stores smaller ones in 32 bits
        # One byte per value, and one fp32 scale per block of 256 values.
        return 2 * numel + 2 * 4 * -(-numel // 256)
    return 8 * numel


def _update_bytes(model: HeatmapModel) -> int:
    """Return the bytes of temporary tensors in the optimizer's step.

    The optimizer updates in place, except int8 codes, which it dequantizes to fp32 one layer at a time.
    """
    layers = [p.numel() for name, p in model.named_parameters() if name.endswith("weight_grad_proxy")]
    return 4 * 4 * max(layers, default=0)  # fp32: weight of a layer, its new value, noise and quotient

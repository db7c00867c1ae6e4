"""Training section of the configuration.

The settings are independent of each other; a mode, such as int8 or QLoRA, is a combination of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tracknet.errors import UserError
from tracknet.memory.budget import parse_budget
from tracknet.memory.checkpointing import Level
from tracknet.memory.micro_batch import MicroBatchConfig
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.apply import ModeConfig, QuantizationConfig, Trainable, active, count_last_blocks
from tracknet.quantization.precision import Int8Kernel, Precision
from tracknet.training.collapse import OnCollapse
from tracknet.training.losses import LossConfig
from tracknet.training.optimizer import OptimizerConfig, SchedulerConfig

MAX_BATCH = 65_536  # maximum number of windows per batch; the time to plan a step grows with it


@dataclass
class MemoryConfig:
    """Settings that reduce memory at the cost of speed. None of them changes the result, except that ``full`` changes
    the rounding."""

    gradient_checkpointing: bool | str = False
    """Activations that are recomputed in backward instead of being stored. ``full`` (or ``true``): those of the
    backbone's blocks and of the decoder, a few windows at a time; only the inputs are stored. ``blocks``: those of the
    backbone's blocks only, all windows at once. ``selective``: the same, except the results of matrix products and of
    attention. ``none`` (or ``false``): none. ``auto``: the level that, together with the micro-batch size, is the
    fastest within ``budget``; with offload, ``full``."""
    budget: str = "free"
    """Upper bound of the peak memory of a step, to which ``gradient_checkpointing: auto`` fits level and micro-batches
    once, before training. ``free``: all memory that is free. ``lean``: a tenth of what full fine-tuning takes with the
    same batch, or the least that is possible. ``<n>%``: another share of it. A size, such as ``6GB``."""
    use_cpu_offload: bool = False
    """On a GPU, keep the tensors that backward needs in pinned host memory; with checkpointing, also the frozen weights
    of the backbone's blocks, which may then be larger than the GPU. The state of ``adamw8bit`` is paged. No effect on a
    CPU, where all of this is in host memory already."""
    use_disk_offload: bool = False
    """Keep the same tensors in memory-mapped files under ``<output_dir>/offload``: very slow, the last resort. On a
    CPU, the optimizer's state is moved there too. If ``use_cpu_offload`` is also set, the tensors that backward needs
    are kept in host memory and the rest in files."""

    def __post_init__(self) -> None:
        if self.gradient_checkpointing not in (True, False, "auto", "none", "selective", "blocks", "full"):
            raise UserError(
                f"training.memory_optimization.gradient_checkpointing={self.gradient_checkpointing}: must be auto,"
                " none (false), selective, blocks or full (true)."
            )
        if self.offloads and self.gradient_checkpointing == "selective":
            raise UserError(
                "training.memory_optimization: offload copies weights in another order in backward than in forward,"
                " which requires another level of gradient_checkpointing than selective: set it to blocks or full."
            )
        parse_budget(self.budget)

    @property
    def offloads(self) -> bool:
        """Return whether any tensors are offloaded."""
        return self.use_cpu_offload or self.use_disk_offload

    @property
    def checkpointing(self) -> Level | Literal["auto"]:
        """Level of checkpointing, with ``true`` and ``false`` converted."""
        level: Any = self.gradient_checkpointing
        return {True: "full", False: "none"}.get(level, level)

    @property
    def level(self) -> Level:
        """Level of checkpointing of a planned step, which is no longer ``auto``."""
        if self.checkpointing == "auto":
            raise AssertionError("gradient_checkpointing=auto must be planned first (planning.step_plan)")
        return self.checkpointing


@dataclass
class TrainingConfig:
    """Settings of training."""

    batch_size: int = 32
    """Windows per optimizer step."""
    epochs: int = field(default=20, metadata={"changes": ("resume",)})
    """Number of passes over the training windows."""
    precision: Precision = field(default="fp16", metadata={"changes": ("load",)})
    """Dtype of autocast; trained weights stay in fp32. For fp16 and bf16, a CPU computes in bf16 if it supports that
    natively, otherwise in fp32."""
    device: Literal["auto", "cuda", "cpu"] = field(default="auto", metadata={"changes": ("resume", "load")})
    """Device to train on; ``auto`` = the GPU if there is one."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Learning rate schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Target and loss."""
    on_collapse: OnCollapse = "warn"
    """Reaction to collapsed (empty) heatmaps: ``warn`` logs a warning with the likely cause, ``stop`` ends the run."""
    grad_clip: float | None = 1.0
    """Maximum norm of the gradient; ``null`` = no clipping."""
    quantization: QuantizationConfig | None = None
    """Quantization of the backbone; ``null`` = full precision."""
    int8_kernel: Int8Kernel = field(default="auto", metadata={"changes": ("resume", "load")})
    """Implementation of the int8 matrix product on a GPU. ``bitsandbytes``: operators of that library. ``triton``: two
    kernels that work in one pass and handle outliers without synchronizing with the host. ``auto`` = ``triton`` if the
    GPU supports it (Ampere and newer), otherwise ``bitsandbytes``. Results differ by rounding only. A CPU uses a
    separate implementation."""
    lora: LoraConfig | None = None
    """Adapters in the backbone; ``null`` = none."""
    trainable: Trainable = "auto"
    """Weights of the backbone that are trained besides adapters. ``all``: all that are not quantized. ``norms``: norms,
    biases and layer scales. ``nothing``: none, so that the decoder alone is trained without LoRA. ``auto`` =
    ``nothing`` with LoRA, otherwise ``all``."""
    train_last_blocks: int | str | None = None
    """Train only the last k blocks of the backbone, or a share of them such as ``50%`` (rounded up), in every mode
    (adapters, norms or weights); everything before them runs without gradient and keeps nothing for backward. ``null``
    = all blocks."""
    init_from: str | None = None
    """Run (folder, hub id, or ``embedded/NAME``) whose best weights initialize the model, such as a run trained on
    rendered rallies. Its adapters are merged and its quantized weights dequantized before this mode is applied.
    ``null`` = the backbone's own weights and a new decoder."""
    self_contained: bool = False
    """Save the frozen backbone weights with the run (``--self-contained``) instead of a reference to the base that they
    come from."""
    memory_optimization: MemoryConfig = field(default_factory=MemoryConfig, metadata={"changes": ("resume",)})
    """Settings that reduce memory at the cost of speed."""
    compile: bool = False
    """Compile the backbone's blocks with torch.compile. This takes about a minute before the first step; afterwards
    steps are faster on a GPU, but not on a CPU. Results differ by rounding. Requires a C++ compiler."""
    cuda_graphs: Literal["auto", "off"] = field(default="auto", metadata={"changes": ("resume", "load")})
    """Launch forward and backward of a micro-batch as one CUDA graph (``auto``), where that is possible: not with
    offload, or with outliers of ``int8_kernel: bitsandbytes``. Saves the time that the host takes to launch
    kernels, which is most of a step on a fast GPU. Results do not change. No effect on a CPU."""
    cache_features: bool = False
    """Compute the features of a frozen backbone once for each training frame (and its mirror image) and store them on
    disk, next to the cache of frames, so that epochs train the decoder alone. Requires ``training.trainable=nothing``
    without LoRA (``--training frozen``), and no augmentation except flips."""
    adaptive_micro_batch: bool = field(default=True, metadata={"changes": ("resume", "load")})
    """Start with micro-batches that fit into memory, and continue with smaller ones when memory runs out. The update
    stays the same."""
    micro_batch_size: int | None = field(default=None, metadata={"changes": ("resume", "load")})
    """Windows per micro-batch of training at the start; ``null`` = planned for ``memory_optimization.budget``. A run
    records the planned size and level of checkpointing, so that it resumes with them."""
    min_micro_batch_size: int = field(default=1, metadata={"changes": ("resume", "load")})
    """Minimum number of windows per micro-batch."""
    mb_backoff_factor: int = field(default=2, metadata={"changes": ("resume", "load")})
    """Divisor of the micro-batch size when memory runs out."""
    oom_retries: int = field(default=3, metadata={"changes": ("resume", "load")})
    """Maximum number of retries of a step with smaller micro-batches."""
    mb_grow_after: int | None = field(default=100, metadata={"changes": ("resume",)})
    """Number of steps without running out of memory after which larger micro-batches are tried, half-way to the size
    that failed; ``null`` = never."""
    max_steps: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Maximum number of optimizer steps, to which the schedule is fitted; ``null`` = no limit."""
    limit_train_batches: int | None = None
    """Maximum number of batches per epoch; ``null`` = no limit."""
    limit_val_batches: int | None = None
    """Maximum number of batches per validation; ``null`` = no limit."""
    checkpoint_every_steps: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Number of steps between two saves of ``last/``, in addition to one after every epoch; ``null`` = only those."""
    validate_every_epochs: int = field(default=1, metadata={"changes": ("resume",)})
    """Number of epochs between two validations; the last epoch is always validated."""
    early_stopping_patience: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Number of validations without a better F1 after which training stops; ``null`` = no early stopping."""
    log_every_steps: int = field(default=1, metadata={"changes": ("resume",)})
    """Number of steps between two entries of the TensorBoard scalars."""

    @property
    def streams_weights(self) -> bool:
        """Return whether the frozen weights of blocks are on the device only during their block's forward.

        This requires checkpointing: without it, autograd would keep every copy until backward. With cached features no
        block runs, after a single pass that needs all of them on the device.
        """
        memory = self.memory_optimization
        return memory.offloads and memory.checkpointing != "none" and not self.cache_features

    @property
    def mode(self) -> ModeConfig:
        """Part of the section that loading a run requires, too."""
        return ModeConfig(
            self.precision, self.quantization, self.lora, self.trainable, self.train_last_blocks, self.int8_kernel
        )

    def __post_init__(self) -> None:
        # Single settings and their ranges.
        for name in (
            "batch_size",
            "epochs",
            "min_micro_batch_size",
            "validate_every_epochs",
            "log_every_steps",
            "micro_batch_size",
            "max_steps",
            "limit_train_batches",
            "limit_val_batches",
            "oom_retries",
            "checkpoint_every_steps",
            "early_stopping_patience",
            "mb_grow_after",
        ):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "oom_retries" else 1):
                raise UserError(f"training.{name}={value}: must be at least {0 if name == 'oom_retries' else 1}.")
        count_last_blocks(self.train_last_blocks, 1)
        if self.batch_size > MAX_BATCH:
            raise UserError(f"training.batch_size={self.batch_size}: must be at most {MAX_BATCH}.")
        if self.mb_backoff_factor < 2:
            raise UserError(f"training.mb_backoff_factor={self.mb_backoff_factor}: must be at least 2.")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError(f"training.grad_clip={self.grad_clip}: must be above 0, or null.")
        # Sizes that must be consistent with each other.
        if self.min_micro_batch_size > self.batch_size:
            raise UserError(
                f"training.min_micro_batch_size={self.min_micro_batch_size} must not exceed "
                f"training.batch_size={self.batch_size}."
            )
        if self.micro_batch_size is not None and self.micro_batch_size < self.min_micro_batch_size:
            raise UserError(
                f"training.micro_batch_size={self.micro_batch_size} must be at least "
                f"training.min_micro_batch_size={self.min_micro_batch_size}."
            )

        self._check_modes()

    def _check_modes(self) -> None:
        """Raise a ``UserError`` for settings that contradict each other."""
        quantization, lora = active(self.quantization), active(self.lora)
        if self.int8_kernel == "triton" and not (quantization is not None and quantization.load_in_8bit):
            raise UserError(
                "training.int8_kernel=triton requires weights in int8, but none are: set"
                " training.quantization.load_in_8bit=true (--training int8), or training.int8_kernel=auto."
            )
        # Settings that train quantized weights.
        if quantization is not None:
            kind = "int8_trainable" if quantization.int8_trainable else "llm_int8_has_fp16_weight"
            trains_weights = quantization.int8_trainable or quantization.llm_int8_has_fp16_weight
            if trains_weights and lora is not None:
                raise UserError(
                    f"training.quantization.{kind}=true trains the weights that training.lora freezes: set "
                    f"training.lora=null, or training.quantization.{kind}=false."
                )
            if trains_weights and self.trainable in ("norms", "nothing"):
                raise UserError(
                    f"training.quantization.{kind}=true trains every weight, but training.trainable="
                    f"{self.trainable} does not: set training.trainable=all."
                )
            if quantization.int8_trainable and not self.optimizer.name.endswith("adamw8bit"):
                raise UserError(
                    "training.quantization.int8_trainable=true requires an optimizer that rounds stochastically, but "
                    f"training.optimizer.name={self.optimizer.name} does not: set it to adamw8bit or "
                    "paged_adamw8bit."
                )
        # Settings of adapters.
        if lora is not None:
            if quantization is not None and lora.changes_base:
                raise UserError(
                    f"training.lora.init_lora_weights={lora.init_lora_weights} moves a part of the base weights into "
                    "the adapter, which is not possible with 4- or 8-bit weights (training.quantization): set "
                    "init_lora_weights=true, or training.quantization=null."
                )
            if quantization is None and lora.init_lora_weights == "loftq":
                raise UserError(
                    "training.lora.init_lora_weights=loftq starts from what quantization rounds away, but"
                    " training.quantization is off: set it (--training qlora), or another init_lora_weights."
                )
            if lora.init_lora_weights == "eva" and self.streams_weights:
                raise UserError(
                    "training.lora.init_lora_weights=eva runs the backbone before training, but"
                    " training.memory_optimization offloads its weights: set use_cpu_offload=false and"
                    " use_disk_offload=false, or another init_lora_weights."
                )
            if lora.init_lora_weights == "loftq" and lora.use_dora:
                raise UserError(
                    "training.lora: use_dora=true takes the magnitudes of the weights before init_lora_weights=loftq"
                    " changes them: set one of them to another value."
                )
            if lora.bias != "none" and self.trainable == "nothing":
                raise UserError(
                    f"training.lora.bias={lora.bias} trains biases of the backbone, but"
                    " training.trainable=nothing trains none: set trainable=auto, or"
                    " training.lora.bias=none."
                )
        if self.optimizer.lora_plus_lr_ratio != 1 and (lora is None or lora.peft_type != "LORA"):
            raise UserError(
                f"training.optimizer.lora_plus_lr_ratio={self.optimizer.lora_plus_lr_ratio} scales the learning rate of"
                " LoRA's matrices B, but no LoRA adapters train: set it to 1, or add training.lora (--training lora)."
            )
        if self.compile and self.memory_optimization.checkpointing == "selective":
            raise UserError(
                "training.compile=true compiles whole blocks, whose products"
                " training.memory_optimization.gradient_checkpointing=selective cannot tell apart: set compile=false,"
                " or gradient_checkpointing to blocks."
            )
        if self.train_last_blocks is not None and self.trainable == "nothing" and lora is None:
            raise UserError(
                f"training.train_last_blocks={self.train_last_blocks} trains blocks of the backbone, but"
                " training.trainable=nothing trains none: set one of them to another value, or add training.lora."
            )

    def micro_batching(self, batch_size: int, input_wh: tuple[int, int] | None = None) -> MicroBatchConfig:
        """Return the settings of the micro-batcher.

        Args:
            batch_size: windows per batch of this process.
            input_wh: width and height of the training frames in pixels, ``None`` for inference.
        """
        memory = self.memory_optimization
        # Everything besides the micro-batch size that affects memory: a size that a checkpoint has learned under other
        # settings is ignored.
        setting = (
            f"{input_wh} {self.precision} {memory.checkpointing} {memory.use_cpu_offload} {memory.use_disk_offload}"
        )
        return MicroBatchConfig(
            batch_size,
            self.adaptive_micro_batch,
            self.micro_batch_size if input_wh is not None else None,  # inference takes much less memory
            self.min_micro_batch_size,
            self.mb_backoff_factor,
            self.oom_retries,
            self.mb_grow_after,
            setting,
        )

"""The training section: independent settings, of which a mode is a composition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatchConfig
from tracknet.quantization.apply import ModeConfig, QuantizationConfig, Trainable, active
from tracknet.quantization.lora import LoraConfig
from tracknet.quantization.precision import Int8Kernel, Precision
from tracknet.training.collapse import OnCollapse
from tracknet.training.losses import LossConfig
from tracknet.training.optimizer import OptimizerConfig, SchedulerConfig

MAX_BATCH = 65_536  # windows; planning a step takes time by their number


@dataclass
class MemoryConfig:
    """What is given up to save memory. Each costs speed; none changes the result, ``full`` but for rounding."""

    gradient_checkpointing: bool | str = False
    """``full`` (or ``true``): keep only the inputs of the backbone's blocks and of the decoder, and compute the rest
    again in backward, a few windows at a time; ``blocks``: those of the backbone's blocks only, all windows at once;
    ``none`` (or ``false``)."""
    use_cpu_offload: bool = False
    """On a GPU: what backward needs waits in pinned host memory; with checkpointing, so do the frozen weights of the
    backbone's blocks, which may then be larger than the GPU; the state of ``adamw8bit`` is paged. On a CPU all that is
    in host memory already."""
    use_disk_offload: bool = False
    """The same in memory-mapped files under ``<output_dir>/offload``: very slow, the last resort. On a CPU the
    optimizer's state goes there too. With ``use_cpu_offload`` as well, what backward needs waits in host memory, and
    the rest in files."""

    def __post_init__(self) -> None:
        if self.gradient_checkpointing not in (True, False, "none", "blocks", "full"):
            raise UserError(
                f"training.memory_optimization.gradient_checkpointing={self.gradient_checkpointing}: is one of none "
                "(false), blocks, full (true)."
            )

    @property
    def offloads(self) -> bool:
        """Whether anything waits elsewhere."""
        return self.use_cpu_offload or self.use_disk_offload

    @property
    def streams_weights(self) -> bool:
        """Whether frozen weights of blocks come for their block's forward only; without checkpointing autograd would
        keep them."""
        return self.offloads and self.checkpointing != "none"

    @property
    def checkpointing(self) -> Literal["none", "blocks", "full"]:
        """The level, whichever way it was said."""
        level: Any = self.gradient_checkpointing
        return {True: "full", False: "none"}.get(level, level)


@dataclass
class TrainingConfig:
    """How to train."""

    batch_size: int = 32
    """Windows per optimizer step."""
    epochs: int = field(default=20, metadata={"changes": ("resume",)})
    """Passes over the training windows."""
    precision: Precision = field(default="fp16", metadata={"changes": ("load",)})
    """Arithmetic under autocast; weights that train stay fp32. A CPU computes in bf16 where it can, else in fp32."""
    device: Literal["auto", "cuda", "cpu"] = field(default="auto", metadata={"changes": ("resume", "load")})
    """``auto`` takes the GPU where there is one."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Learning rate over the run."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Target and loss."""
    on_collapse: OnCollapse = "warn"
    """What to do when heatmaps go empty: ``warn`` says so, with the likely cause; ``stop`` ends the run."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; ``null`` = no clipping."""
    quantization: QuantizationConfig | None = None
    """Storage of the backbone; ``null`` = full precision."""
    int8_kernel: Int8Kernel = field(default="auto", metadata={"changes": ("resume", "load")})
    """What multiplies in int8 on a GPU: ``bitsandbytes``' operators, or ``triton``: two kernels that do it in one pass,
    where outliers make nothing wait for the host. ``auto`` = ``triton`` where it runs (Ampere and newer), else
    ``bitsandbytes``. Results differ by rounding alone. A CPU has a product of its own."""
    lora: LoraConfig | None = None
    """Adapters in the backbone; ``null`` = none."""
    trainable: Trainable = "auto"
    """What trains of the backbone's own weights, besides adapters: ``all`` that is not quantized, ``norms`` (norms,
    biases, layer scales), ``nothing``; ``auto`` = ``nothing`` beside LoRA, else ``all``."""
    init_from: str | None = None
    """Run (folder, hub id, or ``embedded/NAME``) whose best weights to begin from, such as one that was trained on
    rendered rallies: adapters merged, codes dequantized, then stored as this mode says. ``null`` = the backbone's own
        weights and a fresh decoder."""
    self_contained: bool = False
    """Save frozen backbone weights with the run too (``--self-contained``), instead of naming the base that they come
    from."""
    memory_optimization: MemoryConfig = field(default_factory=MemoryConfig, metadata={"changes": ("resume",)})
    """Trading speed for memory."""
    compile: bool = False
    """Compile the backbone's blocks with torch.compile: about a minute before the first step, then faster on a GPU; on
    a CPU there is nothing to gain. Results differ by rounding. Needs a C++ compiler."""
    cache_features: bool = False
    """Compute the features of a frozen backbone once for each training frame (and its mirror image) and keep them on
    disk, beside the frames' cache: epochs then train the decoder alone. Needs ``model.backbone.freeze=true`` and no
    augmentation but flips."""
    adaptive_micro_batch: bool = field(default=True, metadata={"changes": ("resume", "load")})
    """Begin with parts of the batch that fit, and go on with smaller ones when memory runs out. The update stays the
    same."""
    micro_batch_size: int | None = field(default=None, metadata={"changes": ("resume", "load")})
    """Windows per forward to begin with; ``null`` = as many as the plan says fit into free memory."""
    min_micro_batch_size: int = field(default=1, metadata={"changes": ("resume", "load")})
    """Never split further than this."""
    mb_backoff_factor: int = field(default=2, metadata={"changes": ("resume", "load")})
    """Divide the micro-batch by this when memory runs out."""
    oom_retries: int = field(default=3, metadata={"changes": ("resume", "load")})
    """How often a step is tried again in smaller parts before giving up."""
    mb_grow_after: int | None = field(default=100, metadata={"changes": ("resume",)})
    """After this many steps without running out of memory, try larger parts again, half-way to the size that failed;
    ``null`` = never."""
    max_steps: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Stop after this many optimizer steps, and fit the schedule to it."""
    limit_train_batches: int | None = None
    """At most this many batches per epoch."""
    limit_val_batches: int | None = None
    """At most this many batches per validation."""
    checkpoint_every_steps: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Save ``last/`` this often, besides after every epoch."""
    validate_every_epochs: int = field(default=1, metadata={"changes": ("resume",)})
    """Validate after every so many epochs, and after the last."""
    early_stopping_patience: int | None = field(default=None, metadata={"changes": ("resume",)})
    """Stop after this many validations without a better F1."""
    log_every_steps: int = field(default=1, metadata={"changes": ("resume",)})
    """Write scalars this often."""

    @property
    def mode(self) -> ModeConfig:
        """The part that a loaded run needs too."""
        return ModeConfig(self.precision, self.quantization, self.lora, self.trainable, self.int8_kernel)

    def __post_init__(self) -> None:
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
        if self.batch_size > MAX_BATCH:
            raise UserError(f"training.batch_size={self.batch_size}: must be at most {MAX_BATCH}.")
        if self.mb_backoff_factor < 2:
            raise UserError(f"training.mb_backoff_factor={self.mb_backoff_factor}: must be at least 2.")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError(f"training.grad_clip={self.grad_clip}: must be above 0, or null.")
        if self.min_micro_batch_size > self.batch_size:
            raise UserError(
                f"training.min_micro_batch_size={self.min_micro_batch_size} is above "
                f"training.batch_size={self.batch_size}."
            )
        if self.micro_batch_size is not None and self.micro_batch_size < self.min_micro_batch_size:
            raise UserError(
                f"training.micro_batch_size={self.micro_batch_size} is below "
                f"training.min_micro_batch_size={self.min_micro_batch_size}."
            )

        self._check_modes()

    def _check_modes(self) -> None:
        """Refuse compositions that cannot train as they say."""
        quantization, lora = active(self.quantization), active(self.lora)
        if self.int8_kernel == "triton" and not (quantization is not None and quantization.load_in_8bit):
            raise UserError(
                "training.int8_kernel=triton multiplies in int8, and nothing is stored in it: set"
                " training.quantization.load_in_8bit=true (--training int8), or training.int8_kernel=auto."
            )
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
                    f"training.quantization.{kind}=true trains every weight, and training.trainable="
                    f"{self.trainable} does not: set training.trainable=all."
                )
            if quantization.int8_trainable and not self.optimizer.name.endswith("adamw8bit"):
                raise UserError(
                    "training.quantization.int8_trainable=true needs an optimizer that rounds stochastically, and "
                    f"training.optimizer.name={self.optimizer.name} does not: set it to adamw8bit or "
                    "paged_adamw8bit."
                )
        if lora is not None:
            if quantization is not None and lora.changes_base:
                raise UserError(
                    f"training.lora.init_lora_weights={lora.init_lora_weights} moves a part of the base into the "
                    "adapter, which training.quantization cannot take out of 4- or 8-bit codes: set "
                    "init_lora_weights=true, or training.quantization=null."
                )
            if lora.bias != "none" and self.trainable == "nothing":
                raise UserError(
                    f"training.lora.bias={lora.bias} trains biases of the backbone, and"
                    " training.trainable=nothing trains none: set trainable=auto, or"
                    " training.lora.bias=none."
                )
            if lora.layers is not None and lora.bias == "all":
                raise UserError(
                    f"training.lora.layers={lora.layers} keeps the blocks below without gradient, and "
                    "training.lora.bias=all trains in them: set bias=lora_only, or training.lora.layers=null."
                )
            if lora.layers is not None and self.trainable in ("all", "norms"):
                raise UserError(
                    f"training.lora.layers={lora.layers} keeps the blocks below without gradient, and "
                    f"training.trainable={self.trainable} trains in them: set trainable=auto, or "
                    "training.lora.layers=null."
                )

    def micro_batching(self, batch_size: int, input_wh: tuple[int, int] | None = None) -> MicroBatchConfig:
        """Collect the keys that the micro-batcher uses, for batches of this size and frames of that."""
        memory = self.memory_optimization
        setting = (
            f"{input_wh} {self.precision} {memory.checkpointing} {memory.use_cpu_offload} {memory.use_disk_offload}"
        )
        return MicroBatchConfig(
            batch_size,
            self.adaptive_micro_batch,
            self.micro_batch_size,
            self.min_micro_batch_size,
            self.mb_backoff_factor,
            self.oom_retries,
            self.mb_grow_after,
            setting,
        )

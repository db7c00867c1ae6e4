"""Interface of an adapter, its configuration, and the registry that ``training.lora.peft_type`` chooses from."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import nn

from tracknet.errors import UserError, nearest, shorten
from tracknet.models.window_rng import WindowRng
from tracknet.registry import Registry, check_options

MAX_RANK = 4096  # width of the largest backbone, hence the largest rank that an update can have
# Limits on regular expressions from untrusted runs. The time of backtracking grows with the length of the name to the
# power of the number of repeats, and exponentially for a repeat of repeats.
MAX_REPEATS = 4
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+{]")
INITIALIZATIONS = ("true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora", "eva", "loftq")


@dataclass
class LoraConfig:
    """Adapters inside the backbone; the fields are peft's, except ``enabled`` and ``options``."""

    enabled: bool = True
    """``false`` trains without adapters."""
    peft_type: str = field(default="LORA", metadata={"choices": lambda: list(ADAPTERS)})
    """Kind of adapter: ``LORA``; ``VERA``, trained vectors around shared random matrices; ``MISS``, one matrix per
    layer; ``OFT``, a rotation of the input. Each refuses the fields that it does not read."""
    r: int = 16
    """Rank of the update. An adapter trains ``r * (in + out)`` values per layer."""
    lora_alpha: int = 32
    """The update is scaled by ``lora_alpha / r``."""
    lora_dropout: float = 0.1
    """Dropout on the adapters' input, in steps of 1/256."""
    target_modules: list[str] = field(default_factory=list)
    """Names (or their last part) of the layers that get an adapter; ``[]`` = every linear layer of the backbone."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the backbone that train together with the adapters."""
    task_type: Literal["FEATURE_EXTRACTION"] = "FEATURE_EXTRACTION"
    """Task type that peft records for a feature extractor."""
    use_rslora: bool = False
    """Scale the update by ``lora_alpha / sqrt(r)`` instead (rsLoRA), so large ranks learn as fast."""
    use_dora: bool = False
    """Train magnitude and direction of the weights separately (DoRA): slower, often better at small ranks."""
    init_lora_weights: bool | str = True
    """Initialization of the adapters. ``true``, ``gaussian`` and ``orthogonal`` start from an update of zero;
    ``pissa``, ``pissa_niter_<n>`` and ``olora`` move a part of the base into the adapter and require an unquantized
    base; ``eva`` starts A from the main directions of the layer's inputs, in a pass over training windows; ``loftq``
    starts from the part of the weights that quantization loses; ``false`` starts from noise, for tests."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """``r`` of the layers whose name matches a pattern: ``{q_proj: 32}``."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """``lora_alpha`` of the layers whose name matches a pattern."""
    options: dict[str, float] = field(default_factory=dict)
    """Settings of adapters other than LoRA: ``d_initial`` and ``projection_prng_key`` of VeRA, ``oft_block_size`` of
    OFT."""

    def __post_init__(self) -> None:
        ADAPTERS.lookup(self.peft_type).check(self)
        if self.r < 1 or self.lora_alpha < 1:
            raise UserError(f"training.lora: r={self.r} and lora_alpha={self.lora_alpha} must be at least 1.")
        if self.r > MAX_RANK:
            raise UserError(f"training.lora: r={self.r} must be at most {MAX_RANK}.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"training.lora.lora_dropout={self.lora_dropout}: must be at least 0 and below 1.")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, name).items():
                if value < 1:
                    raise UserError(f"training.lora.{name}: {pattern}={value} must be at least 1.")
                if name == "rank_pattern" and value > MAX_RANK:
                    raise UserError(f"training.lora.{name}: {pattern}={value} must be at most {MAX_RANK}.")
                if len(pattern) > 200 or len(_REPEAT.findall(pattern)) > MAX_REPEATS or _REPEATED_GROUP.search(pattern):
                    raise UserError(
                        f"training.lora.{name}: '{shorten(pattern, 200)}' may take years to match: use at most "
                        f"{MAX_REPEATS} of * + ? {{, only ? after a closing bracket, and at most 200 characters."
                    )
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"training.lora.{name}: '{pattern}' is not a valid regular expression ({error})."
                    ) from error
        start = self.init_lora_weights
        if isinstance(start, str) and not re.fullmatch(
            r"gaussian|orthogonal|olora|eva|loftq|pissa(_niter_[1-9]\d*)?", start
        ):
            raise UserError(
                f"training.lora.init_lora_weights={start}: must be one of {', '.join(INITIALIZATIONS)}"
                f"{nearest(start, INITIALIZATIONS)}"
            )

    @property
    def initialized_later(self) -> bool:
        """``True`` if this package initializes the adapters, once it knows the quantized weights or the data."""
        return self.init_lora_weights in ("eva", "loftq")

    @property
    def changes_base(self) -> bool:
        """``True`` if the initialization moves a part of the base weights into the adapters."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))


class Adapter(ABC):
    """A kind of peft adapter.

    Everything else works for any layer of peft around a base layer: what counts as an adapter's tensor, training and
    saving it, and merging it into the base.

    Attributes:
        FIELDS: fields of ``LoraConfig`` that it reads; the others must keep their defaults.
        OPTIONS: names and defaults of the entries of ``training.lora.options`` that it reads.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset({"r", "bias"})
    OPTIONS: ClassVar[dict[str, float]] = {}

    @abstractmethod
    def peft_config(self, config: LoraConfig, targets: list[str], initialize: bool) -> Any:
        """Build peft's configuration.

        Args:
            config: the lora section.
            targets: full names of the linear layers that get an adapter.
            initialize: ``False`` where a checkpoint brings all values, so an expensive initialization can be skipped.
        """

    def inject(self, backbone: nn.Module, peft_config: Any) -> None:
        """Let peft put the adapters into the backbone, in place."""
        import peft

        peft.inject_adapter_in_model(peft_config, backbone)

    def prepare(self, layers: dict[str, Any], config: LoraConfig, rng: WindowRng) -> None:  # noqa: B027 (optional)
        """Change the layers that peft has put in.

        Args:
            layers: peft's layers by name.
            config: the lora section.
            rng: source of random numbers by window, so that a step that is split or repeated draws the same.
        """

    def check_targets(  # noqa: B027 (optional)
        self, backbone: nn.Module, config: LoraConfig, targets: list[str]
    ) -> None:
        """Raise a ``UserError`` for settings that do not fit the layers they apply to."""

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Refuse settings that the adapter does not read.

        Raises:
            UserError: such a field has another value than its default, or an option is unknown.
        """
        read = cls.FIELDS | {"enabled", "peft_type", "target_modules", "options", "task_type"}
        for f in fields(config):
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name not in read and getattr(config, f.name) != default:
                raise UserError(
                    f"training.lora.{f.name}={getattr(config, f.name)}: adapters of peft_type={config.peft_type} do not"
                    f" read it; leave it at {default}."
                )
        subject = f"adapters of peft_type={config.peft_type} have"
        check_options("training.lora.options", config.options, cls.OPTIONS, subject)


ADAPTERS: Registry[type[Adapter]] = Registry("training.lora.peft_type")

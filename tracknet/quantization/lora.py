"""LoRA through peft (Hu et al., ICLR 2022): ``W x + (lora_alpha / r) B A x`` with trained A and B of rank r."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from tracknet.errors import UserError, nearest, shorten
from tracknet.models.components import component_by_name
from tracknet.models.window_rng import WindowRng
from tracknet.quantization.recomputed_dropout import DropoutLinear

# What the same projections are called in other model families: a target of the left column also finds the right ones.
ALIASES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "dense": ("o_proj",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("dense",),
    "fc1": ("up_proj", "weights_in"),
    "fc2": ("down_proj", "weights_out"),
    "pwconv1": ("pointwise_conv1",),
    "pwconv2": ("pointwise_conv2",),
}
MAX_RANK = 4096  # the width of the largest backbone: an update of more directions is none
# Matching goes back and forth over a name: each repeat multiplies the ways by its length, a repeat of repeats doubles
# them with each character. A run's pattern may be a stranger's.
MAX_REPEATS = 4
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+{]")
INITIALISATIONS = ("true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora")


@dataclass
class LoraConfig:
    """Adapters inside the backbone; the fields are peft's, but for ``layers``."""

    enabled: bool = True
    """Switches LoRA."""
    r: int = 16
    """Rank of the update: more can learn more, and trains ``r * (in + out)`` values per layer."""
    lora_alpha: int = 32
    """The update is scaled by ``lora_alpha / r``."""
    lora_dropout: float = 0.1
    """Dropout on the adapters' input, in steps of 1/256."""
    target_modules: list[str] = field(default_factory=list)
    """Names (or their last part) of the layers that get an adapter; ``[]`` = every linear layer of the backbone."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the backbone train along."""
    task_type: Literal["FEATURE_EXTRACTION"] = "FEATURE_EXTRACTION"
    """Recorded in the adapter, as peft expects it of a feature extractor."""
    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)`` instead (rsLoRA), which keeps large ranks as lively as small ones."""
    use_dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA): slower, often better at small
    ranks."""
    init_lora_weights: bool | str = True
    """Start of the adapters: ``true`` = no change at first; ``gaussian``, ``orthogonal``; ``pissa``,
    ``pissa_niter_<n>`` and ``olora`` move a part of the base into the adapter and need an unquantized one; ``false`` =
    noise, for tests."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another ``r`` for layers whose name matches a pattern: ``{q_proj: 32}``."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """Another ``lora_alpha`` likewise."""
    layers: str | None = None
    """``last-<k>``: adapters in the last k blocks only; all below runs without gradient. ``null`` = in all."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise UserError(f"training.lora: r={self.r} and lora_alpha={self.lora_alpha} are at least 1.")
        if self.r > MAX_RANK:
            raise UserError(f"training.lora: r={self.r} is at most {MAX_RANK}.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"training.lora.lora_dropout={self.lora_dropout}: give a probability below 1.")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, name).items():
                if value < 1:
                    raise UserError(f"training.lora.{name}: {pattern}={value} must be at least 1.")
                if name == "rank_pattern" and value > MAX_RANK:
                    raise UserError(f"training.lora.{name}: {pattern}={value} must be at most {MAX_RANK}.")
                if len(pattern) > 200 or len(_REPEAT.findall(pattern)) > MAX_REPEATS or _REPEATED_GROUP.search(pattern):
                    raise UserError(
                        f"training.lora.{name}: '{shorten(pattern, 200)}' may take years to match: give at most "
                        f"{MAX_REPEATS} of * + ? {{, none but ? behind a bracket, and 200 characters."
                    )
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"training.lora.{name}: '{pattern}' is no pattern ({error}).") from error
        start = self.init_lora_weights
        if isinstance(start, str) and not re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_[1-9]\d*)?", start):
            raise UserError(
                f"training.lora.init_lora_weights={start}: is one of {', '.join(INITIALISATIONS)}"
                f"{nearest(start, INITIALISATIONS)}"
            )
        if self.layers is not None and not re.fullmatch(r"last-[1-9]\d*", self.layers):
            raise UserError(f"training.lora.layers={self.layers}: give last-<k>, such as last-4, or null for all.")

    @property
    def changes_base(self) -> bool:
        """Whether the adapters begin with a part of the base weights, which then holds the rest."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))


def add_lora(
    backbone: nn.Module, blocks: list[nn.Module], config: LoraConfig, rng: WindowRng, initialize: bool = True
) -> None:
    """Put adapters into the backbone; everything else of it is frozen (but for biases, if so configured).

    Args:
        backbone: a transformers model, quantized or not; changed in place.
        blocks: its blocks from the first to the last, which ``layers`` counts.
        config: the adapters.
        rng: source of dropout by window.
        initialize: ``False`` where a checkpoint brings all values, so that no expensive start is computed for nothing.

    Raises:
        UserError: a target or pattern matches no linear layer; lists the names that exist.
    """
    import peft  # here: a model without adapters loads without it

    targets = match_targets(backbone, config.target_modules)
    targets = _last_blocks(backbone, blocks, targets, config.layers)
    _check_patterns(config, targets)
    _check_ranks(backbone, config, targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            bias=config.bias,
            task_type=config.task_type,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=config.init_lora_weights if initialize else True,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        ),
        backbone,
    )
    layer: Any
    for number, layer in enumerate(lora_layers(backbone).values()):
        # peft would cast each layer's input to the adapters' fp32, a copy of 4 bytes a value for every one of q, k and
        # v. Left alone, autocast casts the small adapters instead and backward keeps the input that the layers share.
        layer.cast_input_dtype_enabled = False
        if config.lora_dropout > 0 and not config.use_dora:  # DoRA takes A for itself, to measure lengths
            for name, a in layer.lora_A.items():
                layer.lora_A[name] = DropoutLinear(a, config.lora_dropout, rng, number)
                layer.lora_dropout[name] = nn.Identity()
    components = component_by_name(backbone)
    for name, parameter in backbone.named_parameters():
        if components[name] == "adapters":
            # peft follows the base's dtype; a 16-bit weight would round small updates away.
            parameter.data = parameter.data.float()


def lora_layers(backbone: nn.Module) -> dict[str, Any]:
    """Find the layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}


def match_targets(backbone: nn.Module, wanted: list[str]) -> list[str]:
    """Resolve target names to the full names of linear layers."""
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not wanted:
        return layers
    found: list[str] = []
    for target in wanted:
        names = (target, *ALIASES.get(target, ()))
        hits = [layer for layer in layers if any(layer == n or layer.endswith(f".{n}") for n in names)]
        if not hits:
            kinds = _kinds(layers)
            also = [name for name, others in ALIASES.items() if not {*others}.isdisjoint(kinds)]
            raise UserError(
                f"training.lora.target_modules: '{target}' matches no linear layer of the backbone; there are "
                f"{', '.join(kinds)}{nearest(target, kinds + also)}"
            )
        found += hits
    return sorted(set(found), key=layers.index)


def _kinds(layers: list[str]) -> list[str]:
    return sorted({layer.rsplit(".", 1)[-1] for layer in layers if not re.fullmatch(r"\d+", layer)})


def _last_blocks(backbone: nn.Module, blocks: list[nn.Module], targets: list[str], layers: str | None) -> list[str]:
    if layers is None:
        return targets
    last = int(layers.removeprefix("last-"))
    if last > len(blocks):
        raise UserError(f"training.lora.layers={layers}: the backbone has {len(blocks)} blocks.")
    inside = {id(module) for block in blocks[-last:] for module in block.modules()}
    kept = [name for name in targets if id(backbone.get_submodule(name)) in inside]
    if not kept:
        raise UserError(f"training.lora.layers={layers}: none of the target_modules lies in the last {last} blocks.")
    return kept


def _matches(pattern: str, name: str) -> bool:
    """As peft matches: the end of the name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_patterns(config: LoraConfig, targets: list[str]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(_matches(pattern, target) for target in targets):
                raise UserError(
                    f"training.lora.{key}: '{pattern}' matches no layer with an adapter; there are "
                    f"{', '.join(_kinds(targets))}{nearest(pattern, _kinds(targets))}"
                )


def _check_ranks(backbone: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    """Refuse ranks that a start from the base's own directions does not have."""
    start = config.init_lora_weights
    for name in targets:
        matching = (r for pattern, r in config.rank_pattern.items() if _matches(pattern, name))
        layer: Any = backbone.get_submodule(name)
        rank = next(matching, config.r)
        if start == "orthogonal" and rank % 2:
            raise UserError(f"training.lora: init_lora_weights=orthogonal needs even ranks, and {name} has r={rank}.")
        if config.changes_base and rank > min(layer.in_features, layer.out_features):
            raise UserError(
                f"training.lora: init_lora_weights={start} takes r directions of the weight, and {name} has "
                f"{min(layer.in_features, layer.out_features)} of them, fewer than r={rank}."
            )

"""VeRA (Kopiczko et al., ICLR 2024): two trained vectors per layer around random matrices that all layers share."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tracknet.quantization.adapters.base import Adapter, LoraConfig


class VeraAdapter(Adapter):
    """Scaling of shared random projections: the fewest trained values per layer, ``r + out_features``."""

    OPTIONS: ClassVar = {"d_initial": 0.1, "projection_prng_key": 0}

    def peft_config(self, config: LoraConfig, targets: list[str], initialize: bool) -> Any:
        import peft

        options = {**self.OPTIONS, **config.options}
        return peft.VeraConfig(
            r=config.r,
            target_modules=targets,
            bias=config.bias,
            d_initial=options["d_initial"],
            projection_prng_key=int(options["projection_prng_key"]),
        )

    def inject(self, backbone: nn.Module, peft_config: Any) -> None:
        from peft.tuners.vera import VeraModel

        # peft's inject_adapter_in_model refuses adapters whose layers share tensors.
        VeraModel(backbone, {"default": peft_config}, "default")

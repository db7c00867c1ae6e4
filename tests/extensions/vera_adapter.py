"""An adapter: VeRA (Kopiczko et al., ICLR 2024), two trained vectors per layer around shared random matrices."""

from typing import ClassVar

import peft
from peft.tuners.vera import VeraModel

from tracknet.quantization.adapters import ADAPTERS, Adapter


class VeraAdapter(Adapter):
    OPTIONS: ClassVar = {"d_initial": 0.1, "projection_prng_key": 0}

    def peft_config(self, config, targets, initialize):
        options = {**self.OPTIONS, **config.options}
        return peft.VeraConfig(
            r=config.r,
            target_modules=targets,
            bias=config.bias,
            d_initial=options["d_initial"],
            projection_prng_key=int(options["projection_prng_key"]),
        )

    def inject(self, backbone, peft_config):
        # peft's inject_adapter_in_model refuses adapters whose layers share tensors.
        VeraModel(backbone, {"default": peft_config}, "default")


ADAPTERS.register("VERA", VeraAdapter)

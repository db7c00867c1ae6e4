"""An adapter: MiSS (Kang & Yin, 2024), a block that is repeated over the rows of a layer's weight."""

import peft

from tracknet.quantization.adapters import ADAPTERS, Adapter


class MissAdapter(Adapter):
    def peft_config(self, config, targets, initialize):
        return peft.MissConfig(r=config.r, target_modules=targets, bias=config.bias)


ADAPTERS.register("MISS", MissAdapter)

"""An adapter: (IA)^3 (Liu et al., NeurIPS 2022), one trained factor per output of a layer."""

import peft

from tracknet.quantization.adapters import ADAPTERS, Adapter


class Ia3Adapter(Adapter):
    FIELDS = frozenset()

    def peft_config(self, config, targets, initialize):
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])


ADAPTERS.register("IA3", Ia3Adapter)

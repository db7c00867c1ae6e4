"""AdamW optimizers of bitsandbytes with resumable steps and training of int8 weights."""

from __future__ import annotations

from bitsandbytes import optim

from tracknet.memory.resumable import Resumable
from tracknet.quantization.trainable_int8 import StochasticRounding

# `Resumable` is the first base class, so that a parameter that an interrupted step has already updated is skipped
# before `StochasticRounding` decodes its int8 weight.


class AdamW8bit(Resumable, StochasticRounding, optim.AdamW8bit):
    """AdamW with 8-bit state."""


class PagedAdamW8bit(Resumable, StochasticRounding, optim.PagedAdamW8bit):
    """AdamW with 8-bit state in CUDA unified memory, which the driver pages to the host when GPU memory is short."""


class PagedAdamW(Resumable, StochasticRounding, optim.PagedAdamW32bit):
    """AdamW with fp32 state in CUDA unified memory, which the driver pages to the host when GPU memory is short."""

"""bitsandbytes' AdamW, resumable when memory runs out in a step, and able to train int8 weights."""

from __future__ import annotations

from bitsandbytes import optim

from tracknet.memory.resumable import Resumable
from tracknet.quantization.trainable_int8 import StochasticRounding


class AdamW8bit(Resumable, StochasticRounding, optim.AdamW8bit):
    """State in one byte per value."""


class PagedAdamW8bit(Resumable, StochasticRounding, optim.PagedAdamW8bit):
    """State in one byte per value, which can leave the GPU."""


class PagedAdamW(Resumable, StochasticRounding, optim.PagedAdamW32bit):
    """State in fp32, which can leave the GPU."""

"""Memory budget of a training step: what is free, an absolute size, or a share of full fine-tuning."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tracknet.errors import UserError

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}  # bytes per unit
LEAN = 0.1  # share of full fine-tuning that the budget `lean` stands for


@dataclass(frozen=True)
class Budget:
    """Upper bound of the peak memory of a training step. At most one attribute is set; neither means all free memory.

    Attributes:
        num_bytes: bound in bytes.
        share: bound relative to the planned peak of full fine-tuning with the same batch.
    """

    num_bytes: int | None = None
    share: float | None = None


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size such as ``8GB`` or ``24GiB``; ``None`` if the text is not a positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_budget(text: str) -> Budget:
    """Parse ``training.memory_optimization.budget``.

    Args:
        text: ``free``, ``lean``, a size such as ``6GB``, or a share such as ``50%``.

    Raises:
        UserError: if the text is none of these.
    """
    if text == "free":
        return Budget()
    if text == "lean":
        return Budget(share=LEAN)
    if (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())) and float(share[1]) > 0:
        return Budget(share=float(share[1]) / 100)
    if (num_bytes := parse_bytes(text)) is not None:
        return Budget(num_bytes=num_bytes)
    raise UserError(
        f"training.memory_optimization.budget={text}: must be free, lean, a size such as 6GB, or a share of full"
        " fine-tuning such as 50%."
    )

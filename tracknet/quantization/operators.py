"""Products as single operators, where something has to see them as such.

Selective checkpointing decides by operator what it keeps, but the products here are autograd functions that consist of
many operators. While ``as_operators`` is active, each product is called as one custom operator. Otherwise its function
is called directly: the detour takes 15 us on the host, a thousand times per step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OPERATORS: dict[Any, Callable] = {}  # function of each operator, for meters that look inside
_state = threading.local()  # on a GPU, backward recomputes in a thread of its own


@contextmanager
def as_operators() -> Iterator[None]:
    """Call products as single operators in this context and thread."""
    before = getattr(_state, "active", False)
    _state.active = True
    try:
        yield
    finally:
        _state.active = before


def operator(name: str) -> Callable[[Callable], Callable]:
    """Return a decorator that makes a function of tensors and numbers available as the operator ``tracknet::name``.

    With fake tensors, which have no content, the operator calls the function too.

    Args:
        name: name of the operator.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(f"tracknet::{name}", function, mutates_args=())
        op.register_fake(function)
        OPERATORS[op._opoverload] = function

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return op(*args) if getattr(_state, "active", False) else function(*args)

        return call

    return decorate

"""Types of bitsandbytes' optimizers, which bring none: for the classes that are mixed in before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    class BitsandbytesOptimizer:
        """What bitsandbytes' optimizers offer."""

        state: dict[Any, Any]

        def __init__(self, *args: Any, **settings: Any) -> None: ...
        def step(self, closure: Any = None) -> Any: ...
        def init_state(self, group: dict, p: Any, gindex: int, pindex: int) -> None: ...
        def update_step(self, group: dict, p: Any, gindex: int, pindex: int) -> None: ...

else:
    BitsandbytesOptimizer = object

"""Types of bitsandbytes' optimizers, which have none, for the mixin classes that precede them in the bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    class BitsandbytesOptimizer:
        """Interface of bitsandbytes' optimizers that the mixins use."""

        state: dict[Any, Any]

        def __init__(self, *args: Any, **settings: Any) -> None: ...
        def step(self, closure: Any = None) -> Any: ...
        def init_state(self, group: dict, p: Any, gindex: int, pindex: int) -> None: ...
        def update_step(self, group: dict, p: Any, gindex: int, pindex: int) -> None: ...

else:
    # At run time a mixin has no base of its own; ``super()`` finds the optimizer by the method resolution order.
    BitsandbytesOptimizer = object

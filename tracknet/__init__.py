"""Memory-efficient training of ball-tracking networks with large vision backbones.

Track the ball in a video with a model that is part of the package::

    import tracknet

    run = tracknet.load("embedded/vit_tiny_heatmap")
    for ball in run.track("rally.mp4"):
        print(ball.frame, ball.xy_image, ball.confidence)
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING

from tracknet.errors import UserError

if TYPE_CHECKING:
    from tracknet.api.clips import make_clip
    from tracknet.api.run import Run, load, plan, swap_adapter, train
    from tracknet.api.track import Track
    from tracknet.config import Config, compose
    from tracknet.data.labels import BallLabel, Clip, Visibility
    from tracknet.tracking.records import Detection

__all__ = [
    "BallLabel",
    "Clip",
    "Config",
    "Detection",
    "Run",
    "Track",
    "UserError",
    "Visibility",
    "compose",
    "load",
    "make_clip",
    "plan",
    "swap_adapter",
    "train",
]

# bitsandbytes warns at import that an optional package is missing; this project does not use it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Imported on first use: torch and transformers take seconds, and the package itself needs neither.
_HOMES = {
    "BallLabel": "tracknet.data.labels",
    "Clip": "tracknet.data.labels",
    "Config": "tracknet.config",
    "Detection": "tracknet.tracking.records",
    "Run": "tracknet.api.run",
    "Track": "tracknet.api.track",
    "Visibility": "tracknet.data.labels",
    "compose": "tracknet.config",
    "load": "tracknet.api.run",
    "make_clip": "tracknet.api.clips",
    "plan": "tracknet.api.run",
    "swap_adapter": "tracknet.api.run",
    "train": "tracknet.api.run",
}
_RENAMED = {"switch": "swap_adapter"}  # read up to version 0.3


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata  # takes longer to import than everything else here

        return metadata.version("tracknet")
    if name in _RENAMED:
        warnings.warn(f"tracknet.{name} is now tracknet.{_RENAMED[name]}", FutureWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'tracknet' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

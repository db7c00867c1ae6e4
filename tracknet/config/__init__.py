"""Configuration of a run: YAML files and command-line overrides as one typed object.

Most names are imported on first access, because the dataclasses of the settings import torch, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tracknet.config.names import BUILT_IN, SECTIONS, config_names, is_override

if TYPE_CHECKING:
    from tracknet.config.composing import (
        Config,
        apply_overrides,
        compose,
        compose_data,
        load_config,
        save_config,
        to_config,
    )

__all__ = [
    "BUILT_IN",
    "SECTIONS",
    "Config",
    "apply_overrides",
    "compose",
    "compose_data",
    "config_names",
    "is_override",
    "load_config",
    "save_config",
    "to_config",
]


def __getattr__(name: str) -> object:
    """Import a name from ``composing`` on first access (called by Python, PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'tracknet.config' has no attribute '{name}'")
    return getattr(importlib.import_module("tracknet.config.composing"), name)

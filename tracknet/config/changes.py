"""Settings of an existing run that may be changed, according to the metadata of their fields."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Literal

from tracknet.config.reading import section_of
from tracknet.config.renamed import current_override

Occasion = Literal["resume", "load"]


def changeable_settings(config: type, occasion: Occasion, prefix: str = "") -> Iterator[str]:
    """Yield the settings that may be changed on an occasion, as prefixes of overrides.

    Fields are marked in their metadata: ``field(default=1, metadata={"changes": ("resume",)})``. A marked section
    stands for all settings in it.

    Args:
        config: dataclass of a section.
        occasion: ``resume`` for continuing the training exactly, ``load`` for predicting and scoring with the trained
            model.
        prefix: key of the section followed by a dot, empty for the top level.

    Yields:
        Key of a setting followed by ``=``, or key of a section followed by a dot.
    """
    hints = typing.get_type_hints(config)
    for f in fields(config):
        section = section_of(hints[f.name])
        if occasion in f.metadata.get("changes", ()):
            yield f"{prefix}{f.name}{'.' if section else '='}"
        elif section:
            yield from changeable_settings(section, occasion, f"{prefix}{f.name}.")


def find_unchangeable(config: type, occasion: Occasion, overrides: Sequence[str]) -> str | None:
    """Return the first override that is not allowed on an occasion, or ``None`` if all are allowed.

    Args:
        config: dataclass of the whole configuration.
        occasion: see ``changeable_settings``.
        overrides: arguments ``section.key=value``; old names of settings are accepted.
    """
    allowed = tuple(changeable_settings(config, occasion))
    return next((o for o in overrides if not current_override(o, warn=False).startswith(allowed)), None)

"""What may be changed of a run that exists: metadata of its settings."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Literal

from tracknet.config.reading import section_of
from tracknet.config.renamed import current_override

Occasion = Literal["resume", "load"]


def changeable_settings(config: type, occasion: Occasion, prefix: str = "") -> Iterator[str]:
    """Yield the settings that may be changed on an occasion, as the beginnings of overrides.

    A field says so in its metadata: ``field(default=1, metadata={"changes": ("resume",)})``. A section that says so
    means all its settings, and is yielded with a dot at its end, a setting with ``=``.

    Args:
        config: dataclass of a section.
        occasion: ``resume`` continues training exactly; ``load`` predicts and scores with the model that was trained.
        prefix: name of the section, with a dot at its end.
    """
    hints = typing.get_type_hints(config)
    for f in fields(config):
        section = section_of(hints[f.name])
        if occasion in f.metadata.get("changes", ()):
            yield f"{prefix}{f.name}{'.' if section else '='}"
        elif section:
            yield from changeable_settings(section, occasion, f"{prefix}{f.name}.")


def find_unchangeable(config: type, occasion: Occasion, overrides: Sequence[str]) -> str | None:
    """Return the first override that may not be given on an occasion, ``None`` where all may."""
    allowed = tuple(changeable_settings(config, occasion))
    return next((o for o in overrides if not current_override(o, warn=False).startswith(allowed)), None)

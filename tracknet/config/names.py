"""Names of the sections and of the YAML files of each section.

This module imports nothing that takes time, so that parsing a command line is fast.
"""

from __future__ import annotations

from pathlib import Path

SECTIONS = ("data", "model", "training", "evaluation", "seed")  # top-level keys of a configuration
_PACKAGE = Path(__file__).parent.parent
# Folder of the YAML files: inside the package in a wheel, next to it in a checkout.
BUILT_IN = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())


def config_names(section: str, config_dir: Path | None = None) -> list[str]:
    """Return the names of a section's YAML files, sorted and without ``.yaml``.

    Args:
        section: ``data``, ``model`` or ``training``.
        config_dir: folder with further files of the user, or ``None``.
    """
    folders = [f for f in (config_dir, BUILT_IN) if f is not None]
    return sorted({p.stem for f in folders for p in (f / section).glob("*.yaml")})


def is_override(argument: str) -> bool:
    """Return whether a command-line argument is ``section.key=value`` rather than a flag or a path."""
    key, equals, _ = argument.partition("=")
    if not equals or not key.replace(".", "").replace("_", "").isalnum():
        return False
    # A file may be named a=b.mp4. If no such file exists, the argument counts as an override, so that an unknown
    # section is reported as such.
    return key.partition(".")[0] in SECTIONS or not Path(argument).exists()

"""Names of sections and of the YAML files that ship: what parsing a command line needs, and nothing that takes time to
import."""

from __future__ import annotations

from pathlib import Path

SECTIONS = ("data", "model", "training", "evaluation", "seed")
_PACKAGE = Path(__file__).parent.parent
# In a wheel the YAML files lie inside the package, in a checkout beside it.
BUILT_IN = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())


def config_names(section: str, config_dir: Path | None = None) -> list[str]:
    """List the YAML names of a section."""
    folders = [f for f in (config_dir, BUILT_IN) if f is not None]
    return sorted({p.stem for f in folders for p in (f / section).glob("*.yaml")})


def is_override(argument: str) -> bool:
    """Whether a command-line argument is ``section.key=value``, rather than a flag or a path; a file may be called
    ``a=b.mp4``."""
    key, equals, _ = argument.partition("=")
    if not equals or not key.replace(".", "").replace("_", "").isalnum():
        return False
    return key.partition(".")[0] in SECTIONS or not Path(argument).exists()

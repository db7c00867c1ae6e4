"""Messages about unknown settings and invalid values, with suggestions."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from dataclasses import fields

from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from tracknet.config.reading import describe_section, options_of, section_of
from tracknet.errors import first_line, nearest


def list_settings(config: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the full name and the type of every setting and section.

    Args:
        config: dataclass of a section.
        prefix: key of the section followed by a dot, empty for the top level.
    """
    hints = typing.get_type_hints(config)
    for f in fields(config):
        yield prefix + f.name, hints[f.name]
        if section := section_of(hints[f.name]):
            yield from list_settings(section, f"{prefix}{f.name}.")


def suggest(key: str, config: type) -> str:
    """Return ``"; did you mean 'x'?"`` for the setting that was probably meant, or an empty string.

    Args:
        key: unknown key, such as ``training.lr``.
        config: dataclass of the whole configuration.
    """
    # Candidates are settings with the same name in another section, and settings with a similar name in the same one.
    names = [name for name, _ in list_settings(config)]
    last = key.rpartition(".")[2]
    same = [name for name in names if f".{name}".endswith(f".{key}")] or [n for n in names if n.endswith(f".{last}")]
    siblings = [n for n in names if n.rpartition(".")[0] == key.rpartition(".")[0]]
    if not same and difflib.get_close_matches(key, siblings, n=1, cutoff=0.8):
        return nearest(key, siblings)
    return f"; did you mean '{same[0]}'?" if same else nearest(key, names)


def explain(error: Exception, source: str, config: type, key: str | None = None) -> str:
    """Convert an error of OmegaConf to a message for the user.

    Args:
        error: error raised by OmegaConf.
        source: file or command-line argument that contains the setting.
        config: dataclass of the whole configuration.
        key: key of the setting, if the error does not contain it.
    """
    key = getattr(error, "full_key", None) or key
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and key:
        return f"{source}: unknown setting '{key}'{suggest(key, config)}"
    expected = _expected(key, dict(list_settings(config)).get(key)) if key else None
    return f"{source}: {f'{key}: ' if key else ''}{expected or first_line(error)}"


def suggest_for_flag(flag: str, config: type) -> str:
    """Return a hint at the setting that a flag such as ``--batch-size`` probably means, or an empty string.

    Args:
        flag: unknown command-line flag.
        config: dataclass of the whole configuration.
    """
    # Settings by the last part of their key. Reversed, so that the first of several settings with that part is kept.
    name = flag.lstrip("-").partition("=")[0].replace("-", "_").lower()
    by_name = {n.rpartition(".")[2]: n for n, hint in reversed(list(list_settings(config))) if section_of(hint) is None}
    # In this order of preference: the same name, a similar one, an abbreviation, the most words in common.
    words = set(name.split("_"))
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    abbreviated = [n for n in by_name if min(len(n), len(name)) > 1 and (n == _initials(name) or name == _initials(n))]
    shares = {n: len(words & set(n.split("_"))) / len(words | set(n.split("_"))) for n in by_name}
    sharing = [n for n in sorted(by_name, key=shares.__getitem__, reverse=True) if shares[n]]
    candidates = [by_name[n] for n in ([name] if name in by_name else [*close, *abbreviated, *sharing])]
    return f"; settings are written without dashes: {candidates[0]}=…" if candidates else ""


def _initials(name: str) -> str:
    """Return the first letters of the words of a name: ``bs`` for ``batch_size``."""
    return "".join(word[:1] for word in name.split("_"))


def _expected(key: str, hint: object) -> str | None:
    """Return what a section, tuple or list expects, or ``None`` for other settings.

    For these types, OmegaConf's own message names its internal classes.
    """
    if section_of(hint):
        return describe_section(key, hint)
    for option in options_of(hint):
        if typing.get_origin(option) is tuple:
            return f"expected a list of {len(typing.get_args(option))} numbers: {key}=[…,…]"
        if typing.get_origin(option) is list:
            return f"expected a list: {key}=[…]"
    return None

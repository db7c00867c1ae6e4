"""What is said about a setting that is not there, or that has a value of another kind."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from dataclasses import fields

from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from tracknet.config.reading import describe_section, options_of, section_of
from tracknet.errors import first_line, nearest


def list_settings(config: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the full name and the type of every setting, sections included."""
    hints = typing.get_type_hints(config)
    for f in fields(config):
        yield prefix + f.name, hints[f.name]
        if section := section_of(hints[f.name]):
            yield from list_settings(section, f"{prefix}{f.name}.")


def suggest(key: str, config: type) -> str:
    """Return ``"; did you mean 'x'?"`` for the setting that was probably meant: one of that name elsewhere, else one of
    a similar name."""
    names = [name for name, _ in list_settings(config)]
    last = key.rpartition(".")[2]
    same = [name for name in names if f".{name}".endswith(f".{key}")] or [n for n in names if n.endswith(f".{last}")]
    beside = [n for n in names if n.rpartition(".")[0] == key.rpartition(".")[0]]
    if not same and difflib.get_close_matches(key, beside, n=1, cutoff=0.8):
        return nearest(key, beside)
    return f"; did you mean '{same[0]}'?" if same else nearest(key, names)


def explain(error: Exception, source: str, config: type, key: str | None = None) -> str:
    """Say what is wrong with a configuration.

    Args:
        error: OmegaConf's.
        source: where the setting stands: a file, or the argument of a command.
        config: the type of the whole configuration.
        key: which setting, where the error does not say.
    """
    key = getattr(error, "full_key", None) or key
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and key:
        return f"{source}: there is no setting '{key}'{suggest(key, config)}"
    expected = _expected(key, dict(list_settings(config)).get(key)) if key else None
    return f"{source}: {f'{key}: ' if key else ''}{expected or first_line(error)}"


def suggest_for_flag(flag: str, config: type) -> str:
    """Return the setting that a flag such as ``--batch-size`` probably means, or an empty string."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_").lower()
    last = {n.rpartition(".")[2]: n for n, hint in reversed(list(list_settings(config))) if section_of(hint) is None}
    words = set(name.split("_"))
    close = difflib.get_close_matches(name, last, n=1, cutoff=0.8)
    abbreviated = [n for n in last if min(len(n), len(name)) > 1 and (n == _initials(name) or name == _initials(n))]
    shares = {n: len(words & set(n.split("_"))) / len(words | set(n.split("_"))) for n in last}
    of_a_word = [n for n in sorted(last, key=shares.__getitem__, reverse=True) if shares[n]]
    same = [last[n] for n in ([name] if name in last else [*close, *abbreviated, *of_a_word])]
    return f"; settings are given without dashes: {same[0]}=…" if same else ""


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _expected(key: str, hint: object) -> str | None:
    """Say what a setting takes, where OmegaConf speaks of its own classes."""
    if section_of(hint):
        return describe_section(key, hint)
    for option in options_of(hint):
        if typing.get_origin(option) is tuple:
            return f"takes a list of {len(typing.get_args(option))} numbers: {key}=[…,…]"
        if typing.get_origin(option) is list:
            return f"takes a list: {key}=[…]"
    return None

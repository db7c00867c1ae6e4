"""Read YAML as the settings' types say: names and paths are text however they look, and nothing is run, imported or
looked up.

YAML 1.1 turns ``00010`` into 8 and ``off`` into false. Here a scalar stays the text that it is, and becomes a number or
a truth value only where the setting is one. Tags are refused, and of ``${…}`` only plain references to other settings
are let through, where a person wrote them.
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import yaml

from tracknet.errors import UserError

MAX_BYTES = 1_000_000  # a configuration has a few thousand
MAX_NODES = 20_000  # aliases can unfold into more than a machine holds
NULL = ("", "~", "null", "Null", "NULL")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# ``${data.root}``, but neither a resolver (``${oc.env:HOME}``) nor a reference within a reference.
_REFERENCE = re.compile(r"(?<!\\)\$\{\.*[A-Za-z_][\w.\[\]]*\}")


@dataclass(frozen=True)
class Reader:
    """Reads values of one source.

    Attributes:
        source: what messages name: a file, or the argument of a command.
        allows_references: whether ``${section.key}`` may stand in it; a saved configuration is resolved and has none.
    """

    source: str
    allows_references: bool

    def read_file(self, path: Path, hint: object) -> object:
        """Read a file as a value of a type.

        Raises:
            UserError: it cannot be read or is no YAML, or holds what is refused; names the setting.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(
                    f"{self.source}: has {path.stat().st_size:,} bytes; a configuration has a few thousand."
                )
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.source}: is not valid YAML: not UTF-8 text ({error}).") from error
        except OSError as error:
            raise UserError(f"{self.source}: cannot be read ({error.strerror}).") from error
        return self.read(text, hint)

    def read(self, text: str, hint: object, key: str = "") -> object:
        """Read YAML text as a value of a type; see ``read_file``."""
        try:
            node = yaml.BaseLoader(text).get_single_node()
            return None if node is None else _Conversion(self).convert(node, hint, key)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.source}: is not valid YAML: {' '.join(str(error).split())}") from error
        except RecursionError as error:
            raise UserError(f"{self.source}: is nested too deeply for a configuration.") from error

    def read_argument(self, text: str, hint: object, key: str) -> object:
        """Read what stands behind ``key=`` in a command: text as it is where the setting is text, else YAML."""
        if is_text(hint) and not text.startswith(("'", '"')):
            node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
            return _Conversion(self).convert(node, hint, key)
        return self.read(text, hint, key)


class _Conversion:
    """One pass over a tree of YAML nodes."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.num_nodes = 0

    def convert(self, node: yaml.Node, hint: object, key: str) -> object:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.error(key, "has more values than a configuration can mean; do aliases unfold into each other?")
        if node.tag.rpartition(":")[2] not in ("str", "seq", "map") or not node.tag.startswith("tag:yaml.org,2002:"):
            raise self.error(key, f"has the tag {node.tag}; tags are not read here, leave it out.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, hint, key)
        if key and section_of(hint) is not None and not any(option is str for option in options_of(hint)):
            is_scalar = isinstance(node, yaml.ScalarNode)
            if not is_scalar or not ("${" in node.value or (node.style is None and node.value in NULL)):
                raise self.error(key, describe_section(key, hint))
        if isinstance(node, yaml.SequenceNode):
            inner = element_hints(hint, len(node.value))
            return [self.convert(child, h, f"{key}[{i}]") for i, (child, h) in enumerate(zip(node.value, inner))]
        return self._scalar(node, hint, key)

    def _mapping(self, node: yaml.MappingNode, hint: object, key: str) -> dict:
        values: dict[str, object] = {}
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise self.error(key, "has a key that is no name.")
            if name.value in values:
                raise self.error(key, f"'{name.value}' stands there twice; keep one.")
            full = f"{key}.{name.value}" if key else name.value
            values[name.value] = self.convert(child, member_hint(hint, name.value), full)
        return values

    def _scalar(self, node: yaml.ScalarNode, hint: object, key: str) -> object:
        text, options = node.value, options_of(hint)
        if "${" in _REFERENCE.sub("", text) if self.reader.allows_references else "${" in text:
            allowed = (
                "only references to other settings are read, such as ${data.root}"
                if self.reader.allows_references
                else (
                    "a saved configuration is resolved, so this one was changed by hand or by a stranger: write the"
                    " value itself"
                )
            )
            raise self.error(key, f"holds '{text}'; {allowed}.")
        if node.style is None and text in NULL and (type(None) in options or not is_text(hint)):
            if type(None) not in options and section_of(hint) is not None:
                raise self.error(key, f"is a section and cannot be null; it has {', '.join(names_of(hint))}.")
            return None
        if node.style is None and is_text(hint):
            if bool in options and text.lower() in TRUTH:
                return TRUTH[text.lower()]
            if int in options and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text):
                return int(text)
        return text

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.reader.source}: {f'{key}: ' if key else ''}{message}")


def hint_of(key: str, config: type) -> object:
    """Return the type of a setting by its full name.

    Raises:
        KeyError: there is none of that name.
    """
    hint: object = config
    for name in key.split("."):
        section = section_of(hint)
        if section is not None and name not in names_of(section):
            raise KeyError(key)
        if section is None and not any(typing.get_origin(option) is dict for option in options_of(hint)):
            raise KeyError(key)
        hint = member_hint(hint, name)
    return hint


def options_of(hint: object) -> tuple:
    """Return the members of ``A | B``, or the type itself."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def section_of(hint: object) -> typing.Any:
    """Return the dataclass of ``X`` or ``X | None``."""
    return next((option for option in options_of(hint) if is_dataclass(option)), None)


def describe_section(key: str, hint: object) -> str:
    """Return what to say where a section is given one value, instead of settings."""
    examples = ", ".join(f"{key}.{name}=…" for name in names_of(hint)[:2])
    off = f", or switch it off with {key}=null" if type(None) in options_of(hint) else ""
    return f"is a section with settings of its own: {examples}{off}"


def names_of(hint: object) -> list[str]:
    """Return the names of a section's settings."""
    return [f.name for f in fields(section_of(hint))]


def is_text(hint: object) -> bool:
    """Whether text is a value of a type."""
    return any(option is str or typing.get_origin(option) is typing.Literal for option in options_of(hint))


def member_hint(hint: object, name: str) -> object:
    """Return the type of a key of a section or a dict; of one that is not there, ``object``."""
    if (section := section_of(hint)) is not None:
        return typing.get_type_hints(section).get(name, object)
    for option in options_of(hint):
        if typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
    return object


def element_hints(hint: object, number: int) -> list[object]:
    """Return the types of the first so many elements of a list or tuple."""
    for option in options_of(hint):
        if typing.get_origin(option) is list:
            return [typing.get_args(option)[0]] * number
        if typing.get_origin(option) is tuple:
            return [*typing.get_args(option), *[object] * number][:number]
    return [object] * number

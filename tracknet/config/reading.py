"""Safe reading of YAML according to the types of the settings.

YAML 1.1 reads ``00010`` as 8 and ``off`` as false, which is wrong for names and paths. Here a scalar remains text, and
is converted to a number or a bool only if the setting has such a type. Nothing in a file is executed, imported or
resolved: tags are rejected, and of ``${…}`` only plain references to other settings are accepted, in files that the
user has written.
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import yaml

from tracknet.errors import UserError

MAX_BYTES = 1_000_000  # maximum size of a file; a configuration has a few thousand bytes
MAX_NODES = 20_000  # maximum number of YAML nodes, because nested aliases can expand to more than fits in memory
NULL = ("", "~", "null", "Null", "NULL")  # spellings of null
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Reference to a setting such as ``${data.root}``; neither a resolver (``${oc.env:HOME}``) nor a nested reference.
_REFERENCE = re.compile(r"(?<!\\)\$\{\.*[A-Za-z_][\w.\[\]]*\}")


@dataclass(frozen=True)
class Reader:
    """Reader of the YAML of one source.

    Attributes:
        source: name of the source in messages: a file or a command-line argument.
        allows_references: whether values may contain ``${section.key}``. A saved configuration is resolved and contains
            none.
    """

    source: str
    allows_references: bool

    def read_file(self, path: Path, hint: object) -> object:
        """Read a file as a value of a type.

        Args:
            path: YAML file.
            hint: type of the value, such as the dataclass of a section.

        Returns:
            Nested dicts, lists and scalars, or ``None`` for an empty file. Numbers remain text, which OmegaConf
            converts.

        Raises:
            UserError: if the file cannot be read, is not valid YAML or contains a rejected value; the message names the
                setting.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(
                    f"{self.source}: has {path.stat().st_size:,} bytes, too many for a configuration, which has a few"
                    " thousand."
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
            # BaseLoader constructs no objects. The node tree still distinguishes quoted from plain scalars.
            node = yaml.BaseLoader(text).get_single_node()
            return None if node is None else _Conversion(self).convert(node, hint, key)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.source}: is not valid YAML: {' '.join(str(error).split())}") from error
        except RecursionError as error:
            raise UserError(f"{self.source}: is nested too deeply for a configuration.") from error

    def read_argument(self, text: str, hint: object, key: str) -> object:
        """Read the value of a command-line argument ``key=value``.

        Args:
            text: the value.
            hint: type of the setting.
            key: full name of the setting.
        """
        # For a setting that takes text, the value is used as it is: a path may contain characters special to YAML.
        if is_text(hint) and not text.startswith(("'", '"')):
            node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
            return _Conversion(self).convert(node, hint, key)
        return self.read(text, hint, key)


class _Conversion:
    """Conversion of one tree of YAML nodes.

    Args:
        reader: reader of the source.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.num_nodes = 0

    def convert(self, node: yaml.Node, hint: object, key: str) -> object:
        """Convert a node to dicts, lists and scalars.

        Args:
            node: node to convert.
            hint: type of the setting.
            key: full name of the setting, empty for the whole file.

        Raises:
            UserError: if the node or one of its children is rejected.
        """
        # Counted per visit, not per node: an alias shares the node that it refers to.
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.error(key, "has too many values for a configuration; do its aliases refer to each other?")
        if node.tag.rpartition(":")[2] not in ("str", "seq", "map") or not node.tag.startswith("tag:yaml.org,2002:"):
            raise self.error(key, f"has the tag {node.tag}; tags are not supported, remove it.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, hint, key)
        # A section cannot be a single value, except null and references.
        if key and section_of(hint) is not None and not any(option is str for option in options_of(hint)):
            is_scalar = isinstance(node, yaml.ScalarNode)
            if not is_scalar or not ("${" in node.value or (node.style is None and node.value in NULL)):
                raise self.error(key, describe_section(key, hint))
        if isinstance(node, yaml.SequenceNode):
            inner = element_hints(hint, len(node.value))
            return [self.convert(child, h, f"{key}[{i}]") for i, (child, h) in enumerate(zip(node.value, inner))]
        return self._scalar(node, hint, key)

    def _mapping(self, node: yaml.MappingNode, hint: object, key: str) -> dict:
        """Convert a mapping, and reject names that are not scalars or occur several times."""
        values: dict[str, object] = {}
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise self.error(key, "contains a key that is not a name.")
            if name.value in values:
                raise self.error(key, f"contains '{name.value}' twice; remove one.")
            full = f"{key}.{name.value}" if key else name.value
            values[name.value] = self.convert(child, member_hint(hint, name.value), full)
        return values

    def _scalar(self, node: yaml.ScalarNode, hint: object, key: str) -> object:
        """Convert a scalar to text, null, a bool or an int."""
        # Remove valid references first; any other ``${`` is a resolver or malformed.
        text, options = node.value, options_of(hint)
        if "${" in _REFERENCE.sub("", text) if self.reader.allows_references else "${" in text:
            allowed = (
                "only references to other settings, such as ${data.root}, are supported"
                if self.reader.allows_references
                else (
                    "a saved configuration is resolved and contains no references, so the file has been edited: write"
                    " the value itself"
                )
            )
            raise self.error(key, f"contains '{text}'; {allowed}.")
        # `style` is None for plain scalars; quoted ones are always text.
        if node.style is None and text in NULL and (type(None) in options or not is_text(hint)):
            if type(None) not in options and section_of(hint) is not None:
                raise self.error(key, f"is a section and cannot be null; its settings are {', '.join(names_of(hint))}.")
            return None
        # Settings such as `int | str`, for which OmegaConf would keep any text. Integers have no leading zeros: 00010
        # is a name.
        if node.style is None and is_text(hint):
            if bool in options and text.lower() in TRUTH:
                return TRUTH[text.lower()]
            if int in options and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text):
                return int(text)
        return text

    def error(self, key: str, message: str) -> UserError:
        """Return an error whose message starts with the source and the key."""
        return UserError(f"{self.reader.source}: {f'{key}: ' if key else ''}{message}")


def hint_of(key: str, config: type) -> object:
    """Return the type of a setting.

    Args:
        key: full name of the setting.
        config: dataclass of the whole configuration.

    Raises:
        KeyError: if there is no such setting.
    """
    hint: object = config
    for name in key.split("."):
        section = section_of(hint)
        if section is not None and name not in names_of(section):
            raise KeyError(key)
        # Only a dict may have keys besides those of a section.
        if section is None and not any(typing.get_origin(option) is dict for option in options_of(hint)):
            raise KeyError(key)
        hint = member_hint(hint, name)
    return hint


def options_of(hint: object) -> tuple:
    """Return the members of ``A | B``, or the type itself."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def section_of(hint: object) -> typing.Any:
    """Return the dataclass in a type ``X`` or ``X | None``, or ``None`` if it contains no dataclass."""
    return next((option for option in options_of(hint) if is_dataclass(option)), None)


def describe_section(key: str, hint: object) -> str:
    """Return a message for a section that is given a single value instead of settings."""
    examples = ", ".join(f"{key}.{name}=…" for name in names_of(hint)[:2])
    off = f", or turn it off with {key}=null" if type(None) in options_of(hint) else ""
    return f"is a section; set its settings: {examples}{off}"


def names_of(hint: object) -> list[str]:
    """Return the names of a section's settings."""
    return [f.name for f in fields(section_of(hint))]


def is_text(hint: object) -> bool:
    """Return whether a type accepts text."""
    return any(option is str or typing.get_origin(option) is typing.Literal for option in options_of(hint))


def member_hint(hint: object, name: str) -> object:
    """Return the type of a key of a section or a dict, or ``object`` if there is no such key."""
    if (section := section_of(hint)) is not None:
        return typing.get_type_hints(section).get(name, object)
    for option in options_of(hint):
        if typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
    return object


def element_hints(hint: object, number: int) -> list[object]:
    """Return the types of the first ``number`` elements of a list or tuple."""
    for option in options_of(hint):
        if typing.get_origin(option) is list:
            return [typing.get_args(option)[0]] * number
        if typing.get_origin(option) is tuple:
            return [*typing.get_args(option), *[object] * number][:number]
    return [object] * number

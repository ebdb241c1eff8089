"""A strict reader of small YAML files: what is written is what is read, and every error has a line.

PyYAML's default rules surprise: ``1e-3`` is a string, ``on`` is true, ``017`` is 15, ``12:30`` is 750, the
last of two equal keys wins silently, nested aliases grow without bound. Here numbers follow YAML 1.2's core
schema without leading zeros, only ``true`` and ``false`` are booleans, and equal keys, aliases, tags, more
than one document and deep nesting are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from recemb.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str")}

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlDocument:
    """The mapping a YAML file holds, and the 1-based line of each of its keys and list items."""

    path: Path
    values: dict[str, object]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, key_path: KeyPath) -> str:
        """``file:line`` of ``key_path``, or of its nearest parent that is in the file."""
        for end in range(len(key_path), 0, -1):
            if key_path[:end] in self.lines:
                return f"{self.path}:{self.lines[key_path[:end]]}"
        return str(self.path)


class _StrictLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema; refuses aliases and deep nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor} is not allowed; write the value out",
                problem_mark=event.start_mark,  # type: ignore[arg-type]
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[arg-type]
        finally:
            self.depth -= 1


for _kind, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"~|null|", "~n\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"{_TAG}{_kind}", re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


def read_yaml(path: Path) -> YamlDocument:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file; at most 1 MiB of UTF-8.

    Returns:
        its values and the line of each key.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or uses something this reader refuses. The message
            starts with ``file:line:``.
    """
    text = _read_text(path)
    lines: dict[KeyPath, int] = {}
    with _located(path, text):
        loader = _StrictLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return YamlDocument(path, {}, lines)
            if not isinstance(root, yaml.MappingNode):
                raise yaml.MarkedYAMLError(
                    problem="the top level must be a mapping of `key: value` lines",
                    problem_mark=root.start_mark,
                )
            values = _mapping(loader, root, (), lines)
        finally:
            loader.dispose()
    return YamlDocument(path, values, lines)


def parse_scalar(text: str) -> object:
    """The value a YAML file would give ``text``: a number, true, false, null, else the text itself."""
    loader = _StrictLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError:
        return text
    finally:
        loader.dispose()


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; this is not a configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte {data[error.start]:#04x})") from error


@contextmanager
def _located(path: Path, text: str) -> Iterator[None]:
    try:
        yield
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: character {error.character!r} is not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}:{line}: {detail}") from error


def _mapping(
    loader: _StrictLoader, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]
) -> dict[str, object]:
    _require_tag(node, {f"{_TAG}map"})
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = _value(loader, key_node, path, {}) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"a key must be a plain word, not {getattr(key_node, 'value', key)!r}",
                problem_mark=key_node.start_mark,
            )
        if key in values:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} is given twice, first on line {lines[(*path, key)]}",
                problem_mark=key_node.start_mark,
            )
        lines[(*path, key)] = key_node.start_mark.line + 1
        values[key] = _value(loader, value_node, (*path, key), lines)
    return values


def _value(loader: _StrictLoader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> object:
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        _require_tag(node, {f"{_TAG}seq"})
        items: list[object] = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_value(loader, item, (*path, index), lines))
        return items
    _require_tag(node, _SCALAR_TAGS)
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError) as error:
        raise yaml.MarkedYAMLError(
            problem=f"{'.'.join(map(str, path)) or 'value'}: not a number that can be read",
            problem_mark=node.start_mark,
        ) from error


def _require_tag(node: yaml.Node, allowed: set[str]) -> None:
    if node.tag not in allowed:
        raise yaml.MarkedYAMLError(
            problem=f"tag {node.tag.removeprefix(_TAG)!r} is not allowed; only plain values are read",
            problem_mark=node.start_mark,
        )

"""YAML, read strictly and within bounds: the one reader of every file and option that holds YAML.

It is YAML's safe subset, except that
- a key written twice is an error, instead of the last one winning;
- numbers are decimal: `010` is a text, not 8, `1:30` is not 90, and `1e-3` is a number; dates are texts; no tags;
- what is larger or nested deeper than any real file is refused before it is built, aliases counted as often as used.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from sparsekit.errors import SparsekitError, shown

__all__ = ["MOST_DEPTH", "MOST_VALUES", "dump_yaml", "parse_yaml"]

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000  # MInference's heads of a model of 126 layers by 128 heads, one rule each, are 113,000 at worst
MOST_DEPTH = 40

MERGE = "tag:yaml.org,2002:merge"
_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", list("yYnNtTfFoO")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
)


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0
        self.sizes: dict[int, int] = {}  # of finished nodes with everything below them, aliases spelled out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise SparsekitError(f"line {line}: the tag {shown(event.tag)} is not allowed; write plain values")
        if self.depth >= MOST_DEPTH:
            raise SparsekitError(f"line {line}: nested more than {MOST_DEPTH} deep")
        alias, before = isinstance(event, yaml.AliasEvent), self.values
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise SparsekitError(f"line {line}: {shown('*' + event.anchor)} holds itself")
        self.values += self.sizes[id(node)] if alias else 1
        if self.values > MOST_VALUES:
            raise SparsekitError(f"line {line}: more than {MOST_VALUES:,} values")
        if not alias:
            self.sizes[id(node)] = self.values - before
        return node


for _tag, _pattern, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _mapping_without_twins(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        merge, line = key_node.tag == MERGE, key_node.start_mark.line + 1
        key = "<<" if merge else loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise SparsekitError(f'line {line}: {shown(key)} cannot be a key; write a text, such as "0-4"')
        if key in seen:
            raise SparsekitError(f"line {line}: {shown(key)} is written twice")
        seen.add(key)
    loader.flatten_mapping(node)  # `<<: *anchor`: what is written here wins over what comes from there
    made = loader.construct_object
    return {made(key_node, deep=True): made(value_node, deep=True) for key_node, value_node in node.value}


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_twins)


def parse_yaml(text: str, where: str) -> Any:
    """What YAML text says; a SparsekitError that begins with `where` if it is none, or is too large."""
    if len(text) > MOST_CHARACTERS:
        raise SparsekitError(f"{where}: too long: at most {MOST_CHARACTERS:,} characters of YAML are read.")
    try:
        return yaml.load(text, _StrictLoader)
    except SparsekitError as error:
        raise SparsekitError(f"{where}: {error}.") from None
    except (yaml.YAMLError, ValueError) as error:  # int() refuses numbers of more than 4,300 digits
        raise SparsekitError(f"{where}: not YAML: {_said(error)}.") from None


def _said(error: Exception) -> str:
    """What PyYAML found, with the line, and without the text that it quotes, which may be long."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        words = " ".join(filter(None, (error.context, error.problem)))
        return _cut(words) + (f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "")
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {shown(error.character)} at {error.position:,} is not allowed"
    return _cut(str(error).partition(";")[0])


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Dumper(yaml.SafeDumper):
    """Quotes what this reader, or one of YAML 1.1, would take for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS[:-1]:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def dump_yaml(data: Any, where: str) -> str:
    """YAML text of plain values, which `parse_yaml` reads back; a SparsekitError beginning with `where` for others."""
    try:
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None)
    except (yaml.YAMLError, RecursionError) as error:
        raise SparsekitError(f"{where}: cannot be written as YAML: {_cut(str(error))}.") from None

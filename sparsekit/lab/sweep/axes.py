"""Axes: a place in the base config and the values that stand there in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from sparsekit.errors import SparsekitError, nearest, one_line, shown
from sparsekit.patterns import bounded, parse_pattern, pattern_class

__all__ = [
    "PLACES", "RANGES", "Axis", "Named", "Range", "label_of", "overlap", "plain", "read_axis", "said_of", "set_value",
]  # fmt: skip

RANGES = "ranges"  # an axis `ranges.21-29` moves the rule that the base writes under "21-29"
CONFIG_FIELDS = ("default", "layers", "heads", "dense_below_tokens", "min_queries", "dense_impl", "precision")
PLACES = ("model", "task", "tokens", "seed")  # what a constraint may name beside the axes
MOST_VALUES = 1000  # of an axis


class Range(BaseModel):
    """Values of an axis of a search: numbers from `low` to `high`, both included; whole ones where both are whole.

    Attributes:
        low, high: the ends.
        log: small numbers as closely as large ones: 64 to 128 is as far as 512 to 1024.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    low: int | float
    high: int | float
    log: bool = False

    @field_validator("low", "high", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        bounded(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("it should be a number")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} should be below high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} should be above 0 with `log`")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def ends(self) -> tuple[int | float, int | float]:
        return (self.low, self.high) if self.whole else (float(self.low), float(self.high))


class Named(NamedTuple):
    """A value that labels, constraints and records call by a name."""

    name: str
    value: Any


@dataclass(frozen=True)
class Axis:
    """One thing that is varied: its name in labels and constraints, its path in the config, and its values."""

    name: str
    path: tuple[str, ...]
    values: tuple[Any, ...] | Range

    def some(self) -> tuple[Any, ...]:
        """All values, or the ends of a range."""
        return self.values.ends() if isinstance(self.values, Range) else self.values

    @property
    def ordered(self) -> bool:
        """Whether values that stand side by side are alike: numbers, and ranges of layers, as they are written."""
        if self.path[0] == RANGES:
            return None not in self.some()
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.some())


def read_axis(name: str, said: Any, base: Mapping[str, Any]) -> Axis:
    where = f"axes.{name if len(name) <= 60 else shown(name)}"
    if name in ("model", "models", "tasks", "lengths", "seeds", "samples"):
        raise SparsekitError(f"{where}: write `{name}` beside `axes`, not in it.")
    path, values = name, said
    if isinstance(said, Mapping) and ("path" in said or not {"low", "high"} & set(said)):
        if set(said) != {"path", "values"}:
            raise SparsekitError(
                f"{where} = {shown(dict(said))}: an axis is a list of values, {{path: ..., values: [...]}}, or in a "
                "search a range {low: ..., high: ...}."
            )
        path, values = said["path"], said["values"]
        if not isinstance(name, str) or not name.isidentifier() or name in PLACES:
            raise SparsekitError(f"{where}: the name of an axis must be one word, and not one of {', '.join(PLACES)}.")
    if not isinstance(path, str):
        raise SparsekitError(
            f"{where}: the path must be a string such as layers.21-29.window_tokens; got {shown(path)}."
        )
    parts = tuple(path.split("."))
    last = parts[-1]
    own = last if name == path and last.isidentifier() else name
    if isinstance(values, Mapping) and any(isinstance(value, Mapping) for value in values.values()):
        values = _named(where, values)
    elif isinstance(values, Mapping):
        _check_path(where, parts, base)
        return Axis(own, parts, _range(where, values))
    if not isinstance(values, list):
        raise SparsekitError(f"{where} = {shown(values)}: a list of values is needed.")
    if not values:
        raise SparsekitError(f"{where}: empty grid: an axis needs at least one value.")
    if len(values) > MOST_VALUES:
        raise SparsekitError(f"{where}: {len(values):,} values; an axis has at most {MOST_VALUES:,}.")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise SparsekitError(f"{where}: {shown(plain(value))} is listed twice.")
    _check_path(where, parts, base)
    return Axis(own, parts, tuple(values))


def _named(where: str, said: Mapping[Any, Any]) -> list[Named]:
    wrong = [name for name in said if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise SparsekitError(f"{where}: the name of a value must be a string; got {shown(wrong[0])}.")
    return [Named(name, value) for name, value in said.items()]


def _range(where: str, said: Mapping[str, Any]) -> Range:
    try:
        return Range.model_validate(dict(said))
    except ValidationError as error:
        raise SparsekitError(one_line(error, Range, where)) from None


def _check_path(where: str, path: tuple[str, ...], base: Mapping[str, Any]) -> None:
    """An error with the nearest name where a path leads to no field of the base."""
    first, *rest = path
    allowed = (*CONFIG_FIELDS, RANGES)
    if first not in allowed:
        raise SparsekitError(
            f"{where}: unknown field {shown(first)}: one of {', '.join(allowed)}.{nearest(first, allowed)}"
        )
    if first == RANGES:
        layers = list(base.get("layers", {}))
        if len(rest) != 1 or rest[0] not in layers:
            said = ".".join(rest)
            raise SparsekitError(
                f"{where}: the base has no rule {shown(said)} under `layers`; it has {', '.join(layers) or 'none'}."
                f"{nearest(said, layers)}"
            )
        return
    depth = {"layers": 1, "heads": 2}.get(first, 0)
    node: Any = base.get(first, "dense" if first == "default" else {})
    for part in rest[:depth]:
        if not isinstance(node, Mapping) or part not in node:
            keys = list(node) if isinstance(node, Mapping) else []
            raise SparsekitError(
                f"{where}: the base has no rule {shown(part)} under `{first}`; it has {', '.join(keys) or 'none'}."
                f"{nearest(part, keys)}"
            )
        node = node[part]
    if len(rest) > depth:
        if first not in ("default", "layers", "heads"):
            raise SparsekitError(f"{where}: {first!r} has no fields of its own; the axis is {first!r}.")
        _check_field(where, rest[depth:], node)


def _check_field(where: str, path: Sequence[str], pattern: Any) -> None:
    """A field of a pattern, or of one inside a union: `window_tokens`, `of.0.window_tokens`."""
    parsed = parse_pattern(pattern)
    fields = [name for name in pattern_class(parsed.name).model_fields if name != "name"]
    if path[0] not in fields:
        raise SparsekitError(
            f"{where}: {parsed.name} has no field {shown(path[0])}; it has {', '.join(fields) or 'none'}."
            f"{nearest(path[0], fields)}"
        )
    if len(path) == 1:
        return
    inner = getattr(parsed, path[0])
    if not isinstance(inner, list | tuple) or path[1] not in map(str, range(len(inner))):
        raise SparsekitError(f"{where}: {parsed.name} has no field {shown('.'.join(path))}.")
    if len(path) > 2:
        _check_field(where, path[2:], inner[int(path[1])])


def set_value(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set one place of a config; a rule whose value is null is taken out."""
    node: Any = data
    for i, part in enumerate(path[:-1]):
        key = int(part) if isinstance(node, list) else part
        below = node.get(key) if isinstance(node, dict) else node[key]
        if below is None:
            below = "dense" if path[: i + 1] == ("default",) else {}
        if isinstance(below, str):  # a pattern by its name alone
            below = {"name": below}
        elif isinstance(below, tuple):
            below = list(below)
        node[key] = below
        node = below
    if value is None and isinstance(node, dict) and len(path) > 1:
        node.pop(path[-1], None)
    else:
        node[int(path[-1]) if isinstance(node, list) else path[-1]] = deepcopy(value)


def overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one of two paths is the other, or leads to it."""
    short = min(len(a), len(b))
    whole_layers = {a, b} >= {("layers",)} and RANGES in (a[0], b[0])
    return a[:short] == b[:short] or whole_layers


def said_of(axes: Sequence[Axis], values: Sequence[Any]) -> dict[str, Any]:
    """What labels, constraints and records hold."""
    both = zip(axes, values, strict=True)
    return {axis.name: value.name if isinstance(value, Named) else value for axis, value in both}


def label_of(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in said.items()) or "base"


def _short(value: Any) -> str:
    """`triangle`, `triangle(window_tokens=128)`, `none`, `12-29`."""
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key}={_short(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_short(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return " + ".join(map(_short, value))
    return "none" if value is None else str(value)


def plain(value: Any) -> Any:
    """What constraints and error messages see: numbers and words; a pattern is its name."""
    return value if isinstance(value, int | float | str | bool) else _short(value).partition("(")[0]

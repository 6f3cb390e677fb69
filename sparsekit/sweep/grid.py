"""A question in YAML, and the runs that answer it: every combination of its axes, models, tasks, lengths and seeds.

>>> from sparsekit.sweep import load_question
>>> asked = load_question('''
... question: From which layer on may the triangle start?
... model: smollm2-135m
... base: {layers: {"21-29": triangle}}
... tasks: [passkey]
... lengths: [2048]
... axes: {from: {path: ranges.21-29, values: ["0-29", "15-29", "21-29"]}}
... ''')
>>> [run.label for run in asked.runs()]
['dense', 'from=0-29', 'from=15-29', 'from=21-29']
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparsekit.config import SparseConfig, load, parse_range, parse_yaml
from sparsekit.errors import SparsekitError, nearest
from sparsekit.patterns import Pattern, parse_pattern, pattern_class
from sparsekit.sweep.best import parse_rule
from sparsekit.tasks import read_corpus, task

__all__ = ["OBJECTIVES", "Axis", "Question", "Range", "Run", "Search", "config_key", "load_question"]

RANGES = "ranges"  # an axis `ranges.21-29` moves the rule that the base writes under "21-29"
CONFIG_FIELDS = ("default", "layers", "heads", "dense_below_tokens", "min_queries", "dense_impl")
PLACES = ("model", "task", "tokens", "seed")  # what a constraint may name beside the axes
OBJECTIVES = ("score", "density", "time", "kl")  # of a search: the first goes up, the others down


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


@dataclass(frozen=True)
class Run:
    """One config on one task, length and seed of one model: what a record is of.

    Attributes:
        axes: axis name -> value, as in the YAML; empty for dense.
        config: None is the model as it is.
        corpus: of the tasks that read one, and its digest.
        device: its kind, "cpu" or "cuda"; another kind is another run.
    """

    model: str
    label: str
    axes: Mapping[str, Any] = field(hash=False)
    config: SparseConfig | None = field(hash=False)
    task: str
    tokens: int
    seed: int
    samples: int
    corpus: str | None = None
    corpus_digest: str | None = None
    dtype: str | None = None
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Of what is computed, not of how it is called: equal for equal work."""
        said = {
            "model": self.model,
            "config": canonical(self.config),
            "task": self.task,
            "tokens": self.tokens,
            "seed": self.seed,
            "samples": self.samples,
            "corpus": self.corpus_digest,
            "dtype": self.dtype,
            "device": self.device,
        }
        return _digest(said)

    def identity(self) -> dict[str, Any]:
        """What every record says of its run, failed or not."""
        return {
            "key": self.key,
            "label": self.label,
            "axes": dict(self.axes),
            "config_key": config_key(self.config),
            "model": self.model,
            "task": self.task,
            "tokens": self.tokens,
            "seed": self.seed,
            "samples": self.samples,
        }

    def __str__(self) -> str:
        return f"{self.task} at {self.tokens}, {self.label}"


class Search(BaseModel):
    """Combinations are suggested, from what the ones before have shown, instead of all being run.

    Attributes:
        objectives: one or several of `score`, which goes up, and `density`, `time` and `kl`, which go down; the means
            of a `Standing`.
        subject_to: a rule as `best` takes it; a config that does not keep it is worse than any that does.
        trials: how many different configs are tried.
        seed: of the suggestions.
        batch: trials that are suggested together, and so can be done together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    objectives: list[str] = Field(min_length=1)
    subject_to: str | None = None
    trials: int = Field(ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    batch: int = Field(1, ge=1)

    @field_validator("objectives", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        values = _several(value)
        for one in values:
            if one not in OBJECTIVES:
                raise SparsekitError(f"{one!r} is none of {', '.join(OBJECTIVES)}.{nearest(one, OBJECTIVES)}")
        return values

    @field_validator("subject_to")
    @classmethod
    def _rule(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rule(value)
        return value


class Question(BaseModel):
    """A validated sweep file.

    Attributes:
        version: 1.
        question: what is asked, in a sentence.
        model: one or several, as `--model`.
        base: the config that axes change: a path beside this file, or the config itself.
        tasks, lengths, seeds: each config is asked all of them.
        samples: prompts for each run.
        axes: a path in the config -> values, or a name of one's own -> {path, values}.
        constraints: expressions over axes, model, task, tokens and seed that a run must fulfil.
        dense: the model as it is, too.
        corpus: of the tasks that read one: a folder, or `pydoc`.
        dtype: of the weights; default the model's (on a CPU the faster one).
        search: try some combinations of the axes, which may be ranges then, instead of all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    question: str
    model: list[str] = Field(min_length=1)
    base: SparseConfig = SparseConfig()
    tasks: list[str] = Field(min_length=1)
    lengths: list[int] = Field(min_length=1)
    samples: int = Field(24, ge=1)
    seeds: list[int] = Field([0], min_length=1)
    axes: dict[str, Any] = {}
    constraints: list[str] = []
    dense: bool = True
    corpus: str | None = None
    dtype: str | None = None
    search: Search | None = None

    @field_validator("model", "tasks", "lengths", "seeds", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _several(value)

    def varied(self) -> tuple[Axis, ...]:
        """The axes, each checked against the base.

        Raises:
            SparsekitError: an axis that names no field, has no value or one twice, or sets what another sets; a range
                without a search, or a search that has nothing to vary or to be held against.
        """
        base = self.base.to_dict()
        axes = [_axis(name, said, base) for name, said in self.axes.items()]
        if self.search is None:
            for name, axis in zip(self.axes, axes, strict=True):
                if isinstance(axis.values, Range):
                    raise SparsekitError(f"axes.{name}: a range needs `search:`; without it write a list of values.")
        elif not axes:
            raise SparsekitError("search: there are no axes to search.")
        elif len(self.model) > 1:
            raise SparsekitError(
                f"search: one model, not {len(self.model)}: each would be loaded anew for every trial."
            )
        elif not self.dense:
            raise SparsekitError("search: needs `dense: true`, which its trials are held against.")
        for i, axis in enumerate(axes):
            for other in axes[:i]:
                if axis.name == other.name:
                    raise SparsekitError(f"axes: two are called {axis.name!r}; give one a name of its own.")
                if _overlap(axis.path, other.path):
                    a, b = ".".join(other.path), ".".join(axis.path)
                    raise SparsekitError(f"axes: two values for one key: {a!r} and {b!r} set the same field.")
        return tuple(axes)

    def runs(self, *, device: str = "cpu", samples: int | None = None) -> list[Run]:
        """All runs, those of one model, task, length and seed together, dense first; equal work once.

        Of a search, those that are known before it begins: dense.

        Args:
            device: its kind is part of what a run is.
            samples: instead of the file's.

        Raises:
            SparsekitError: a wrong axis, task or constraint, a combination that is no config, or no run at all.
        """
        axes, rules = self.varied(), [_Constraint(text) for text in self.constraints]
        for name in self.tasks:
            task(name, self.corpus)
        if self.corpus:
            read_corpus(self.corpus)
        points: list[tuple[dict[str, Any], SparseConfig]] = []
        if self.search is not None:
            self._check_each_value(axes, rules)
        else:
            every = product(*(axis.some() for axis in axes))
            points = [(_said(axes, values), self._config(axes, values)) for values in every]
        found: dict[str, Run] = {}
        for place in self._places():
            chosen = [self._run(place, "dense", {}, None, device, samples)] if self.dense else []
            for said, config in points:
                if _fulfilled(rules, place, said):
                    chosen.append(self._run(place, _label(said), said, config, device, samples))
            for one in chosen:
                found.setdefault(one.key, one)
        if self.search is None and not any(run.config is not None for run in found.values()):
            why = "no combination fulfils the constraints" if points and rules else "nothing differs from dense"
            raise SparsekitError(f"empty grid: {why}; {len(points)} combinations, {len(rules)} constraints.")
        return list(found.values())

    def combination(self, values: Sequence[Any], *, device: str = "cpu", samples: int | None = None) -> list[Run]:
        """The runs of one combination, a value for each axis; none where one of them does not fulfil a constraint.

        Raises:
            SparsekitError: as `runs`.
        """
        axes, rules = self.varied(), [_Constraint(text) for text in self.constraints]
        said, places = _said(axes, values), self._places()
        if not all(_fulfilled(rules, place, said) for place in places):
            return []
        config = self._config(axes, values)
        return [self._run(place, _label(said), said, config, device, samples) for place in places]

    def _places(self) -> list[dict[str, Any]]:
        every = product(self.model, self.tasks, self.lengths, self.seeds)
        return [dict(zip(PLACES, place, strict=True)) for place in every]

    def _run(
        self,
        place: Mapping[str, Any],
        label: str,
        said: dict[str, Any],
        config: SparseConfig | None,
        device: str,
        samples: int | None,
    ) -> Run:
        reads = task(place["task"], self.corpus) != task(place["task"])
        return Run(
            label=label,
            axes=said,
            config=config,
            samples=samples or self.samples,
            corpus=self.corpus if reads else None,
            corpus_digest=read_corpus(self.corpus).digest if reads and self.corpus else None,
            dtype=self.dtype,
            device=device.partition(":")[0],
            **place,
        )

    def _check_each_value(self, axes: Sequence[Axis], rules: Sequence[_Constraint]) -> None:
        """What no search could check for all: each value makes a config, the other axes at their first."""
        first = [axis.some()[0] for axis in axes]
        for i, axis in enumerate(axes):
            for value in axis.some():
                values = [*first[:i], value, *first[i + 1 :]]
                if any(_fulfilled(rules, place, _said(axes, values)) for place in self._places()):
                    self._config(axes, values)

    def _config(self, axes: Sequence[Axis], values: Sequence[Any]) -> SparseConfig:
        data = deepcopy(self.base.to_dict())
        moved = []
        for axis, value in zip(axes, values, strict=True):
            if axis.path[0] == RANGES:
                moved.append((axis.path[1], value))
            else:
                _set(data, axis.path, value)
        if moved:
            places = dict(moved)
            layers = [(places.get(key, key), rule) for key, rule in data["layers"].items()]
            kept = [(str(key), rule) for key, rule in layers if key is not None]
            if len(dict(kept)) < len(kept):
                raise SparsekitError(f"axes: {_label_of(axes, values)}: two rules for the same layers.")
            data["layers"] = dict(kept)
        try:
            return load(data)
        except SparsekitError as error:
            raise SparsekitError(f"axes: {_label_of(axes, values)}: {error}") from None


def load_question(source: Question | Mapping[str, Any] | str | Path) -> Question:
    """A Question from a path to a YAML file, YAML text (several lines), a mapping, or a question.

    Raises:
        SparsekitError: one line that names the file, the field, the value, and what is allowed.
    """
    if isinstance(source, Question):
        return source
    where, folder = "sweep", Path()
    if isinstance(source, Mapping):
        data: Any = dict(source)
    elif isinstance(source, str) and "\n" in source:
        data = parse_yaml(source, where)
    else:
        path = Path(source)
        where, folder = str(path), path.parent
        if not path.is_file():
            beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise SparsekitError(f"sweep {where!r}: no such file.{nearest(where, beside)}")
        try:
            data = parse_yaml(path.read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as error:
            raise SparsekitError(f"sweep {where!r} cannot be read as text: {error}.") from None
    if not isinstance(data, Mapping):
        raise SparsekitError(f"{where}: a mapping is needed (question, model, base, tasks, lengths, axes, ...).")
    try:
        base = data.get("base", {})
        if isinstance(base, str):
            base = load(folder / base if (folder / base).is_file() else Path(base))
        asked = Question.model_validate({**data, "base": load(base) if isinstance(base, Mapping) else base})
        asked.varied()
    except ValidationError as error:
        raise SparsekitError(f"{where}: {_one_line(error)}") from None
    except SparsekitError as error:
        raise SparsekitError(f"{where}: {error}") from None
    return asked


def canonical(config: SparseConfig | None) -> Any:
    """What a config makes a model do, as JSON: layer by layer as written, with every parameter; None for dense."""
    if config is None:
        return None
    patterns = [config.default, *config.layers.values(), *(p for rule in config.heads.values() for p in rule.values())]
    if config.dense_impl == "model" and all(pattern.name == "dense" for pattern in patterns):
        return None

    def dumped(pattern: Pattern) -> Any:
        return pattern.model_dump(mode="json")

    def by_number(rules: Mapping[str, Any], value: Callable[[Any], Any]) -> list[Any]:
        return sorted(
            ([sorted(parse_range(key)), value(rule)] for key, rule in rules.items()), key=lambda pair: pair[0]
        )

    return {
        "default": dumped(config.default),
        "layers": by_number(config.layers, dumped),
        "heads": by_number(config.heads, lambda rule: by_number(rule, dumped)),
        "dense_below_tokens": config.dense_below_tokens,
        "min_queries": config.min_queries,
        "dense_impl": config.dense_impl,
    }


def config_key(config: SparseConfig | None) -> str:
    """Equal for configs that do the same."""
    return "dense" if canonical(config) is None else _digest(canonical(config))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


# ---- axes


def _several(value: Any) -> list[Any]:
    """One, or a list of different ones."""
    values = value if isinstance(value, list) else [value]
    for i, one in enumerate(values):
        if one in values[:i]:
            raise SparsekitError(f"{one!r} stands twice")
    return values


def _axis(name: str, said: Any, base: Mapping[str, Any]) -> Axis:
    where = f"axes.{name}"
    if name in ("model", "models", "tasks", "lengths", "seeds", "samples"):
        raise SparsekitError(f"{where}: write `{name}` beside `axes`, not in it.")
    path, values = name, said
    if isinstance(said, Mapping) and ("path" in said or not {"low", "high"} & set(said)):
        if set(said) != {"path", "values"}:
            raise SparsekitError(
                f"{where} = {dict(said)!r}: an axis is a list of values, {{path: ..., values: [...]}}, or in a search "
                "a range {low: ..., high: ...}."
            )
        path, values = said["path"], said["values"]
        if not isinstance(name, str) or not name.isidentifier() or name in PLACES:
            raise SparsekitError(f"{where}: a name of one's own is one word, and none of {', '.join(PLACES)}.")
    if not isinstance(path, str):
        raise SparsekitError(f"{where}: the path {path!r} is no text, such as layers.21-29.window_tokens.")
    parts = tuple(path.split("."))
    last = parts[-1]
    own = last if name == path and last.isidentifier() else name
    if isinstance(values, Mapping):
        _check_path(where, parts, base)
        return Axis(own, parts, _range(where, values))
    if not isinstance(values, list):
        raise SparsekitError(f"{where} = {values!r}: a list of values is needed.")
    if not values:
        raise SparsekitError(f"{where}: empty grid: an axis needs at least one value.")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise SparsekitError(f"{where}: {_plain(value)!r} stands twice.")
    _check_path(where, parts, base)
    return Axis(own, parts, tuple(values))


def _range(where: str, said: Mapping[str, Any]) -> Range:
    try:
        return Range.model_validate(dict(said))
    except ValidationError as error:
        raise SparsekitError(_one_line(error, where, Range)) from None


def _check_path(where: str, path: tuple[str, ...], base: Mapping[str, Any]) -> None:
    """An error with the nearest name where a path leads to no field of the base."""
    first, *rest = path
    allowed = (*CONFIG_FIELDS, RANGES)
    if first not in allowed:
        raise SparsekitError(
            f"{where}: {first!r} names no field: one of {', '.join(allowed)}.{nearest(first, allowed)}"
        )
    if first == RANGES:
        layers = list(base.get("layers", {}))
        if len(rest) != 1 or rest[0] not in layers:
            said = ".".join(rest)
            raise SparsekitError(
                f"{where}: {said!r} is no rule under `layers` of the base: {', '.join(layers) or 'it has none'}."
                f"{nearest(said, layers)}"
            )
        return
    depth = {"layers": 1, "heads": 2}.get(first, 0)
    node: Any = base.get(first, "dense" if first == "default" else {})
    for part in rest[:depth]:
        if not isinstance(node, Mapping) or part not in node:
            keys = list(node) if isinstance(node, Mapping) else []
            raise SparsekitError(
                f"{where}: {part!r} is no rule under {first!r} of the base: {', '.join(keys) or 'it has none'}."
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
            f"{where}: {path[0]!r} names no field of {parsed.name}: {', '.join(fields) or 'it has none'}."
            f"{nearest(path[0], fields)}"
        )
    if len(path) == 1:
        return
    inner = getattr(parsed, path[0])
    if not isinstance(inner, list | tuple) or not path[1].isdecimal() or int(path[1]) >= len(inner):
        raise SparsekitError(f"{where}: {'.'.join(path)!r} names no field of {parsed.name}.")
    if len(path) > 2:
        _check_field(where, path[2:], inner[int(path[1])])


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
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


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one of two paths is the other, or leads to it."""
    short = min(len(a), len(b))
    whole_layers = {a, b} >= {("layers",)} and RANGES in (a[0], b[0])
    return a[:short] == b[:short] or whole_layers


def _said(axes: Sequence[Axis], values: Sequence[Any]) -> dict[str, Any]:
    return {axis.name: value for axis, value in zip(axes, values, strict=True)}


def _label_of(axes: Sequence[Axis], values: Sequence[Any]) -> str:
    return _label(_said(axes, values))


def _label(said: Mapping[str, Any]) -> str:
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


def _plain(value: Any) -> Any:
    """What constraints and error messages see: numbers and words; a pattern is its name."""
    return value if isinstance(value, int | float | str | bool) else _short(value).partition("(")[0]


def _one_line(error: ValidationError, where: str = "", owner: type[BaseModel] = Question) -> str:
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # why another is missing
    path, value = ".".join(map(str, (*([where] if where else ()), *first["loc"]))), first["input"]
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) > 1:
            owner = Search  # the one part of a sweep with fields of its own
        fields, name = list(owner.model_fields), str(first["loc"][-1])
        return f"unknown field {path!r} = {value!r}; allowed: {', '.join(fields)}.{nearest(name, fields)}"
    if first["type"] == "missing":
        return f"{path}: is needed."
    if first["type"] == "too_short":
        return f"{path}: {'empty grid: ' if len(first['loc']) == 1 else ''}at least one is needed."
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should").rstrip(".")
    return f"{path} = {value!r}: {message}{'' if message.endswith('?') else '.'}"


# ---- constraints


class _Constraint:
    """An expression of names, numbers, words, comparisons, and, or, not, in, and arithmetic; nothing is called."""

    _BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
    _COMPARE: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.In: lambda a, b: a in b,
        ast.NotIn: lambda a, b: a not in b,
    }

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            raise SparsekitError(f"constraints: {text!r} is no expression, such as window_tokens <= tokens.") from None

    def holds(self, names: Mapping[str, Any]) -> bool:
        try:
            return bool(self._value(self.tree, names))
        except TypeError as error:
            raise SparsekitError(f"constraints: {self.text!r}: {error}.") from None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Name(id=name):
                raise SparsekitError(
                    f"constraints: {self.text!r}: {name!r} is none of {', '.join(names)}.{nearest(name, names)}"
                )
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._value(part, names) for part in parts]
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return not self._value(part, names)
            case ast.UnaryOp(op=ast.USub(), operand=part):
                return -self._value(part, names)
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, names) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, names) for part in parts)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in self._BINARY:
                return self._BINARY[type(op)](self._value(left, names), self._value(right, names))
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in self._COMPARE for op in ops):
                values = [self._value(part, names) for part in (left, *rest)]
                pairs = zip(ops, values, values[1:], strict=False)
                return all(self._COMPARE[type(op)](a, b) for op, a, b in pairs)
        raise SparsekitError(f"constraints: {self.text!r}: only comparisons and arithmetic of names and numbers.")


def _fulfilled(rules: Sequence[_Constraint], place: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    names = {**place, **{name: _plain(value) for name, value in said.items()}}
    return all(rule.holds(names) for rule in rules)


def groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that share prompts, in order: they go to one worker, which keeps what dense attention says."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault((run.model, run.task, run.tokens, run.seed, run.samples), []).append(run)
    yield from found.values()

"""A question in YAML, and the runs that answer it: every combination of its axes, models, tasks, lengths and seeds.

>>> from sparsekit.lab.sweep import load_question
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

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparsekit.config import SparseConfig, load, parse_yaml
from sparsekit.errors import SparsekitError, nearest, one_line, read_text, shown
from sparsekit.lab.provenance import content_of_code, content_of_source, patterns_of
from sparsekit.lab.sweep.axes import (
    PLACES,
    RANGES,
    Axis,
    Named,
    Range,
    label_of,
    overlap,
    read_axis,
    said_of,
    set_value,
)
from sparsekit.lab.sweep.best import parse_rule
from sparsekit.lab.sweep.constraints import Constraint, fulfilled
from sparsekit.lab.sweep.runs import Run
from sparsekit.lab.tasks import PYDOC, read_corpus, task

__all__ = ["OBJECTIVES", "Question", "Search", "load_question"]

OBJECTIVES = ("score", "density", "time", "kl")  # of a search: the first goes up, the others down
MOST_COMBINATIONS = 100_000  # of axes, models, tasks, lengths and seeds, before constraints leave some out
MOST_RUNS = 10_000  # of a sweep
MOST_OF_A_LIST = 1000


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
    trials: int = Field(ge=1, le=MOST_RUNS)
    seed: int = Field(0, ge=0, lt=2**32)
    batch: int = Field(1, ge=1, le=MOST_RUNS)

    @field_validator("objectives", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        values = _several(value)
        for one in values:
            if one not in OBJECTIVES:
                raise SparsekitError(f"{shown(one)} is none of {', '.join(OBJECTIVES)}.{nearest(one, OBJECTIVES)}")
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
    lengths: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(min_length=1)
    samples: int = Field(24, ge=1, lt=2**31)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
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
        axes = [read_axis(name, said, base) for name, said in self.axes.items()]
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
        places = len(self.model) * len(self.tasks) * len(self.lengths) * len(self.seeds)
        count = places * (1 if self.search is not None else self._combinations(axes))
        if count > MOST_COMBINATIONS:
            raise SparsekitError(
                f"axes: {count:,} combinations of axes, models, tasks, lengths and seeds; at most "
                f"{MOST_COMBINATIONS:,}: take values out, or write `search:`."
            )
        for i, axis in enumerate(axes):
            for other in axes[:i]:
                if axis.name == other.name:
                    raise SparsekitError(f"axes: two are called {axis.name!r}; give one a name of its own.")
                if overlap(axis.path, other.path):
                    a, b = ".".join(other.path), ".".join(axis.path)
                    raise SparsekitError(f"axes: two values for one key: {a!r} and {b!r} set the same field.")
        return tuple(axes)

    def runs(self, *, device: str = "cpu", samples: int | None = None, where: str | None = None) -> list[Run]:
        """All runs, those of one model, task, length and seed together, dense first; equal work once.

        Of a search, those that are known before it begins: dense.

        Args:
            device: its kind is part of what a run is.
            samples: instead of the file's.
            where: one more constraint, which leaves a part of the runs; dense's where another run is left.

        Raises:
            SparsekitError: a wrong axis, task or constraint, a combination that is no config, or no run at all.
        """
        axes, rules = self.varied(), [Constraint(text) for text in self.constraints]
        if where is not None:
            if self.search is not None:
                raise SparsekitError("where: a search has no parts; its trials follow from one another.")
            rules.append(Constraint(where))
        for name in self.tasks:
            if task(name, PYDOC) != task(name) and self.corpus is None:
                raise SparsekitError(f"tasks: {name} reads a text: write `corpus: FOLDER`, or `corpus: {PYDOC}`.")
        if self.corpus:
            read_corpus(self.corpus)
        places = self._places()
        grid = self._grid(axes, rules, places)
        found: dict[str, Run] = {}
        configs: dict[int, SparseConfig] = {}
        for place, chosen in zip(places, grid, strict=True):
            if self.dense and (chosen or where is None):
                run = self._run(place, "dense", {}, None, device, samples)
                found.setdefault(run.key, run)
            for number, values in chosen:
                if number not in configs:
                    configs[number] = self._config(axes, values)
                said = said_of(axes, values)
                run = self._run(place, label_of(said), said, configs[number], device, samples)
                found.setdefault(run.key, run)
        if self.search is None and not any(run.config is not None for run in found.values()):
            why = "no combination fulfils the constraints" if rules and not any(grid) else "nothing differs from dense"
            raise SparsekitError(
                f"empty grid: {why}; {self._combinations(axes)} combinations, {len(rules)} constraints."
            )
        return list(found.values())

    def _combinations(self, axes: Sequence[Axis]) -> int:
        return prod(len(axis.some()) for axis in axes)

    def _grid(
        self, axes: Sequence[Axis], rules: Sequence[Constraint], places: Sequence[Mapping[str, Any]]
    ) -> list[list[tuple[int, tuple[Any, ...]]]]:
        """For each place the combinations of values, numbered, that fulfil the constraints; none of a search."""
        if self.search is not None:
            self._check_each_value(axes, rules)
            return [[] for _ in places]
        every = list(enumerate(product(*(axis.some() for axis in axes))))
        grid = [[one for one in every if fulfilled(rules, place, said_of(axes, one[1]))] for place in places]
        count = sum(map(len, grid)) + len(places) * self.dense
        if count > MOST_RUNS:
            raise SparsekitError(
                f"axes: {count:,} runs; at most {MOST_RUNS:,}: take values out, add constraints, or write `search:`."
            )
        return grid

    def combination(self, values: Sequence[Any], *, device: str = "cpu", samples: int | None = None) -> list[Run]:
        """The runs of one combination, a value for each axis; none where one of them does not fulfil a constraint.

        Raises:
            SparsekitError: as `runs`.
        """
        axes, rules = self.varied(), [Constraint(text) for text in self.constraints]
        said, places = said_of(axes, values), self._places()
        if not all(fulfilled(rules, place, said) for place in places):
            return []
        config = self._config(axes, values)
        return [self._run(place, label_of(said), said, config, device, samples) for place in places]

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
        kind = task(place["task"], self.corpus)
        reads = kind != task(place["task"])
        return Run(
            label=label,
            axes=said,
            config=config,
            samples=samples or self.samples,
            corpus=self.corpus if reads else None,
            corpus_digest=read_corpus(self.corpus).digest if reads and self.corpus else None,
            dtype=self.dtype,
            device=device.partition(":")[0],
            source=content_of_source(place["model"]),
            code=content_of_code([kind, *patterns_of(config)]),
            **place,
        )

    def _check_each_value(self, axes: Sequence[Axis], rules: Sequence[Constraint]) -> None:
        """What no search could check for all: each value makes a config, the other axes at their first."""
        first = [axis.some()[0] for axis in axes]
        for i, axis in enumerate(axes):
            for value in axis.some():
                values = [*first[:i], value, *first[i + 1 :]]
                if any(fulfilled(rules, place, said_of(axes, values)) for place in self._places()):
                    self._config(axes, values)

    def _config(self, axes: Sequence[Axis], values: Sequence[Any]) -> SparseConfig:
        data = deepcopy(self.base.to_dict())
        moved = []
        for axis, chosen in zip(axes, values, strict=True):
            value = chosen.value if isinstance(chosen, Named) else chosen
            if axis.path[0] == RANGES:
                moved.append((axis.path[1], value))
            else:
                set_value(data, axis.path, value)
        if moved:
            places = dict(moved)
            layers = [(places.get(key, key), rule) for key, rule in data["layers"].items()]
            kept = [(str(key), rule) for key, rule in layers if key is not None]
            if len(dict(kept)) < len(kept):
                raise SparsekitError(f"axes: {label_of(said_of(axes, values))}: two rules for the same layers.")
            data["layers"] = dict(kept)
        try:
            return load(data)
        except SparsekitError as error:
            raise SparsekitError(f"axes: {label_of(said_of(axes, values))}: {error}") from None


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
    elif isinstance(source, str | Path):
        where, folder = str(source), Path(source).parent
        data = parse_yaml(read_text(source, "sweep"), where)
    else:
        raise SparsekitError(f"sweep {shown(source)}: want a path, YAML text, a mapping or a Question.")
    if not isinstance(data, Mapping):
        raise SparsekitError(f"{where}: a mapping is needed (question, model, base, tasks, lengths, axes, ...).")
    try:
        base = data.get("base", {})
        if isinstance(base, str):
            base = load(folder / base if os.path.isfile(folder / base) else Path(base))
        asked = Question.model_validate({**data, "base": load(base) if isinstance(base, Mapping) else base})
        asked.varied()
    except ValidationError as error:
        raise SparsekitError(f"{where}: {one_line(error, Question)}") from None
    except SparsekitError as error:
        raise SparsekitError(f"{where}: {error}") from None
    return asked


def _several(value: Any) -> list[Any]:
    """One, or a list of different ones."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise SparsekitError("empty grid: at least one is needed")
    if len(values) > MOST_OF_A_LIST:
        raise SparsekitError(f"{len(values):,} are listed; at most {MOST_OF_A_LIST:,}")
    for i, one in enumerate(values):
        if one in values[:i]:
            raise SparsekitError(f"{shown(one)} is listed twice")
    return values

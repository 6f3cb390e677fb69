"""The fastest config that keeps a rule: "score within 1% of dense", "kl below 0.01", or both joined by `and`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sparsekit.config import SparseConfig, load
from sparsekit.errors import SparsekitError

__all__ = ["Best", "Rule", "Standing", "best", "overview", "parse_rule", "standings"]

_WITHIN = re.compile(r"score within (\d+(?:\.\d+)?)\s*(%?) of dense")
_BELOW = re.compile(r"(kl|density) below (\d+(?:\.\d+)?(?:e-?\d+)?)")

Cell = tuple[str, str, int, int]  # model, task, tokens, seed
WHERE = ("model", "device", "dtype")  # what times and scores of one row of a table have in common


@dataclass(frozen=True)
class Standing:
    """One config over all the cells (model, task, length, seed) that dense has too.

    Attributes:
        label, config_key, config: which one; config None is dense.
        score: mean over the cells; `dense_score` is dense's over the same.
        time: mean over the cells of the time to first token as a share of dense's; None where none was measured.
        density: mean over the cells.
        kl: mean over the cells that have one, nats a token.
        cells: how many.
    """

    label: str
    config_key: str
    config: Mapping[str, Any] | None
    score: float
    dense_score: float
    time: float | None
    density: float
    kl: float | None
    cells: int

    def __str__(self) -> str:
        time = "" if self.time is None else f", first token after {self.time:.2f} of dense's time"
        kl = "" if self.kl is None else f", KL {self.kl:.2g}"
        return (
            f"{self.label}, score {self.score:.3f} (dense {self.dense_score:.3f}){time}, density {self.density:.3f}{kl}"
        )


@dataclass(frozen=True)
class Rule:
    """What a config must keep: functions that say by how much a Standing misses a part, 0 or less where it does not.

    `metrics` are the fields of a Standing that are looked at.
    """

    text: str
    metrics: tuple[str, ...]
    parts: tuple[Callable[[Standing], float], ...]

    def keeps(self, standing: Standing) -> bool:
        return all(part(standing) <= 0 for part in self.parts)


@dataclass(frozen=True)
class Best:
    """What `best` found: the winner, who else keeps the rule, fastest first, and all."""

    rule: str
    winner: Standing
    keep: tuple[Standing, ...]
    all: tuple[Standing, ...]

    def config(self) -> SparseConfig:
        """The winner's config, with how it was found as its provenance."""
        won = self.winner
        data = dict(won.config or {"version": 1})
        found = {
            "rule": self.rule,
            "score": won.score,
            "dense_score": won.dense_score,
            "time_of_dense": won.time,
            "density": won.density,
            "kl": won.kl,
            "cells": won.cells,
            "configs": len(self.all),
        }
        return load({**data, "provenance": {**data.get("provenance", {}), "sweep": found}})


def best(records: Sequence[Mapping[str, Any]], rule: str) -> Best:
    """The config of the least time to first token among those that keep `rule`; of equal ones, the less dense.

    Args:
        records: of a sweep, dense among them; failed ones are left out, and so is a config that lacks a cell.
        rule: `score within X% of dense` (of dense's mean score), `score within X of dense` (points), `kl below X`,
            `density below X`, joined by ` and `.

    Raises:
        SparsekitError: a rule that cannot be read, records without dense, or no config that keeps it.
    """
    try:
        parsed = parse_rule(rule)
    except SparsekitError as error:
        raise SparsekitError(f"best: {error}") from None
    found = [standing for standing in standings(records) if standing.config is not None]
    if not found:
        raise SparsekitError("best: no config has a record for every task, length and seed that dense has.")
    if "score" in parsed.metrics and not found[0].dense_score:
        raise SparsekitError("best: dense attention's own score is 0, so no score can be held against it.")
    keep = [standing for standing in found if parsed.keeps(standing)]
    if not keep:
        near = max(found, key=lambda standing: standing.score)
        raise SparsekitError(
            f"best: no config keeps {rule!r}; the best score is {near.score:.3f} ({near.label}), dense has "
            f"{near.dense_score:.3f}."
        )
    if all(standing.time is None for standing in keep):
        raise SparsekitError("best: no time to first token was measured (perplexity alone has none); add another task.")
    keep.sort(key=lambda standing: (standing.time if standing.time is not None else float("inf"), standing.density))
    return Best(rule, keep[0], tuple(keep), tuple(found))


def standings(records: Sequence[Mapping[str, Any]]) -> list[Standing]:
    """Every config that has all of dense's cells, dense first, in the order of the records."""
    by_config: dict[str, dict[Cell, Mapping[str, Any]]] = {}
    for record in records:
        if record.get("status", "ok") == "ok":
            by_config.setdefault(record["config_key"], {})[_cell(record)] = record
    dense = by_config.get("dense")
    if dense is None:
        raise SparsekitError("best: no record of dense to hold the others against; leave `dense: true` in the sweep.")
    return [_standing(key, cells, dense) for key, cells in by_config.items() if cells.keys() >= dense.keys()]


def overview(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of a table: a row for each config, a column for the mean score on each task and length.

    Of each model, device and dtype apart; time is a share of dense's there.
    """
    done = [record for record in records if record.get("status", "ok") == "ok"]
    places = list(dict.fromkeys((record["task"], record["tokens"]) for record in done))
    dense = {(_where(record), _cell(record)): record for record in done if record["config_key"] == "dense"}
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in done:
        groups.setdefault((_where(record), record["config_key"]), []).append(record)
    differ = [len({where[i] for where, _ in groups}) > 1 for i in range(len(WHERE))]
    rows = []
    for (where, _), mine in groups.items():
        times = [
            record["ttft_s"] / first["ttft_s"]
            for record in mine
            if record.get("ttft_s") and (first := dense.get((where, _cell(record)), {})).get("ttft_s")
        ]
        last = (
            _mean(".4f", [record["kl"] for record in mine if record.get("kl") is not None]),
            _mean(".2f", times),
            _mean(".3f", [record["density"] for record in mine]),
        )
        scores = (
            _mean(".3f", [record["score"] for record in mine if (record["task"], record["tokens"]) == place])
            for place in places
        )
        label = ", ".join([mine[0]["label"], *(str(at) for at, told in zip(where, differ, strict=True) if told)])
        rows.append([label, *scores, *last])
    return ["config", *(f"{name} {tokens}" for name, tokens in places), "KL", "time of dense", "density"], rows


def _mean(form: str, values: Sequence[float]) -> str:
    return format(mean(values), form) if values else ""


def _where(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in WHERE)


def _cell(record: Mapping[str, Any]) -> Cell:
    return record["model"], record["task"], record["tokens"], record["seed"]


def _standing(key: str, cells: Mapping[Cell, Mapping[str, Any]], dense: Mapping[Cell, Mapping[str, Any]]) -> Standing:
    mine = [cells[cell] for cell in dense]
    timed = [cell for cell in dense if cells[cell].get("ttft_s") and dense[cell].get("ttft_s")]
    kls = [record["kl"] for record in mine if record.get("kl") is not None]
    return Standing(
        label=mine[0]["label"],
        config_key=key,
        config=mine[0]["config"],
        score=mean(record["score"] for record in mine),
        dense_score=mean(record["score"] for record in dense.values()),
        time=mean(cells[cell]["ttft_s"] / dense[cell]["ttft_s"] for cell in timed) if timed else None,
        density=mean(record["density"] for record in mine),
        kl=mean(kls) if kls else None,
        cells=len(mine),
    )


def parse_rule(text: str) -> Rule:
    """A rule as `best` takes it.

    Raises:
        SparsekitError: a part that cannot be read.
    """
    metrics, parts = zip(*(_part(part.strip()) for part in text.lower().split(" and ")), strict=True)
    return Rule(text, metrics, parts)


def _part(text: str) -> tuple[str, Callable[[Standing], float]]:
    """(field it looks at, by how much it is missed) of a part of a rule."""
    if match := _WITHIN.fullmatch(text):
        number, percent = float(match[1]), match[2]

        def missed(s: Standing) -> float:
            return (s.dense_score * (1 - number / 100) if percent else s.dense_score - number) - 1e-12 - s.score

        return "score", missed
    if match := _BELOW.fullmatch(text):
        name, bound = match[1], math.nextafter(float(match[2]), -math.inf)  # the bound itself is not below it

        def above(s: Standing) -> float:
            value: float | None = getattr(s, name)
            return math.inf if value is None else value - bound

        return name, above
    raise SparsekitError(
        f"{text!r} cannot be read; write `score within 1% of dense`, `score within 0.02 of dense`, "
        "`kl below 0.01` or `density below 0.5`, joined by `and`."
    )

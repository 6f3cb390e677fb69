"""A search of a sweep: Optuna suggests combinations, from what was measured of those before, instead of all being run.

The suggestions follow from the file, its seed and the records alone. So nothing else is kept: a search that was killed
asks again from the start, and is told what the result file has already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

from sparsekit.errors import SparsekitError
from sparsekit.lab.sweep.axes import Axis, Range
from sparsekit.lab.sweep.best import Rule, Standing, parse_rule, standings
from sparsekit.lab.sweep.question import Question, Search
from sparsekit.lab.sweep.runs import Run, config_key, groups

__all__ = ["check_optuna", "front", "search"]

Record = Mapping[str, Any]
Doer = Callable[[Sequence[Run]], Sequence[Record]]  # runs -> their records, of now or of earlier, in the same order

POPULATION = 12  # of a generation of NSGA-II; Optuna's 50 is more than most searches have trials
RANDOM_AFTER = 20  # suggestions in a row that bring nothing new: the sampler is stuck at its optimum
GIVE_UP_AFTER = 500


def check_optuna() -> None:
    """Raises SparsekitError where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise SparsekitError("search needs optuna: pip install 'sparsekit-attention[optuna]'")


def search(question: Question, answer: Doer, *, device: str = "cpu", samples: int | None = None) -> int:
    """Try configs until there are `trials` different ones; returns how many there were: fewer where there are no more.

    One objective is searched by TPE (Bergstra et al. 2011), several by NSGA-II (Deb et al. 2002). A combination that
    does not fulfil the constraints is not run, and told as pruned; a config that was tried before is not counted again;
    one with a failed run is told as failed.

    Args:
        question: with a `search`.
        answer: does runs, or knows their records.
        device, samples: as of `Question.runs`.

    Raises:
        SparsekitError: Optuna is missing, no combination fulfils the constraints, one is no config, dense attention
            failed everywhere, or what the objectives or the rule need was not measured.
    """
    check_optuna()
    from optuna.trial import TrialState

    plan = question.search
    assert plan is not None
    rule = None if plan.subject_to is None else parse_rule(plan.subject_to)
    dense = answer(question.runs(device=device, samples=samples))
    _check_dense(dense, plan, rule)
    suggestions = _Suggestions(question, plan, device, samples)
    while len(suggestions.tried) < plan.trials:
        batch = suggestions.next(min(plan.batch, plan.trials - len(suggestions.tried)))
        if not batch:
            break
        runs = [run for group in groups([run for _, runs in batch for run in runs]) for run in group]
        records = dict(zip((run.key for run in runs), answer(runs), strict=True))
        for trial, own in batch:
            key = config_key(own[0].config)
            found = standings([*dense, *(records[run.key] for run in own)])
            standing = next((s for s in found if s.config_key == key), None)
            figures = [] if standing is None else [getattr(standing, name) for name in plan.objectives]
            missed = [part(standing) for part in rule.parts] if standing and rule else []
            if standing is None or not all(value is not None and math.isfinite(value) for value in figures + missed):
                suggestions.study.tell(trial, state=TrialState.FAIL)
                continue
            for i, by in enumerate(missed):
                trial.set_constraint(str(i), by)
            suggestions.study.tell(trial, figures)
    if not suggestions.tried:
        raise SparsekitError(f"search: none of {GIVE_UP_AFTER} suggestions fulfils the constraints.")
    return len(suggestions.tried)


def front(records: Sequence[Record], plan: Search) -> list[Standing]:
    """The configs that keep `subject_to` and than which none of these is better: as good in all objectives, and better
    in one. The best in the first objective first. Empty where none keeps it.

    Args:
        records: of a search, dense among them.

    Raises:
        SparsekitError: no record of dense.
    """
    rule = None if plan.subject_to is None else parse_rule(plan.subject_to)
    kept = [s for s in standings(records) if s.config is not None and (rule is None or rule.keeps(s))]

    def cost(standing: Standing) -> tuple[float, ...]:
        values = [(name, getattr(standing, name)) for name in plan.objectives]
        return tuple(float("inf") if value is None else -value if name == "score" else value for name, value in values)

    def beaten(by: tuple[float, ...], one: tuple[float, ...]) -> bool:
        return by != one and all(a <= b for a, b in zip(by, one, strict=True))

    costs = [cost(standing) for standing in kept]
    best = [s for s, one in zip(kept, costs, strict=True) if not any(beaten(other, one) for other in costs)]
    return sorted(best, key=cost)


def _check_dense(records: Sequence[Record], plan: Search, rule: Rule | None) -> None:
    """Dense attention is what trials are held against: what it has no figure for, they have none for either."""
    if all(record["status"] != "ok" for record in records):
        raise SparsekitError(
            f"search: dense attention failed, which trials are held against (--retry-failed does it again): "
            f"{records[0]['error']}"
        )
    [dense] = standings(records)
    for name in (*plan.objectives, *(rule.metrics if rule else ())):
        if getattr(dense, name) is None:
            raise SparsekitError(f"search: {name} was not measured: none of {', '.join(_tasks(records))} has it.")


def _tasks(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records))


class _Suggestions:
    """What Optuna suggests that is new.

    Attributes:
        study: of this search, in memory.
        tried: keys of the configs that it gave.
    """

    def __init__(self, question: Question, plan: Search, device: str, samples: int | None) -> None:
        import optuna

        self.question, self.device, self.samples = question, device, samples
        self.axes = question.varied()
        self.space = {axis.name: _distribution(axis) for axis in self.axes}
        self.random = optuna.samplers.RandomSampler(seed=plan.seed)
        self.sampler: Any = (
            optuna.samplers.TPESampler(seed=plan.seed)
            if len(plan.objectives) == 1
            else optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=plan.seed)
        )
        said = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says on stderr that it made a study
        directions = [_direction(name) for name in plan.objectives]
        self.study = optuna.create_study(directions=directions)
        optuna.logging.set_verbosity(said)
        self.tried: set[str] = set()

    def next(self, count: int) -> list[tuple[Any, list[Run]]]:
        """Up to `count` trials, each with its runs; fewer where nothing new comes any more."""
        found: list[tuple[Any, list[Run]]] = []
        while len(found) < count and (one := self._one()) is not None:
            found.append(one)
        return found

    def _one(self) -> tuple[Any, list[Run]] | None:
        from optuna.trial import TrialState

        for i in range(GIVE_UP_AFTER):
            self.study.sampler = self.sampler if i < RANDOM_AFTER else self.random
            trial = self.study.ask(self.space)
            values = [_value(axis, trial.params[axis.name]) for axis in self.axes]
            runs = self.question.combination(values, device=self.device, samples=self.samples)
            if not runs:
                self.study.tell(trial, state=TrialState.PRUNED)
            elif (key := config_key(runs[0].config)) in self.tried:
                self.study.tell(trial, state=TrialState.FAIL)  # a sampler takes no notice of these: once is enough
            else:
                self.tried.add(key)
                self.study.sampler = self.sampler
                return trial, runs
        return None


def _direction(objective: str) -> Literal["maximize", "minimize"]:
    return "maximize" if objective == "score" else "minimize"


def _distribution(axis: Axis) -> Any:
    """Of numbers in a range; of places in a list, which are neighbours where its values are ordered."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis.values, Range):
        low, high = axis.values.ends()
        if axis.values.whole:
            return IntDistribution(int(low), int(high), log=axis.values.log)
        return FloatDistribution(low, high, log=axis.values.log)
    if axis.ordered:
        return IntDistribution(0, len(axis.values) - 1)
    return CategoricalDistribution(range(len(axis.values)))


def _value(axis: Axis, drawn: int | float) -> Any:
    """The axis's value of what was drawn; of a range that is not whole six digits, which is what labels can bear."""
    if not isinstance(axis.values, Range):
        return axis.values[int(drawn)]
    low, high = axis.values.ends()
    return int(drawn) if axis.values.whole else min(max(float(f"{drawn:.6g}"), low), high)

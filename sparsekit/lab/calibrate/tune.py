"""tune: the cheapest mixture of patterns whose answers stay within a budget of divergence from dense, by measurement.

For each layer and candidate: KL of the answer's tokens from dense with that layer alone sparse, and its tile density. A
multiple-choice knapsack takes the sum of the layers' KL as the mixture's, which is a guess; so the whole mixture is
measured on prompts that were not tuned on, and the guess's allowance is widened or narrowed until the cheapest mixture
that holds is found. Where none holds, everything stays dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparsekit.config import ArchFacts, SparseConfig, format_range
from sparsekit.config.costs import explain
from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.effects import Effect, Judge
from sparsekit.lab.calibrate.mixture import write_config
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patterns import Pattern, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Choice", "Round", "Tuned", "choose", "summary", "tune"]

BINS = 2000  # steps of the knapsack's allowance; effects are rounded up to one
ROUNDS = 8
SKIP_BELOW = 0.05  # of a layer's even share: a candidate that harms less ends the measuring of dearer ones


@dataclass(frozen=True)
class Choice:
    """A candidate for one layer: what it harms, alone, and what it costs as a share of that layer's dense attention."""

    layer: int
    pattern: Pattern
    kl: float
    cost: float


@dataclass(frozen=True)
class Round:
    """A whole mixture that was measured, with the allowance that chose it and the sum of KL that was guessed."""

    allowance: float
    guessed_kl: float
    cost: float
    layers: int
    holds: bool
    effect: Effect

    def to_dict(self) -> dict[str, Any]:
        return {
            "allowance": self.allowance,
            "guessed_kl": self.guessed_kl,
            "cost": self.cost,
            "layers": self.layers,
            "holds": self.holds,
            **self.effect.to_dict(),
        }


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        config: the mixture, with its provenance; all dense where none held.
        choices: every measured candidate.
        chosen: layer -> pattern.
        cost: attention FLOPs of all layers of full attention, as a share of dense, at the cost's length.
        rounds: the mixtures that were measured whole.
        allowance: the sum of single effects that the mixture was chosen by; `choose` with less gives a safer one.
    """

    config: SparseConfig
    choices: tuple[Choice, ...]
    chosen: dict[int, Pattern]
    cost: float
    rounds: tuple[Round, ...]
    allowance: float

    @property
    def dense(self) -> bool:
        """Whether nothing cheaper than dense held."""
        return not self.chosen

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "tuned",
            "cost": self.cost,
            "config": self.config.to_dict(),
            "choices": [{**asdict(choice), "pattern": str(choice.pattern)} for choice in self.choices],
            "rounds": [round_.to_dict() for round_ in self.rounds],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words, a row a layer: KL and cost of each candidate, and what was chosen."""
        names = list(dict.fromkeys(_label(choice.pattern) for choice in self.choices))
        by = {(choice.layer, _label(choice.pattern)): choice for choice in self.choices}
        head = ["layer", *(f"{name}: KL, cost" for name in names), "chosen"]
        rows = []
        for layer in sorted({choice.layer for choice in self.choices}):
            cells = [by.get((layer, name)) for name in names]
            shown = ["not measured" if c is None else f"{c.kl:.2e}, {c.cost:.3f}" for c in cells]
            rows.append([str(layer), *shown, _label(self.chosen[layer]) if layer in self.chosen else "dense"])
        return head, rows


def _label(pattern: Pattern) -> str:
    """Its name, and the parameters that were set."""
    said = pattern.to_yaml()
    if isinstance(said, str):
        return said
    return f"{said['name']}({', '.join(f'{name}={value}' for name, value in said.items() if name != 'name')})"


def choose(choices: Sequence[Choice], allowance: float) -> dict[int, Choice]:
    """At most one choice a layer, of the least total cost (dense costs 1) with a sum of KL within the allowance.

    Exact up to `BINS` steps of the allowance, to which effects are rounded up; ties go to less KL, then to the earlier
    candidate.
    """
    layers = sorted({choice.layer for choice in choices})
    best: list[tuple[float, float, tuple[Choice, ...]]] = [(0.0, 0.0, ())] * (BINS + 1)  # by steps that may be used
    for layer in layers:
        options = [(_steps(c.kl, allowance), c) for c in choices if c.layer == layer and c.cost < 1]
        before, best = best, []
        for room in range(BINS + 1):
            cost, kl, taken = before[room]
            found = (cost + 1, kl, taken)
            for steps, choice in options:
                if steps <= room:
                    cost, kl, taken = before[room - steps]
                    other = (cost + choice.cost, kl + choice.kl, (*taken, choice))
                    found = min(found, other, key=lambda x: (round(x[0], 9), x[1]))
            best.append(found)
    return {choice.layer: choice for choice in best[BINS][2]}


def _steps(kl: float, allowance: float) -> int:
    return BINS + 1 if allowance <= 0 else min(int(-(-kl * BINS // allowance)), BINS + 1)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patterns: Sequence[Pattern | str | Mapping[str, Any]],
    *,
    budget: float = 0.002,
    lost: float = 0.05,
    tokens: Sequence[int] = (2048,),
    cost_tokens: int | None = None,
    layers: Sequence[int] | None = None,
    samples: int = 3,
    verify: int = 12,
    seed: int = 0,
    tasks: Sequence[str | Task] = ("needle4",),
    dense_below_tokens: int = 1024,
    records: str | Path | None = None,
    quiet: bool = False,
) -> Tuned:
    """The cheapest mixture of `patterns` and dense whose answers stay within the budget.

    Args:
        patterns: candidates of every layer.
        budget: mean KL of the answer's tokens from dense that the whole mixture may have, nats a token; its standard
            error over the prompts is added before it is compared.
        lost: share of the answers that may be lost against dense.
        tokens: prompt lengths.
        cost_tokens: where costs are counted; default the longest of `tokens`. A dynamic pattern's cost is the tile
            density that it had on the longest prompts.
        layers: the ones that may be sparse; default all that are full causal attention.
        samples, verify: prompts that single layers, and whole mixtures, are measured on; they share no seed.
        records: a JSONL file that keeps what was measured; an interrupted run goes on from it.

    Raises:
        SparsekitError: no candidate, a layer that cannot be sparse, a budget that is not positive, or prompts beyond
            the model's positions.
    """
    arch = facts(model)
    candidates = list(dict.fromkeys(p for p in map(parse_pattern, patterns) if p.name != "dense"))
    if not candidates or budget <= 0:
        raise SparsekitError(f"{len(candidates)} candidates, budget = {budget}: at least one, and above 0.")
    if verify < 2:
        raise SparsekitError(f"verify = {verify}: at least 2 prompts, of which a standard error can be told.")
    open_layers = _open_layers(model, arch, layers)
    kept = Records(records)
    make = lambda count, seeds: make_prompts(  # noqa: E731
        model, tokenizer, tasks=tasks, tokens=tokens, count=count, seeds=seeds
    )
    single = Judge(model, tokenizer, make(samples, [seed]), kept)
    length = cost_tokens or max(tokens)
    static = {pattern: _static_cost(pattern, length, arch) for pattern in candidates}
    choices = list(_choices(single, candidates, open_layers, static, budget, quiet))

    whole = Judge(model, tokenizer, make(verify, [seed + 1]), kept)
    search = _Search(whole, choices, len(_open_layers(model, arch, None)), budget, lost)
    with progress("whole mixtures", ROUNDS, quiet=quiet) as step:
        for _ in search.run():
            step(1)
    best = search.best
    chosen = {} if best is None else {layer: choice.pattern for layer, choice in best[1].items()}
    cost = 1.0 if best is None else best[0].cost
    provenance = {
        "by": "sparsekit calibrate tune",
        "budget_kl_nats_per_token": budget,
        "lost_answers": lost,
        "patterns": [pattern.to_yaml() for pattern in candidates],
        "prompts": {
            "tasks": sorted({p.task.name for p in whole.prompts}),
            "tokens": list(tokens),
            "seeds": [seed, seed + 1],
            "single_layers": samples,
            "whole_mixtures": verify,
        },
        "cost": {"tokens": length, "attention_flops_of_dense": round(cost, 4)},
        "verified": None if best is None else best[0].effect.to_dict(),
        "note": f"{_why_dense(search.rounds)}; everything is dense"
        if best is None
        else "chosen by measurement on these prompts",
        **made_on(model),
    }
    config = write_config(arch, chosen, provenance, dense_below_tokens=dense_below_tokens)
    allowance = 0.0 if best is None else best[0].allowance
    return Tuned(config, tuple(choices), chosen, cost, tuple(search.rounds), allowance)


def _open_layers(model: PreTrainedModel, arch: ArchFacts, layers: Sequence[int] | None) -> list[int]:
    own = own_layers(model, some=True)
    if layers is not None and not layers:
        raise SparsekitError("layers: at least one that may be sparse.")
    if layers is None:
        return [i for i in range(arch.num_layers) if i not in own]
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise SparsekitError(f"layer {layer}: the model has 0-{arch.num_layers - 1}.")
        if layer in own:
            raise SparsekitError(f"layer {layer} is a {own[layer]}: it keeps its own attention and cannot be sparse.")
    return sorted(set(layers))


def _static_cost(pattern: Pattern, tokens: int, arch: ArchFacts) -> float | None:
    """explain's tile density of a pattern; None for one that chooses from the prompt."""
    config = write_config(arch, {}, {}, dense_below_tokens=0).model_copy(update={"default": pattern})
    counted = explain(config, tokens, arch).layers[0]
    return counted.tile_density


def _choices(
    judge: Judge,
    candidates: Sequence[Pattern],
    layers: Sequence[int],
    static: Mapping[Pattern, float | None],
    budget: float,
    quiet: bool,
) -> Iterator[Choice]:
    """Measured, cheapest first within a layer, so that dearer ones can be left out where a cheap one harms nothing."""
    harmless = SKIP_BELOW * budget / len(layers)
    typical = {pattern: 0.5 if static[pattern] is None else float(static[pattern] or 0) for pattern in candidates}
    with progress("single layers", len(layers) * len(candidates), quiet=quiet) as step:
        for layer in reversed(layers):  # the deepest bear most: what a budget needs first if this is interrupted
            done: Choice | None = None
            for pattern in sorted(candidates, key=lambda p: typical[p]):
                step(1)
                if done is not None and done.kl <= harmless and done.cost <= typical[pattern]:
                    continue
                effect = judge.effect({layer: pattern})
                fixed = static[pattern]
                cost = effect.tile_density[layer] if fixed is None else fixed
                typical[pattern] = cost
                found = Choice(layer, pattern, effect.mean_kl, cost)
                yield found
                if done is None or found.kl < done.kl:
                    done = found


class _Search:
    """The allowance whose mixture is the cheapest that holds: doubled or halved until it turns, then bisected."""

    def __init__(self, judge: Judge, choices: Sequence[Choice], layers: int, budget: float, lost: float) -> None:
        self.judge, self.choices, self.layers, self.budget, self.lost = judge, choices, layers, budget, lost
        self.rounds: list[Round] = []
        self.best: tuple[Round, dict[int, Choice]] | None = None
        self._seen: dict[frozenset[tuple[int, Pattern]], bool] = {}

    def run(self) -> Iterator[None]:
        low, high = 0.0, 0.0  # the largest allowance that held, the smallest that did not; 0: none yet
        allowance, every = self.budget, sum(max(self._of(i), default=0.0) for i in {c.layer for c in self.choices})
        while len(self.rounds) < ROUNDS:
            chosen = choose(self.choices, allowance)
            key = frozenset((layer, choice.pattern) for layer, choice in chosen.items())
            if key not in self._seen:
                if not chosen:
                    return
                self._seen[key] = self._measure(chosen, allowance)
                yield
            if self._seen[key]:
                low = allowance
                if not high and allowance >= 4 * every:
                    return
            else:
                high = allowance
            if low and high and high / low < 1.1:
                return
            allowance = (low * high) ** 0.5 if low and high else (2 * low if low else high / 2)
            if allowance < 1e-9 * self.budget:
                return

    def _of(self, layer: int) -> list[float]:
        return [choice.kl for choice in self.choices if choice.layer == layer]

    def _measure(self, chosen: dict[int, Choice], allowance: float) -> bool:
        effect = self.judge.effect({layer: choice.pattern for layer, choice in chosen.items()})
        holds = effect.kl_at_most <= self.budget and effect.lost <= self.lost
        cost = (self.layers - len(chosen) + sum(choice.cost for choice in chosen.values())) / self.layers
        guessed = sum(choice.kl for choice in chosen.values())
        round_ = Round(allowance, guessed, cost, len(chosen), holds, effect)
        self.rounds.append(round_)
        if holds and (self.best is None or cost < self.best[0].cost):
            self.best = (round_, chosen)
        return holds


def _why_dense(rounds: Sequence[Round]) -> str:
    if not rounds:
        return "no candidate costs less than dense attention and fits the budget alone, so no mixture was measured"
    return "no mixture held the budget on whole prompts"


def summary(tuned: Tuned) -> list[str]:
    """What came out, in sentences."""
    if tuned.dense:
        return [f"Everything stays dense: {_why_dense(tuned.rounds)}."]
    runs: dict[str, list[int]] = {}
    for layer, pattern in sorted(tuned.chosen.items()):
        runs.setdefault(_label(pattern), []).append(layer)
    effect = next(r.effect for r in tuned.rounds if r.holds and r.cost == tuned.cost)
    lines = [f"layers {format_range(numbers)}: {name}" for name, numbers in runs.items()]
    return [
        *lines,
        f"Attention FLOPs {tuned.cost:.3f} of dense. KL from dense {effect.mean_kl:.5f} nats a token (with its "
        f"standard error {effect.kl_at_most:.5f}), score {mean(effect.score):.2f} against "
        f"{mean(effect.dense_score):.2f} dense, on {len(effect.kl)} prompts that were not tuned on.",
    ]

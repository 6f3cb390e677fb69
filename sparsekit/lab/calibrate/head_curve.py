"""By head against by layer: what the same share of triangle heads does to the same prompts, chosen in either way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.effects import Effect, judges
from sparsekit.lab.calibrate.head_rules import HeadShare
from sparsekit.lab.calibrate.mixture import Chosen, whole_layers, write_heads
from sparsekit.lab.calibrate.probe import Probe, own_layers
from sparsekit.lab.calibrate.ranking import Head
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.calibrate.rule_base import Given, apply_rule, parse_rule
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.stats import mean_interval, share_interval
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patterns import Pattern, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HeadCurve", "head_curve"]

BY_LAYER = "layer"  # the last layers, as TriangleMix

Way = tuple[float, str, Chosen]  # share, order, heads


@dataclass(frozen=True)
class HeadCurve:
    """One row a task, length, share and way to choose. `score` and `dense_score` are None of text, which has no answer.

    `kl_below_layer` is the mean of (KL by layer - KL by this way) over the same prompts, with half the width of its 95%
    interval: above 0 where this way diverges less. `tile_density` is that of all layers with full attention, dense ones
    among them.
    """

    model: str
    prompts: dict[str, Any]
    made: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "head curve",
            "model": self.model,
            "prompts": self.prompts,
            **self.made,
            "rows": list(self.rows),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        head = ["task", "tokens", "share", "by", "heads", "tiles", "KL", "95%", "score", "95%", "dense", "below layer"]
        rows = []
        for row in self.rows:
            paired = "" if row["kl_below_layer"] is None else "{:.5f} +- {:.5f}".format(*row["kl_below_layer"])
            numbers = [f"{row['tile_density']:.3f}", f"{row['kl']:.5f}", f"{row['kl_half_width']:.5f}"]
            where = [row["task"], str(row["tokens"]), f"{row['share']:.2f}", row["by"], f"{row['heads_share']:.3f}"]
            scores = ["", "", ""]  # of text, which has no answer
            if row["score"] is not None:
                score, low, high = row["score"]
                scores = [f"{score:.2f}", f"{low:.2f}-{high:.2f}", f"{row['dense_score'][0]:.2f}"]
            rows.append([*where, *numbers, *scores, paired])
        return head, rows


def head_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Probe,
    shares: Sequence[float],
    *,
    ranks: Sequence[str] = ("gradient",),
    scores: Mapping[Head, float] | None = None,
    pattern: Pattern | str | Mapping[str, Any] = "triangle",
    whole_groups: bool = False,
    rank_prompts: Mapping[str, Any] | None = None,
    tasks: Sequence[str | Task] = ("needle4",),
    tokens: Sequence[int] = (2200,),
    samples: int = 96,
    seed: int = 0,
    records: str | Path | None = None,
    quiet: bool = False,
) -> HeadCurve:
    """KL of the answer's tokens from dense, and scores, by share of the heads that run a pattern.

    Args:
        found: the probe that ranks the heads; of other prompts than these.
        shares: of all heads. By layer, the last layers of about that share.
        ranks: orders of the heads, as `HeadShare` has them. scores: of (layer, head), for the order `scores`.
        whole_groups: choose all heads of a key head, or none.
        rank_prompts: `samples`, `tokens` and `tasks` of orders that are measured; they are drawn from the next seed.
        tasks, tokens, samples, seed: of the prompts: `samples` for each task and length.
        records: a JSONL file of the measurements; an interrupted run goes on from it.

    Raises:
        SparsekitError: a share or rank that the rule refuses, or no prompts.
    """
    arch, runs, kept = facts(model), parse_pattern(pattern), Records(records)
    constants = {"whole_groups": whole_groups, **(rank_prompts or {})}
    rules = [parse_rule("head_share", {**constants, "share": s, "rank": rank}) for s in shares for rank in ranks]
    if not rules or not tasks or not tokens:
        raise SparsekitError(f"{len(shares)} shares, {len(ranks)} ranks, {len(tasks)} tasks: at least one of each.")
    write = lambda chosen: write_heads(arch, chosen, runs, {}, dense_below_tokens=0)  # noqa: E731
    judged: dict[str, Any] = {}

    def measure(chosen: Chosen, rule: HeadShare) -> dict[str, Effect]:
        if not judged:
            lengths = [int(word) for word in rule.tokens.split(",")]
            kinds, of = rule.tasks.split(","), (model, tokenizer)
            judged.update(judges(*of, kinds, tokens=lengths, samples=rule.samples, seed=seed + 1, records=kept))
        found = {task: judge.effect(write(chosen)) for task, judge in judged.items()}
        step(1)
        return found

    own = own_layers(model)
    open_ = [i for i in range(arch.num_layers) if i not in own]
    with progress("measured orders", None, quiet=quiet) as step:
        ways = _ways(open_, shares, rules, Given(arch, found, measure, scores))
    rows = []
    with progress("heads against layers", len(ways) * len(tasks) * len(tokens), quiet=quiet) as step:
        for length in tokens:
            for kind in tasks:
                [(name, judge)] = judges(
                    model, tokenizer, [kind], tokens=[length], samples=samples, seed=seed, records=kept
                ).items()
                answers, beside = judge.prompts[0].task.metric != "nll", {}
                for share, by, chosen in ways:
                    effect = judge.effect(write(chosen))
                    if by == BY_LAYER:
                        beside[share] = effect
                    count = sum(map(len, chosen.values())) / sum(map(arch.heads, range(arch.num_layers)))
                    where = {"task": name, "tokens": length, "share": share, "by": by, "heads_share": count}
                    paired = beside[share] if by != BY_LAYER else None
                    rows.append({**where, **_row(effect, paired, len(open_), answers)})
                    step(1)
    described = {
        "probe": {"samples": found.samples, **found.prompts},
        "samples": samples,
        "seed": seed,
        "pattern": runs.to_yaml(),
        "whole_groups": whole_groups,
        "rank_prompts": dict(rank_prompts or {}),
    }
    return HeadCurve(arch.name, described, made_on(model), tuple(rows))


def _ways(open_: Sequence[int], shares: Sequence[float], rules: Sequence[Any], given: Given) -> list[Way]:
    """By layer first, at each share, then by head in each order."""
    ways: list[Way] = []
    for share in shares:
        last = open_[len(open_) - max(round(share * len(open_)), 1) :]
        ways.append((share, BY_LAYER, whole_layers(last, given.arch)))
        ways += [(share, rule.rank, apply_rule(rule, given)[0]) for rule in rules if rule.share == share]
    return ways


def _row(effect: Effect, beside: Effect | None, layers: int, answers: bool = True) -> dict[str, Any]:
    kl, width = mean_interval(effect.kl)
    paired = None
    if beside is not None:
        paired = mean_interval([layer - head for layer, head in zip(beside.kl, effect.kl, strict=True)])
    return {
        "kl": kl,
        "kl_half_width": width,
        "kl_below_layer": paired,
        "score": share_interval(effect.score) if answers else None,
        "dense_score": share_interval(effect.dense_score) if answers else None,
        "same": share_interval(effect.same),
        "tile_density": (sum(effect.tile_density.values()) + layers - len(effect.tile_density)) / layers,
        "samples": len(effect.kl),
    }

"""Whether a choice of heads is the model's: probes of single tasks, lengths and seeds against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.probe import Sections, probe
from sparsekit.lab.calibrate.ranking import Head, head_scores
from sparsekit.lab.provenance import made_on
from sparsekit.lab.stats import rank_correlation
from sparsekit.lab.tasks import Task, task
from sparsekit.models import facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Agreement", "agreement", "dense_overlap"]

Place = tuple[str, int, int]  # task, tokens, seed
AXES = ("task", "tokens", "seed")


@dataclass(frozen=True)
class Agreement:
    """One row an axis and pair of its values: how probes agree that differ in that axis alone.

    `correlation` is Spearman's over all heads, and `overlap` the share of one probe's dense heads that are the other's
    too, at the share of sparse heads that was asked; both means over the places of the other axes, `lowest` the least
    correlation of them.
    """

    model: str
    rank: str
    share: float
    samples: int
    made: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        said = {"model": self.model, "rank": self.rank, "share": self.share, "samples": self.samples}
        return {"kind": "agreement", **said, **self.made, "rows": list(self.rows)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        rows = []
        for row in self.rows:
            means = (f"{row[name]:.3f}" for name in ("correlation", "lowest", "overlap"))
            rows.append([row["axis"], str(row["one"]), str(row["other"]), str(row["pairs"]), *means])
        return ["differ in", "one", "other", "pairs", "rank correlation", "lowest", "same dense heads"], rows


def agreement(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str | Task] = ("needle4", "vt"),
    tokens: Sequence[int] = (1024, 2048),
    seeds: Sequence[int] = (0, 1),
    samples: int = 4,
    share: float = 0.75,
    rank: str = "gradient",
    sections: Sections | None = None,
    records: str | Path | None = None,
    quiet: bool = False,
) -> Agreement:
    """Probe every task at every length with every seed, and compare those that differ in one of the three.

    Args:
        samples: prompts of each probe. share: of the heads that would run sparse. rank: a score of `ranking.SCORES`.
        records: a JSONL file of the probes' prompts; an interrupted run goes on from it.

    Raises:
        SparsekitError: one probe alone, which agrees with nothing; or what `probe` and `head_scores` refuse.
    """
    kinds = [task(kind) if isinstance(kind, str) else kind for kind in tasks]
    places = [(kind, length, seed) for kind in kinds for length in tokens for seed in seeds]
    if len(places) < 2 or not 0 < share < 1:
        raise SparsekitError(f"{len(places)} probes at share = {share}: want two or more, and a share between 0 and 1.")
    found: dict[Place, dict[Head, float]] = {}
    for kind, length, seed in places:
        where: Any = {"samples": samples, "tokens": length, "seeds": [seed], "tasks": [kind]}
        cut: Any = {"sections": sections or Sections(), "records": records, "quiet": quiet}
        made = probe(model, tokenizer, **where, **cut)
        found[kind.name, length, seed] = head_scores(made, rank)
    return Agreement(facts(model).name, rank, share, samples, made_on(model), tuple(compare(found, share)))


def compare(found: Mapping[Place, Mapping[Head, float]], share: float) -> list[dict[str, Any]]:
    """A row for each axis and pair of values, over all pairs of places that differ in nothing else."""
    pairs: dict[tuple[str, Any, Any], list[tuple[float, float]]] = {}
    for one, other in combinations(found, 2):
        apart = [axis for axis in range(3) if one[axis] != other[axis]]
        if len(apart) == 1:
            scores = found[one], found[other]
            ranked = rank_correlation(*([score[head] for head in found[one]] for score in scores))
            agree = ranked, dense_overlap(*scores, share)
            pairs.setdefault((AXES[apart[0]], one[apart[0]], other[apart[0]]), []).append(agree)
    rows = []
    for (axis, one, other), values in pairs.items():
        correlations, overlaps = [both[0] for both in values], [both[1] for both in values]
        means = {"correlation": mean(correlations), "lowest": min(correlations), "overlap": mean(overlaps)}
        rows.append({"axis": axis, "one": one, "other": other, "pairs": len(values), **means})
    return rows


def dense_overlap(one: Mapping[Head, float], other: Mapping[Head, float], share: float) -> float:
    """Of the heads that stay dense by `one` when that share runs sparse, the share that stay dense by `other` too."""
    count = len(one) - round(share * len(one))
    if not count:
        raise SparsekitError(f"share = {share}: no head of {len(one)} stays dense.")
    kept = [set(sorted(scores, key=lambda head: (scores[head], head))[-count:]) for scores in (one, other)]
    return len(kept[0] & kept[1]) / count

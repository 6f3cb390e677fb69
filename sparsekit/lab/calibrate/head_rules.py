"""Head rules: heads of the lowest rank run the sparse pattern, up to a share of them or to a measured divergence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from statistics import mean
from typing import Any, Literal

from pydantic import Field

from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.mixture import Chosen
from sparsekit.lab.calibrate.probe import Probe
from sparsekit.lab.calibrate.ranking import Head, chosen_of, head_scores, in_order
from sparsekit.lab.calibrate.rule_base import Given, Measured, Prompts, Rule, bears, most

__all__ = ["HeadBudget", "HeadShare"]

Unit = tuple[Head, ...]
MIXED_TASKS = "needle4,vt,cwe,fwe"  # heads that no needle asks may be asked by other prompts


class _HeadRule(Rule, Prompts):
    """Heads in an order, from the lowest on."""

    tasks: str = Field(MIXED_TASKS, description="tasks, comma-separated")
    rank: Literal["gradient", "signed", "gradient_mass", "alone", "refined", "scores"] = Field(
        "gradient", description="order of the heads: gradient, signed, gradient_mass, alone, refined or scores"
    )
    band: float = Field(0.1, gt=0, le=1, description="refined: share of the heads around the cut that is measured")
    whole_groups: bool = Field(False, description="choose all heads of a key head, or none")

    @property
    def probed(self) -> bool:
        return self.rank != "scores"

    @abstractmethod
    def heads(self, given: Given) -> Chosen: ...

    def said_of_probe(self, probe: Probe) -> dict[str, Any]:
        return {"heads": len(head_scores(probe))}

    def _order(self, given: Given) -> list[Unit]:
        """Heads, or groups, by rising score; `refined` begins with the gradient."""
        order = in_order(self._scores(given), given.arch, whole_groups=self.whole_groups)
        return sorted(order, key=lambda unit: self._harm(given, [unit])) if self.rank == "alone" else order

    def _scores(self, given: Given) -> Mapping[Head, float]:
        if self.rank != "scores":
            assert given.probe is not None
            return head_scores(given.probe, "gradient" if self.rank in ("alone", "refined") else self.rank)
        if given.scores is None:
            raise SparsekitError("rank 'scores' needs a table of scores: --scores FILE.tsv.")
        return given.scores

    def _refined(self, given: Given, order: list[Unit], cut: int) -> list[Unit]:
        """The order, with heads around the cut by the divergence of what is surely chosen and that one head."""
        wide = max(1, round(self.band * len(order) / 2))
        low, high = max(cut - wide, 0), min(cut + wide, len(order))
        sure = order[:low]
        return sure + sorted(order[low:high], key=lambda unit: self._harm(given, [*sure, unit])) + order[high:]

    def _harm(self, given: Given, units: list[Unit]) -> float:
        """Mean over tasks of the measured KL."""
        assert given.measure is not None
        return mean(effect.mean_kl for effect in given.measure(chosen_of(units), self).values())


class HeadShare(_HeadRule):
    """That share of all heads, those of the lowest rank."""

    name: Literal["head_share"] = "head_share"
    share: float = Field(gt=0, le=1, description="share of the heads that run the pattern")

    @property
    def measured(self) -> bool:
        return self.rank in ("alone", "refined")

    def heads(self, given: Given) -> Chosen:
        order = self._order(given)
        cut = round(self.share * len(order))
        if not cut:
            raise SparsekitError(f"share = {self.share}: none of {len(order)}; the least is {1 / len(order):.4f}.")
        return chosen_of((self._refined(given, order, cut) if self.rank == "refined" else order)[:cut])


class HeadBudget(_HeadRule, Measured):
    """The most heads, by rising rank, that a measurement bears for each task."""

    name: Literal["head_budget"] = "head_budget"

    @property
    def measured(self) -> bool:
        return True

    def heads(self, given: Given) -> Chosen:
        order, bear = self._order(given), bears(given, self)
        cut = most(len(order), lambda n: bear(chosen_of(order[:n])))
        if self.rank == "refined":
            order = self._refined(given, order, cut)
            cut = most(len(order), lambda n: bear(chosen_of(order[:n])))
        return chosen_of(order[:cut])

"""Layer rules: from a probe, or from you, to the layers that run a pattern. Those of heads are in `head_rules`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsekit.config import format_range, parse_range
from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.head_rules import HeadBudget, HeadShare
from sparsekit.lab.calibrate.mixture import whole_layers
from sparsekit.lab.calibrate.rule_base import (
    RULES,
    Given,
    LayerRule,
    Measured,
    Rule,
    apply_rule,
    bears,
    most,
    parse_rule,
)

__all__ = ["RULES", "Given", "HeadBudget", "HeadShare", "Rule", "apply_rule", "parse_rule"]


class Suffix(LayerRule):
    """The longest run up to the last layer with Grad(Middle) below a share of its maximum.

    Layers that keep their own attention neither join nor end the run.
    """

    name: Literal["suffix"] = "suffix"
    epsilon: float = Field(0.2, gt=0, le=1, description="share of the largest Grad(Middle)")

    def choose(self, given: Given) -> list[int]:
        too_large = max((layer for share, layer in given.layers() if share >= self.epsilon), default=-1)
        return sorted(layer for _, layer in given.layers() if layer > too_large)


class LowestK(LayerRule):
    """The layers of the smallest Grad(Middle), wherever they are; ties go to the deeper layer."""

    name: Literal["lowest_k"] = "lowest_k"
    k: int = Field(ge=0, description="number of layers")

    def choose(self, given: Given) -> list[int]:
        ranked = given.layers()
        if self.k > len(ranked):
            raise SparsekitError(f"k = {self.k}: from 0 to {len(ranked)}, the layers that were probed.")
        return sorted(layer for _, layer in ranked[: self.k])


class Listed(LayerRule):
    """The layers that you name."""

    name: Literal["list"] = "list"
    layers: str = Field(description="the layers, such as `5,7,10-20`")

    @property
    def probed(self) -> bool:
        return False

    def choose(self, given: Given) -> list[int]:
        numbers, count = sorted(parse_range(self.layers)), given.arch.num_layers or 0
        if numbers[-1] >= count:
            raise SparsekitError(f"layers {format_range(numbers)}: the model has 0-{count - 1}.")
        return numbers


class Search(LayerRule, Measured):
    """The most layers, by rising Grad(Middle), that a measurement bears.

    By bisection; what comes back was itself measured, or is empty.
    """

    name: Literal["search"] = "search"

    @property
    def measured(self) -> bool:
        return True

    def choose(self, given: Given) -> list[int]:
        order, bear = [layer for _, layer in given.layers()], bears(given, self)
        return sorted(order[: most(len(order), lambda n: bear(whole_layers(sorted(order[:n]), given.arch)))])

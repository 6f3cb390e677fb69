"""union: what any of several patterns keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select.join import join_plans
from sparsekit.patterns.base import (
    DynamicPattern,
    Pattern,
    StaticPattern,
    checked_plan,
    parse_pattern,
    rule_of,
    static_plan,
)
from sparsekit.patterns.crossover import Place
from sparsekit.plan import BlockPlan, TokenRule

__all__ = ["DynamicUnion", "Union"]


def _parse_members(value: Any) -> tuple[Pattern, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("it must be a list of patterns")
    members = tuple(parse_pattern(item, f"of[{i}]") for i, item in enumerate(value))
    for i, member in enumerate(members):
        if member.whole_layer:
            raise ValueError(f"of[{i}]: {member.name!r} needs a layer of its own; a union cannot hold it")
        if member.correct_every is not None:
            raise ValueError(f"of[{i}]: correct_every = {member.correct_every} is for the union, not its members")
    return members


class Union(StaticPattern):
    """Pairs that at least one of `of` keeps.

    Exact for static patterns: the larger sink, the wider window, the earlier dense row. Cost: at most the sum.
    With a dynamic pattern among `of` it is a `DynamicUnion`, which YAML calls by the same name.
    """

    name: Literal["union"] = "union"
    test_points = (
        {"of": [{"name": "triangle", "sink_tokens": 8, "window_tokens": 40, "last_tokens": 20},
                {"name": "a_shape", "sink_tokens": 30, "window_tokens": 20}]},
    )  # fmt: skip
    of: tuple[SerializeAsAny[StaticPattern], ...] = Field(min_length=1, description="the patterns to join")

    @field_validator("of", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        members = _parse_members(value)
        for i, member in enumerate(members):
            if not isinstance(member, StaticPattern):
                raise ValueError(f"of[{i}]: {member.name!r} is dynamic; join it with a DynamicUnion, or through YAML")
        return members

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Pattern:
        if not isinstance(fields.get("of"), list | tuple):
            return cls.model_validate(dict(fields))  # which says what is wrong
        try:
            members = _parse_members(fields["of"])
        except ValueError as error:
            raise SparsekitError(f"union: of: {error}") from None
        kind = cls if all(isinstance(member, StaticPattern) for member in members) else DynamicUnion
        return kind.model_validate({**fields, "of": members})

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        return reduce(lambda a, b: a | b, (member.keep(q_pos, k_pos, span) for member in self.of))

    def rule(self, span: Span) -> TokenRule | None:
        rules = [rule_of(member, span) for member in self.of]
        exact = [rule for rule in rules if rule is not None]
        return reduce(TokenRule.union, exact) if len(exact) == len(rules) else None


class DynamicUnion(DynamicPattern):
    """Pairs that at least one of `of` keeps, some of which choose from q and k.

    A superset, and what it keeps beyond its members is in its density. The static members are one exact rule. A tile
    under the rule that meets another member's tile or column is kept whole. Where tiles of two members overlap in part,
    because one puts them where its diagonals are and another on a grid, the row goes on from the earlier one's end.
    Dense wherever a member is. Cost: the members', and a walk over all their tiles. In Python it is written with its
    name: `DynamicUnion(name="union", of=(...))`.
    """

    name: Literal["union"]  # no default: the registry knows `Union`, which makes these
    source: ClassVar[str] = Union.source
    of: tuple[SerializeAsAny[Pattern], ...] = Field(min_length=1, description="the patterns to join")

    @field_validator("of", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return _parse_members(value)

    def of_heads(self, heads: Sequence[int]) -> DynamicUnion:
        members = tuple(member.of_heads(heads) for member in self.of)
        same = all(one is other for one, other in zip(members, self.of, strict=True))
        return self if same else self.model_copy(update={"of": members})

    def leaves(self) -> Iterator[Pattern]:
        """The members, unions among them opened."""
        for member in self.of:
            if isinstance(member, DynamicUnion):
                yield from member.leaves()
            else:
                yield member

    def settled(self, place: Place, say: Callable[[str], None] = lambda said: None) -> Pattern:
        members = tuple(member.settled(place, say) for member in self.of)
        same = all(one is other for one, other in zip(members, self.of, strict=True))
        own = self if same else self.model_copy(update={"of": members})
        return DynamicPattern.settled(own, place, say)

    def pays_below(self, device: torch.device) -> int:
        return max((x.dense_below(device) for x in self.leaves() if isinstance(x, DynamicPattern)), default=0)

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        static = [leaf for leaf in self.leaves() if isinstance(leaf, StaticPattern)]
        ruled = tuple(leaf for leaf in static if all(rule_of(leaf, span) is not None for span in geometry.spans))
        exact = ruled if len(ruled) < 2 else (Union(of=ruled),)  # rules make one rule; whole tiles are joined as such
        plans = [static_plan(leaf, geometry, q.device) for leaf in (*exact, *(x for x in static if x not in ruled))]
        for leaf in self.leaves():
            if any(plan.all_dense for plan in plans):
                break
            if not isinstance(leaf, StaticPattern):
                method = "select" if isinstance(leaf, DynamicPattern) else "plan"
                plans.append(checked_plan(leaf, getattr(leaf, method)(q, k, geometry, softmax), geometry, method))
        return join_plans(plans)

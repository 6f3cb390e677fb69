"""union: what any of several static patterns keeps."""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from sparsekit.geometry import Span
from sparsekit.patterns.base import Pattern, StaticPattern, parse_pattern
from sparsekit.plan import TokenRule

__all__ = ["Union"]


class Union(StaticPattern):
    """Pairs that at least one of `of` keeps.

    Exact for static patterns: the larger sink, the wider window, the earlier dense row. Cost: at most the sum.
    """

    name: Literal["union"] = "union"
    of: tuple[SerializeAsAny[StaticPattern], ...] = Field(min_length=1, description="the patterns to join")

    @field_validator("of", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("want a list of patterns")
        members = tuple(parse_pattern(item, f"of[{i}]") for i, item in enumerate(value))
        for i, member in enumerate(members):
            if isinstance(member, Pattern) and not isinstance(member, StaticPattern):
                raise ValueError(f"of[{i}]: {member.name!r} is dynamic; a union joins static patterns")
        return members

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        return reduce(lambda a, b: a | b, (member.keep(q_pos, k_pos, span) for member in self.of))

    def rule(self, span: Span) -> TokenRule | None:
        rules = [member.rule(span) for member in self.of]
        exact = [rule for rule in rules if rule is not None]
        return reduce(TokenRule.union, exact) if len(exact) == len(rules) else None

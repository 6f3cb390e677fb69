"""dense: every causal pair."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator
from torch import Tensor

from sparsekit.call.geometry import Span
from sparsekit.patterns.base import StaticPattern
from sparsekit.plan import TokenRule

__all__ = ["Dense"]


class Dense(StaticPattern):
    """All causal pairs: ordinary attention. `keep = j <= i`. Cost O(N^2); its plan needs no memory."""

    name: Literal["dense"] = "dense"

    @field_validator("correct_every")
    @classmethod
    def _nothing_to_correct(cls, value: int | None) -> None:
        if value is not None:
            raise ValueError("dense rows lack nothing that could be corrected")

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        return k_pos <= q_pos

    def rule(self, span: Span) -> TokenRule:
        return TokenRule(sink=0, window=1, dense_from=0)

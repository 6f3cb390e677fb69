"""The token rule: what a static pattern hands to the kernel, exact to the token."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparsekit.call.geometry import Span, whole
from sparsekit.errors import SparsekitError, shown

__all__ = ["TokenRule"]

INT32 = 2**31 - 1


class TokenRule(NamedTuple):
    """Query i keeps key j <= i iff `j < sink` or `i - j < window` or `i >= dense_from`; all in tokens.

    `window` counts the query itself. The fields may be tensors, one rule for each of their places.
    """

    sink: Any
    window: Any
    dense_from: Any

    def holds(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Whether the rule keeps pairs of broadcastable positions, causality left aside."""
        return (k_pos < self.sink) | (q_pos - k_pos < self.window) | (q_pos >= self.dense_from)

    def keep(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The rule itself, causality included, on broadcastable positions."""
        return (k_pos <= q_pos) & self.holds(q_pos, k_pos)

    def union(self, other: TokenRule) -> TokenRule:
        """What either rule keeps. Exact: each of the three terms only grows."""
        return TokenRule(
            max(self.sink, other.sink), max(self.window, other.window), min(self.dense_from, other.dense_from)
        )

    def checked(self, span: Span) -> TokenRule:
        """The rule in int32, for a span in which every query keeps itself.

        Raises:
            SparsekitError: a field that is no whole number; a query that does not keep itself, the first of them.
        """
        try:
            sink, window, dense_from = map(whole, self)
            rule = TokenRule(min(max(sink, 0), INT32), max(min(window, INT32), 0), max(min(dense_from, INT32), -INT32))
        except TypeError:
            raise SparsekitError(f"{shown(self)}: three whole numbers, in tokens.") from None
        first = max(span.q_first, rule.sink)
        if rule.window < 1 and first < min(span.q_end, rule.dense_from):
            raise SparsekitError(
                f"{shown(self)}: query {first} does not keep itself; the window counts it, so 1 token at least."
            )
        return rule

    def pairs(self, span: Span) -> int:
        """Query-key pairs that the rule keeps of a span, in closed form."""
        low, high = span.q_first, span.q_end
        cut = min(max(self.dense_from, low), high)
        sinks = _clamped_run(low, cut, self.sink)
        window = _clamped_run(low - self.sink, cut - self.sink, self.window)
        return sinks + window + _clamped_run(cut, high, high)


def _clamped_run(low: int, high: int, width: int) -> int:
    """sum over low < y <= high of min(max(y, 0), width)."""

    def up_to(y: int) -> int:
        within = min(max(y, 0), max(width, 0))
        return within * (within + 1) // 2 + (max(y, 0) - within) * max(width, 0)

    return up_to(high) - up_to(low)

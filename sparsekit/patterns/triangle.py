"""triangle: sinks, a window, and dense last rows (TriangleMix)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparsekit.call.geometry import Span
from sparsekit.patterns.base import StaticPattern
from sparsekit.plan import TokenRule

__all__ = ["Triangle"]


class Triangle(StaticPattern):
    """The A-shape, and the prompt's last rows dense: all but the Middle Q-K section (TriangleMix, arXiv 2507.21526,
    3.1).

    `keep = j <= i and (j < sink_tokens or i - j < window_tokens or i >= prompt_tokens - last_tokens)`.
    Cost O(N * (sink + window + last)): 1.0% of the causal pairs at 128K. The paper counts from 1, which gives exactly
    `sink_tokens` sinks and `last_tokens` rows; its window `i - j <= s_l` keeps one key more than ours.
    TriangleMix is this pattern in the deep layers, and `dense` or a dynamic pattern in the others.
    """

    name: Literal["triangle"] = "triangle"
    source: ClassVar[str] = "TriangleMix, arXiv 2507.21526"
    test_points = (
        {"sink_tokens": 8, "window_tokens": 40, "last_tokens": 20},
        {"sink_tokens": 70, "window_tokens": 100, "last_tokens": 1},
    )
    sink_tokens: int = Field(8, ge=0, description="first keys that every query keeps, tokens")
    window_tokens: int = Field(512, ge=1, description="nearest keys that a query keeps, itself included, tokens")
    last_tokens: int = Field(128, ge=1, description="last rows of the prompt that keep every key, tokens")

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        near = (k_pos < self.sink_tokens) | (q_pos - k_pos < self.window_tokens)
        return (k_pos <= q_pos) & (near | (q_pos >= span.prompt_tokens - self.last_tokens))

    def rule(self, span: Span) -> TokenRule:
        return TokenRule(self.sink_tokens, self.window_tokens, max(span.prompt_tokens - self.last_tokens, 0))

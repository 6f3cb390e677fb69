"""a_shape: attention sinks and a sliding window."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparsekit.call.geometry import Span
from sparsekit.patterns.base import StaticPattern
from sparsekit.plan import TokenRule

__all__ = ["AShape"]


class AShape(StaticPattern):
    """The first keys and the nearest ones (StreamingLLM, arXiv 2309.17453; "streaming" in TriangleMix is (8, 512)).

    `keep = j <= i and (j < sink_tokens or i - j < window_tokens)`. Cost O(N * (sink + window)).
    The window counts the query itself, as MInference's code does; the paper's `i - j <= window` keeps one key more.
    """

    name: Literal["a_shape"] = "a_shape"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    test_points = ({"sink_tokens": 8, "window_tokens": 40}, {"sink_tokens": 0, "window_tokens": 1})
    sink_tokens: int = Field(8, ge=0, description="first keys that every query keeps, tokens")
    window_tokens: int = Field(512, ge=1, description="nearest keys that a query keeps, itself included, tokens")

    @property
    def slides(self) -> bool:
        """Whether it is a window and nothing else, as of a model's sliding layers."""
        return self.sink_tokens == 0 and self.correct_every is None

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        return (k_pos <= q_pos) & ((k_pos < self.sink_tokens) | (q_pos - k_pos < self.window_tokens))

    def rule(self, span: Span) -> TokenRule:
        return TokenRule(self.sink_tokens, self.window_tokens, dense_from=max(span.q_end, span.prompt_tokens))

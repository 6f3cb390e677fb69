"""flashprefill: the key blocks whose mean key is near the best of its row, by every query of the row (FlashPrefill)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparsekit.kernels.select import near_top_bits, query_block_lse
from sparsekit.patterns.blocks import BlockPattern, Blocks

__all__ = ["FlashPrefill"]


class FlashPrefill(BlockPattern):
    """Every block of 128 queries keeps the key blocks whose score is at least `alpha` times the largest of its row.

    FlashPrefill (arXiv 2603.06199 and 2608.19758). The score is the sum over the block's queries of `exp(z - m)`, z the
    logit of a query and a block's mean key, m the largest z of the row of blocks; kept as its logarithm, so that m is
    not needed. The first and the nearest blocks are kept always; the last rows of the prompt are dense.
    """

    name: Literal["flashprefill"] = "flashprefill"
    source: ClassVar[str] = "FlashPrefill, arXiv 2603.06199"
    sweep_points = tuple({"alpha": share} for share in (0.8, 0.5, 0.3, 0.1, 0.03, 0.01))
    test_points = (
        {"alpha": 0.9, "sink_blocks": 1, "window_blocks": 1, "last_blocks": 0},
        {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "last_blocks": 1},
    )
    alpha: float = Field(0.1, gt=0, le=1, description="share of a row's largest score that a key block needs")
    sink_blocks: int = Field(2, ge=0, description="first key blocks, always kept")
    window_blocks: int = Field(4, ge=1, description="nearest key blocks, the query's own included, always kept")
    last_blocks: int = Field(8, ge=0, description="blocks of queries at the prompt's end that are dense")

    def keeps_all(self, blocks: Blocks) -> bool:
        if self.sink_blocks + self.window_blocks >= blocks.grid.columns:
            return True
        spans = [span for span in blocks.geometry.spans if span.q_first < span.q_end]
        return all(self._dense_from(span.prompt_tokens) <= span.q_first // self.block_size() for span in spans)

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        x = blocks
        scores = query_block_lse(x.q, x.key_means, x.geometry, x.grid, x.block_tokens, x.softmax, first, rows)
        for b, span in enumerate(x.geometry.spans):
            dense = self._dense_from(span.prompt_tokens) - span.q_first // x.block_tokens - first
            scores[b, :, max(dense, 0) :] = 0.0  # all alike, so all are kept
        return scores

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        margin = -math.log(self.alpha)
        return near_top_bits(scores, margin, lengths=lengths, first=self.sink_blocks, last=self.window_blocks)

    def _dense_from(self, prompt_tokens: int) -> int:
        """The first of the dense blocks of queries, counted from position 0."""
        return -(-prompt_tokens // self.block_size()) - self.last_blocks

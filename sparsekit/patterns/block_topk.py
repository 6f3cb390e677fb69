"""block_topk: the key blocks whose mean key answers the mean query best (MInference's block-sparse head)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparsekit.kernels.select import pooled_scores, topk_bits
from sparsekit.patterns.blocks import BlockPattern, Blocks

__all__ = ["BlockTopK"]


class BlockTopK(BlockPattern):
    """Every block of queries keeps the `top_k` key blocks of the largest `mean(q) . mean(k)`.

    MInference's block-sparse head (arXiv 2407.02490). Means are over the tokens that exist, so the last block's is
    true; blocks in the future are out; ties go to the earlier block. The first block and the query's own are kept by
    default and count among the `top_k`; the published code forces neither. The query's own block stays in the plan even
    where it is not forced: every query keeps itself. Cost: one read of q and k, and (N / block_tokens)^2 / 2 products
    a head.
    """

    name: Literal["block_topk"] = "block_topk"
    source: ClassVar[str] = "MInference, arXiv 2407.02490"
    pays_from_tokens: ClassVar[dict[str, int]] = {"cuda": 16384}
    bench_points = ({"top_k": 100},)
    sweep_points = tuple({"top_k": n} for n in (2, 4, 8, 16, 32, 64, 100, 200))
    test_points = ({"top_k": 3}, {"top_k": 1, "block_tokens": 128, "force_sink": False, "force_diagonal": False})
    top_k: int = Field(100, ge=1, description="key blocks that a block of queries keeps")
    block_tokens: Literal[64, 128] = Field(64, description="block of queries and of keys, tokens: 64 or 128")
    force_sink: bool = Field(True, description="keep the first key block, as one of the top_k")
    force_diagonal: bool = Field(True, description="keep the query's own block, as one of the top_k")

    def block_size(self) -> int:
        return self.block_tokens

    def blocks_at_most(self) -> int:
        return max(self.top_k, self.force_sink + self.force_diagonal)

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        return pooled_scores(*blocks.means, blocks.grid, self.block_tokens, first, rows)

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        return topk_bits(
            scores, self.top_k, lengths=lengths, force_first=self.force_sink, force_last=self.force_diagonal
        )

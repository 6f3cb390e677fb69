"""block_topk: the key blocks whose mean key answers the mean query best (MInference's block-sparse head)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.bits import join_rows
from sparsekit.kernels.select.block_scores import pooled_means, pooled_scores, row_groups
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import block_grid, head_lengths
from sparsekit.kernels.select.topk import topk_bits
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan

__all__ = ["BlockTopK"]


class BlockTopK(DynamicPattern):
    """Every block of queries keeps the `top_k` key blocks of the largest `mean(q) . mean(k)`.

    MInference's block-sparse head (arXiv 2407.02490). Means are over the tokens that exist, so the last block's is
    true; blocks in the future are out; ties go to the earlier block. The first block and the query's own are kept by
    default and count among the `top_k`; the published code forces neither. The query's own block stays in the plan even
    where it is not forced: every query keeps itself. Cost: one read of q and k, and (N / block_tokens)^2 / 2 products
    a head.
    """

    name: Literal["block_topk"] = "block_topk"
    source: ClassVar[str] = "MInference, arXiv 2407.02490"
    top_k: int = Field(100, ge=1, description="key blocks that a block of queries keeps")
    block_tokens: Literal[64, 128] = Field(64, description="block of queries and of keys, tokens: 64 or 128")
    force_sink: bool = Field(True, description="keep the first key block, as one of the top_k")
    force_diagonal: bool = Field(True, description="keep the query's own block, as one of the top_k")

    def keys_at_most(self, geometry: Geometry) -> int:
        """`top_k` blocks and the query's own, for each block of queries that shares a row of the plan."""
        return -(-geometry.block_q // self.block_tokens) * (self.top_k + 1) * self.block_tokens

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        samples, heads = q.shape[:2]
        grid = block_grid(geometry, self.block_tokens, samples, q.device)
        if self.top_k >= grid.columns:
            return dense_plan(grid.plan)
        lengths = head_lengths(geometry, self.block_tokens, samples, heads, q.device)
        means = pooled_means(q, k, geometry, grid, self.block_tokens, half=q.dtype != torch.float32)

        def best(first: int, rows: int) -> Tensor:
            scores = pooled_scores(*means, grid, self.block_tokens, first, rows)
            part = lengths[:, :, first : first + rows]
            return topk_bits(
                scores, self.top_k, lengths=part, force_first=self.force_sink, force_last=self.force_diagonal
            )

        groups = row_groups(grid.rows, samples * heads * grid.columns * 4)
        bits = join_rows((best(*group) for group in groups), grid.rows)
        return plan_from_block_bits(bits, geometry, self.block_tokens, row_blocks=max(self.top_k, 2))

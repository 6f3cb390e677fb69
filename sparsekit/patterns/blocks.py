"""BlockPattern: a dynamic pattern that scores blocks of keys for blocks of queries, and chooses among them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select import (
    BlockGrid,
    block_grid,
    head_lengths,
    join_rows,
    plan_from_block_bits,
    pooled_means,
    row_groups,
)
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan

__all__ = ["BlockPattern", "Blocks"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """One call cut into blocks of `block_tokens` positions: `grid.rows` blocks of queries, `grid.columns` of keys.

    Row r of sample b is block `q_first // block_tokens + r`, so that a chunk's blocks are those of the whole prompt. A
    chunk may begin inside a block: its row 0 then holds the later queries of that block alone. Column 0 begins at the
    sample's first valid token.

    `Blocks(q, k, geometry, softmax, 32).means` are means of other blocks, of a tile's size. Their columns begin where
    these do; their rows need not, in a chunk.
    """

    q: Tensor  # (B, H, Q, D)
    k: Tensor  # (B, G, K, D)
    geometry: Geometry
    softmax: Softmax
    block_tokens: int

    @cached_property
    def grid(self) -> BlockGrid:
        return block_grid(self.geometry, self.block_tokens, len(self.q), self.q.device)

    @cached_property
    def lengths(self) -> Tensor:
        """int32 (B, H, rows): key blocks up to a row's own, itself included; 0 where a sample has no such row."""
        return head_lengths(self.geometry, self.block_tokens, self.q.shape[0], self.q.shape[1], self.q.device)

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean query (B, H, rows, D) and mean key (B, G, columns, D) of every block, over the tokens that exist.

        0 where a block holds nothing. float32; on CUDA float16, unless q is float32.
        """
        half = self.q.dtype != torch.float32
        return pooled_means(self.q, self.k, self.geometry, self.grid, self.block_tokens, half=half)

    @cached_property
    def group_queries(self) -> Tensor:
        """(B, G, Q, D), in q's type: the mean query of the heads that share a key head."""
        return self.q.unflatten(1, (self.k.shape[1], -1)).mean(2)

    @cached_property
    def key_means(self) -> Tensor:
        """float32 (B, G, columns, D): the mean key of every block alone; q is not read."""
        return pooled_means(self.q[:, :0], self.k, self.geometry, self.grid, self.block_tokens)[1]


class BlockPattern(DynamicPattern):
    """Give `score`, and `choose` among its scores; the base lays the grid and makes the plan.

    A block of queries never attends key blocks after its own, and always its own, whatever is chosen. Scores of all
    heads at 1M tokens fit no memory, so rows are scored and chosen from in groups.
    """

    @abstractmethod
    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        """float32 (B, H, rows, columns), contiguous: what each key block is worth to block rows first, first + 1, ...

        Query head h reads key head `h // (H // G)`. Columns beyond a row's `blocks.lengths` may hold anything. Several
        scores of a head may stand as several heads, and one of several heads as one, if `choose` makes H choices of
        them.
        """

    @abstractmethod
    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """Bits of the chosen columns, int32 (B, H, rows, words), as `topk_bits` and `top_p_bits` give them.

        Args:
            scores: of `score`.
            lengths: int32 (B, H, rows), `blocks.lengths` of these rows.
        """

    def block_size(self) -> int:
        """Tokens of a block of queries, and of keys."""
        return 128

    def blocks_at_most(self) -> int | None:
        """Key blocks that `choose` gives a row at most, which sizes the plan; None: no budget bounds them."""
        return None

    def keeps_all(self, blocks: Blocks) -> bool:
        """Whether everything is kept whatever the scores: then nothing is estimated, and the call runs dense."""
        most = self.blocks_at_most()
        return most is not None and most >= blocks.grid.columns

    def scratch_per_score(self) -> int:
        """Numbers of 4 bytes in memory for each score, itself included."""
        return 1

    def keys_at_most(self, geometry: Geometry) -> int | None:
        """The budget and the query's own block, for each block of queries that shares a row of the plan."""
        most, size = self.blocks_at_most(), self.block_size()
        return None if most is None else -(-geometry.block_q // size) * (most + 1) * size

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        blocks = Blocks(q, k, geometry, softmax, self.block_size())
        grid = blocks.grid
        if self.keeps_all(blocks):
            return dense_plan(grid.plan)
        lengths = blocks.lengths
        groups = row_groups(
            grid.rows, lengths.shape[0] * lengths.shape[1] * grid.columns * 4 * self.scratch_per_score()
        )
        bits = (self.choose(self.score(blocks, at, n), lengths[:, :, at : at + n]) for at, n in groups)
        return plan_from_block_bits(
            join_rows(bits, grid.rows), geometry, blocks.block_tokens, row_blocks=self.blocks_at_most()
        )

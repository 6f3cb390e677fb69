"""xattention: the fewest key blocks that hold a share of the attention, seen through antidiagonals (XAttention)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select.bits import join_rows
from sparsekit.kernels.select.block_scores import antidiagonal_mass, row_groups
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import block_grid, head_lengths
from sparsekit.kernels.select.topk import top_p_bits
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan, upload

__all__ = ["XAttention"]

BLOCK_TOKENS = 128


class XAttention(DynamicPattern):
    """Every block of 128 queries keeps the fewest key blocks that hold a share of its attention, by antidiagonals.

    XAttention (arXiv 2503.16428, algorithm 1). A logit is the mean of `scale * q . k` along the antidiagonal of a tile
    of `stride` x `stride` tokens, causal by tiles; its softmax over a row of tiles, summed over a block of queries and
    a block of keys, is the mass. The first key block and the query's own are kept and counted first; then the largest
    masses, ties to the earlier block, up to and including the one that reaches the threshold. `threshold` 1 is dense.
    Cost: N^2 / (2 stride) products a head. We depart from the published code where a prompt does not end on a stride:
    it pads with zeros, we take the mean over the queries that exist.
    """

    name: Literal["xattention"] = "xattention"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    threshold: float | tuple[float, ...] = Field(
        0.9, description="share of the estimated mass to keep, above 0 and up to 1: one number, or one a query head"
    )
    stride: Literal[4, 8, 16] = Field(16, description="tokens from one antidiagonal to the next: 4, 8 or 16")

    @field_validator("threshold", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        shares = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not shares or any(isinstance(x, bool) or not isinstance(x, int | float) for x in shares):
            raise ValueError("want a number above 0 and up to 1, or one for each query head")
        wrong = [x for x in shares if not 0 < x <= 1]
        if wrong:
            raise ValueError(f"{wrong[0]} is not above 0 and up to 1")
        return tuple(map(float, shares)) if isinstance(value, list | tuple) else float(value)

    def of_heads(self, heads: Sequence[int]) -> XAttention:
        if not isinstance(self.threshold, tuple):
            return self
        return self.model_copy(update={"threshold": tuple(self.threshold[head] for head in heads)})

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        samples, heads = q.shape[:2]
        shares = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if isinstance(self.threshold, tuple) and len(shares) != heads:
            raise SparsekitError(
                f"xattention: threshold has {len(shares)} values for {heads} query heads: want one number, or {heads}."
            )
        grid = block_grid(geometry, BLOCK_TOKENS, samples, q.device)
        if min(shares) >= 1:
            return dense_plan(grid.plan)
        share = _shares_on(shares, q.device) if len(shares) > 1 else shares[0]
        lengths = head_lengths(geometry, BLOCK_TOKENS, samples, heads, q.device)
        # A stride row leaves a number for each key block, a block of queries one more.
        row_bytes = samples * heads * grid.columns * 4 * (BLOCK_TOKENS // self.stride + 1)

        def fewest(first: int, rows: int) -> Tensor:
            mass = antidiagonal_mass(q, k, geometry, grid, BLOCK_TOKENS, self.stride, softmax, first, rows)
            part = lengths[:, :, first : first + rows]
            return top_p_bits(mass, share, lengths=part, force_first=True, force_last=True)

        bits = join_rows((fewest(*group) for group in row_groups(grid.rows, row_bytes)), grid.rows)
        return plan_from_block_bits(bits, geometry, BLOCK_TOKENS)


@per_geometry
def _shares_on(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 (heads, 1) there; uploaded once, without a wait."""
    return upload(torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None], device)

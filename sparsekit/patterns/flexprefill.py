"""flexprefill: a head follows its last queries, or, where block means predict them, a block map (FlexPrefill)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.flexprefill import flex_bits
from sparsekit.kernels.select.grid import BLOCK, Budgets
from sparsekit.kernels.select.last_queries import last_query_sums
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan

__all__ = ["FlexPrefill"]


class FlexPrefill(DynamicPattern):
    """Blocks of 128 tokens by cumulative attention, with a choice of estimator for each head (arXiv 2502.20766).

    P is the softmax of the last 128 queries, summed by key and by distance. Of each, with m the fewest tokens that
    reach `gamma` of the mass, a head keeps the `m // 128 + 1` heaviest blocks: block columns (the first always), and
    block diagonals (the nearest always). It is query-aware where the root of the Jensen-Shannon divergence between
    blockwise P and `softmax(mean(q) . mean(k))` of the same queries is below `tau`. A query-aware head keeps
    `min_budget_tokens` of both, and the entries of the block map `softmax(mean(q) . mean(k))`, all rows of the head in
    one order, that reach `gamma` of its sum.

    Cost: two reads of k for P, one of q and k for the means, N^2 / 128^2 products a head. Where the published
    arithmetic differs: there 0 log 0 is NaN, which makes a head with an empty block not query-aware; here it is 0.
    Distances are put in blocks from the far end, here from distance 0, so that the nearest block is whole at any
    length. Masses are sorted and added up as floats, here compared by 8 significant bits and added as integers, and of
    equals at the map's threshold all are kept. Means count the tokens there are. A batch, padding and chunks are
    allowed; a chunk's map and thresholds are those of its own rows.
    """

    name: Literal["flexprefill"] = "flexprefill"
    source: ClassVar[str] = "FlexPrefill, arXiv 2502.20766"
    pays_from_tokens: ClassVar[dict[str, int]] = {"cuda": 16384}
    bench_points = tuple({"gamma": gamma, "tau": 0.1, "min_budget_tokens": 512} for gamma in (0.9, 0.95))
    sweep_points = tuple({"gamma": gamma} for gamma in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98))
    test_points = ({"gamma": 0.3, "min_budget_tokens": 1},)
    gamma: float = Field(0.9, gt=0, le=1, description="share of the attention mass to keep; 1 keeps everything")
    tau: float = Field(0.1, ge=0, le=1, description="divergence below which a head is query-aware; 0: none is")
    min_budget_tokens: int = Field(1024, ge=1, description="columns, and diagonals, that a head keeps at least, tokens")
    max_budget_tokens: int | None = Field(
        None, ge=1, description="columns, and diagonals, that a head keeps at most, tokens; None: no limit"
    )

    @field_validator("max_budget_tokens")
    @classmethod
    def _above_the_minimum(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_budget_tokens")
        if value is not None and least is not None and value < least:
            raise ValueError(f"it should be at least min_budget_tokens = {least}")
        return value

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        tokens = max(span.q_end for span in geometry.spans)
        min_blocks = -(-self.min_budget_tokens // BLOCK)
        if self.gamma >= 1 or tokens <= max(2, min_blocks) * BLOCK:
            return dense_plan(geometry)
        most = tokens if self.max_budget_tokens is None else self.max_budget_tokens
        budgets = Budgets(self.gamma, self.tau, min_blocks, -(-most // BLOCK))
        sums = last_query_sums(q, k, geometry, softmax, BLOCK)
        bits = flex_bits(q, k, sums, geometry, softmax, BLOCK, budgets)
        return plan_from_block_bits(bits, geometry, BLOCK)

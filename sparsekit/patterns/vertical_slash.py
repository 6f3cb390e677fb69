"""vertical_slash: key columns and diagonals that the last queries attend to most (MInference)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select import MAX_QUERIES, last_query_sums, plan_from_vertical_slash, topk_indices_mask
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan, upload

__all__ = ["VerticalSlash"]

FORCED_COLUMNS, FORCED_DISTANCES = 30, 100

# Keys of the plan's tiles: a diagonal crosses a row of 64 queries in 64 keys, wherever they start.
TILE_KV = 64


class VerticalSlash(DynamicPattern):
    """The heaviest key columns and diagonals of the last queries' attention (MInference, arXiv 2407.02490, 3.2).

    With P the softmax of the last `estimate_queries` rows, column j scores `sum_i P[i, j]` and distance d scores
    `sum_i P[i, i - d]`. A head keeps the `vertical_tokens` best columns, the first 30 among them whatever they score,
    and every tile that one of its `slash_tokens` best diagonals touches, distances 0 to 99 among them. Fewer than 30
    and 100 count as 30 and 100.

    Cost: two reads of k to estimate; then a row lists the fewest tiles of 64 keys, starting anywhere, that hold what
    its diagonals touch. The published code keeps only 50 of the forced distances when `slash_tokens` is 50, lays 64-key
    tiles without looking whether one could serve two diagonals, and takes a batch of one and no chunks.
    """

    name: Literal["vertical_slash"] = "vertical_slash"
    source: ClassVar[str] = "MInference, arXiv 2407.02490"
    narrow: ClassVar[bool] = True
    pays_from_tokens: ClassVar[dict[str, int]] = {"cuda": 32768}
    bench_points = ({"vertical_tokens": 1000, "slash_tokens": 6096},)
    sweep_points = tuple(
        {"vertical_tokens": vertical, "slash_tokens": slash}
        for vertical, slash in (
            (30, 128), (200, 128), (100, 256), (100, 512), (250, 1024),
            (500, 2048), (1000, 4096), (1000, 6096), (2000, 12288),
        )
    )  # fmt: skip
    test_points = (
        {"vertical_tokens": 8, "slash_tokens": 3, "estimate_queries": 20},
        {"vertical_tokens": 30, "slash_tokens": 100, "estimate_queries": 20},
    )
    vertical_tokens: int = Field(1000, ge=1, description="key columns that a head keeps, tokens")
    slash_tokens: int = Field(6096, ge=1, description="diagonals that a head keeps, tokens of distance")
    estimate_queries: int = Field(64, ge=1, le=MAX_QUERIES, description="last queries that are looked at, tokens")

    def keys_at_most(self, geometry: Geometry) -> int:
        """The columns, and for each diagonal the keys that a row of queries crosses, in whole tiles."""
        columns, slashes = max(self.vertical_tokens, FORCED_COLUMNS), max(self.slash_tokens, FORCED_DISTANCES)
        tile = min(TILE_KV, geometry.block_kv)
        return columns + slashes * (geometry.block_q + tile - 1)

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        tokens = max(span.q_end for span in geometry.spans)
        columns = max(self.vertical_tokens, FORCED_COLUMNS)
        slashes = max(self.slash_tokens, FORCED_DISTANCES)
        if tokens <= max(columns, slashes):
            return dense_plan(geometry)
        sums = last_query_sums(
            q, k, geometry, softmax, self.estimate_queries,
            force_columns=FORCED_COLUMNS, force_distances=FORCED_DISTANCES,
        )  # fmt: skip
        wanted = _wanted(columns, slashes, sums[0].numel() // tokens, q.device)
        bits = topk_indices_mask(sums.view(-1, tokens), wanted).view(2, *sums.shape[1:3], -1)
        return plan_from_vertical_slash(bits, geometry, columns, slashes, min(TILE_KV, geometry.block_kv))


@per_geometry
def _wanted(columns: int, slashes: int, heads: int, device: torch.device) -> Tensor:
    """int32 (2 * heads,): how many of each row of scores. Kept: an upload a call would cost more than the selection."""
    each = torch.tensor([columns, slashes], dtype=torch.int32, device="cpu").repeat_interleave(heads)
    return upload(each, device)

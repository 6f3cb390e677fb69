"""s2o: earlier keys in order of importance, walked until they no longer matter (S2O)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select.ranking import mean_queries, rank_keys
from sparsekit.kernels.select.segments import KEY_TILE, segments_of
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, Ranked, dense_plan

__all__ = ["RANKED_BYTES", "S2O"]

RANKED_BYTES = 3 << 30  # of ranked keys, all heads: at 1M tokens the rest of 4 GiB is scratch


class S2O(DynamicPattern):
    """Dense inside segments; of what came before, the most important keys first, until a tile adds too little.

    S2O (arXiv 2602.22575). We had access to neither the paper nor its code: every formula and default here is our own
    reading of what others write about it.

    In segments of `segment_tokens` positions, a query keeps its own segment up to itself, and the prompt's first 64
    keys. Earlier keys come in the order of `mean(q of the segment) . k`, 64 at a time, the same for all queries of a
    segment and head. A tile of queries stops once `patience` tiles of keys in a row were a gain
    below `tau` to each of its queries: `gain = sum of the tile's exp(z) / sum of all exp(z) so far`, a sink logit
    included. `guide` orders a segment's queries by `q . guide`, so that those of one tile may need the same keys. A
    tile then visits nearly its whole segment, and nothing was gained where we measured it, so it is off.

    The stop is a heuristic and no bound: keys that few queries of a segment want may rank after it, and where attention
    is flat over a long prompt each tile adds little and all of them much. tau 0 with `max_tokens` None is dense
    attention exactly. What is visited is known after execution; until then a plan reports what it may visit.

    Cost: a product of each segment's mean with all earlier keys and the choice of `max_tokens` of them, and
    `4 N / segment_tokens * max_tokens` bytes a head: 128 MiB for 32 heads at 128K tokens, 1 GiB at 1M.
    """

    name: Literal["s2o"] = "s2o"
    source: ClassVar[str] = "S2O, arXiv 2602.22575"
    whole_layer: ClassVar[bool] = True
    # It paid from 16,384 tokens on one host and not on a slower one.
    pays_from_tokens: ClassVar[dict[str, int]] = {"cuda": 32768}
    sweep_points = tuple({"tau": tau} for tau in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0))
    test_points = (
        {"segment_tokens": 64, "tau": 0.4},
        {"segment_tokens": 100, "tau": 0.3, "max_tokens": 70, "patience": 2, "guide": "mean"},
    )
    segment_tokens: int = Field(512, ge=KEY_TILE, description="segment that is dense and shares one key order, tokens")
    tau: float = Field(
        0.003, ge=0, le=1, description="stop when a key tile's share of the softmax falls below; 0: never"
    )
    max_tokens: int | None = Field(4096, ge=1, description="most ranked keys a segment may visit, tokens; null: all")
    patience: int = Field(1, ge=1, description="key tiles in a row that must fall below tau")
    guide: Literal["mean", "last", "none"] = Field(
        "none", description="order queries by q . the segment's mean or last query, or leave them in place: none"
    )

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        batch, heads = q.shape[:2]
        if max(span.q_end for span in geometry.spans) <= self.segment_tokens:
            return dense_plan(geometry)
        # The queries of a tile stop together, so they are one program: as many as a GPU holds of the head size.
        row_bytes = q.element_size() << max(q.shape[3] - 1, 64).bit_length()
        cut = geometry.with_tile(min(geometry.block_q, max(128 * 256 // row_bytes, 16)), KEY_TILE)
        segments = segments_of(cut, self.segment_tokens, self.max_tokens, q.device)
        self._check_room(batch * heads * segments.room * 4, geometry)
        places = -(-self.segment_tokens // cut.block_q) * cut.block_q
        shape = (batch, heads, len(segments.rows[0]), places)
        q_index = torch.empty(shape, dtype=torch.int32, device=q.device)
        keys = rank_keys(mean_queries(q, segments, self.guide, q_index), k, segments)
        ranked = Ranked(self.segment_tokens, q_index, keys, segments.key_ptr, self.tau, self.patience)
        return BlockPlan(cut, samples=batch, heads=heads, ranked=ranked)

    def _check_room(self, needed: int, geometry: Geometry) -> None:
        if needed > RANKED_BYTES:
            ranks, limit = (f"{size / 2**30:.1f} GiB" for size in (needed, RANKED_BYTES))
            raise SparsekitError(
                f"s2o: max_tokens={self.max_tokens} and segment_tokens={self.segment_tokens} rank {ranks} of keys for "
                f"{geometry.batch} x {geometry.kv_len} tokens, above {limit}: fewer max_tokens or longer segments."
            )

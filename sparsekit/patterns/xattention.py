"""xattention: the fewest key blocks that hold a share of the attention, seen through antidiagonals (XAttention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select import antidiagonal_mass, top_p_bits
from sparsekit.patterns.blocks import BlockPattern, Blocks
from sparsekit.plan import BlockPlan, upload

__all__ = ["XAttention"]


class XAttention(BlockPattern):
    """Every block of 128 queries keeps the fewest key blocks that hold a share of its attention, by antidiagonals.

    XAttention (arXiv 2503.16428, algorithm 1). A logit is the mean of `scale * q . k` along the antidiagonal of a tile
    of `stride` x `stride` tokens, causal by tiles; its softmax over a row of tiles, summed over a block of queries and
    a block of keys, is the mass. The first key block and the query's own are kept and counted first; then the largest
    masses, ties to the earlier block, up to and including the one that reaches the threshold. `threshold` 1 is dense.
    With a `proxy` the query heads of a key head share the masses of their mean query, whose logits are the means of
    theirs. Cost: N^2 / (2 stride) products a head, with a `proxy` a key head. We depart from the published code where a
    prompt does not end on a stride: it pads with zeros, we take the mean over the queries that exist; and in its first
    chunk of queries, where it keeps one block more than the threshold asks for.
    """

    name: Literal["xattention"] = "xattention"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    pays_from_tokens: ClassVar[dict[str, int]] = {"cuda": 16384}
    left_out: ClassVar[tuple[str, ...]] = ("correct_every", "proxy")
    bench_points = ({"stride": 16, "threshold": 0.9}, {"stride": 8, "threshold": 0.9})
    sweep_points = tuple({"threshold": share} for share in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98))
    test_points = (
        {"threshold": 0.5},
        {"threshold": (0.3, 0.5, 0.9, 1.0), "stride": 8},
        {"threshold": 0.5, "proxy": "mean"},
    )
    threshold: float | tuple[float, ...] = Field(
        0.9, description="share of the estimated mass to keep, above 0 and up to 1: one number, or one a query head"
    )
    stride: Literal[4, 8, 16] = Field(16, description="tokens from one antidiagonal to the next: 4, 8 or 16")
    proxy: Literal["mean"] | None = Field(
        None, description="estimate once a key head, of the mean query of its query heads; null: for each query head"
    )

    @field_validator("threshold", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        shares = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not shares or any(isinstance(x, bool) or not isinstance(x, int | float) for x in shares):
            raise ValueError("it must be a number above 0 and up to 1, or one for each query head")
        wrong = [x for x in shares if not 0 < x <= 1]
        if wrong:
            raise ValueError(f"{wrong[0]} must be above 0 and up to 1")
        return tuple(map(float, shares)) if isinstance(value, list | tuple) else float(value)

    def of_heads(self, heads: Sequence[int]) -> XAttention:
        shares = self.threshold
        if not isinstance(shares, tuple):
            return self
        if max(heads) >= len(shares):
            raise SparsekitError(
                f"xattention: threshold has {len(shares)} values, and none for query head {max(heads)}: give one "
                "number, or one for each query head."
            )
        return self.model_copy(update={"threshold": tuple(shares[head] for head in heads)})

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        heads, shares = q.shape[1], self.threshold
        if isinstance(shares, tuple) and len(shares) != heads:
            raise SparsekitError(
                f"xattention: threshold has {len(shares)} values for {heads} query heads: give one number, or {heads}."
            )
        return super().select(q, k, geometry, softmax)

    def keeps_all(self, blocks: Blocks) -> bool:
        return min(self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)) >= 1

    def scratch_per_score(self) -> int:
        return self.block_size() // self.stride + 1  # a stride row leaves a number, a block of queries one more

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        x, q, softmax = blocks, blocks.q, blocks.softmax
        if self.proxy == "mean":
            q, sinks = x.group_queries, softmax.sink_logits
            if sinks is not None:  # a key of its own logit in each head
                softmax = replace(softmax, sink_logits=sinks.unflatten(0, (q.shape[1], -1)).mean(1))
        return antidiagonal_mass(q, x.k, x.geometry, x.grid, x.block_tokens, self.stride, softmax, first, rows)

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        group = lengths.shape[1] // scores.shape[1]  # heads that a score stands for
        if isinstance(self.threshold, float):
            bits = top_p_bits(scores, self.threshold, lengths=lengths[:, ::group], force_first=True, force_last=True)
            return bits if group == 1 else bits.repeat_interleave(group, 1)
        scores = scores if group == 1 else scores.repeat_interleave(group, 1)
        share = _shares_on(self.threshold, scores.device)
        return top_p_bits(scores, share, lengths=lengths, force_first=True, force_last=True)


@per_geometry
def _shares_on(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 (heads, 1) there; uploaded once, without a wait."""
    return upload(torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None], device)

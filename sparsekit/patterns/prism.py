"""prism: key blocks by two products of means, of low and of high rotary frequencies (Prism)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.errors import SparsekitError
from sparsekit.kernels.select import pooled_scores, top_p_bits
from sparsekit.patterns.blocks import BlockPattern, Blocks

__all__ = ["Prism"]

TINY = 1e-12  # a band without energy says nothing: its logits are 0
GRAIN = 16  # dimensions that a matrix instruction takes at once


class Prism(BlockPattern):
    """Every block of 128 queries keeps, for each of two bands, the fewest key blocks that hold a share of its softmax.

    Prism (arXiv 2602.08426). The mean of a high rotary frequency over a block cancels, and drowns in what is left of
    the low ones; so each band has a softmax of its own, at a temperature that gives its logits the size of whole ones.
    Kept is the union, the first key block, and the query's own.
    """

    name: Literal["prism"] = "prism"
    source: ClassVar[str] = "Prism, arXiv 2602.08426"
    sweep_points = tuple({"top_p": share} for share in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95))
    test_points = ({"top_p": 0.3}, {"top_p": 0.4, "low_share": 1.0, "high_share": 0.25})
    top_p: float = Field(0.95, gt=0, le=1, description="share of each band's softmax to keep; 1 keeps everything")
    low_share: float = Field(0.75, gt=0, le=1, description="share of the dimensions in the band of low frequencies")
    high_share: float = Field(0.5, gt=0, le=1, description="share of the dimensions in the band of high frequencies")

    def keeps_all(self, blocks: Blocks) -> bool:
        return self.top_p >= 1

    def scratch_per_score(self) -> int:
        return 2  # one a band

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        """Logits (B, 2 H, rows, columns): of the low band for all heads, then of the high band."""
        means_q, means_k = blocks.means
        (q, share_q), (k, share_k) = self._bands(means_q), self._bands(means_k)
        share_k = share_k.repeat_interleave(share_q.shape[1] // share_k.shape[1], 1)
        factor = blocks.softmax.scale * (share_q * share_k).clamp(min=TINY).rsqrt()
        q = (q * factor[..., None, None]).to(means_q.dtype)
        scores = pooled_scores(q, k.to(means_k.dtype), blocks.grid, blocks.block_tokens, first, rows)
        return blocks.softmax.capped(scores)

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        low, high = top_p_bits(scores, self.top_p, lengths=lengths.repeat(1, 2, 1), logits=True).chunk(2, 1)
        kept = low | high
        kept[..., 0] |= lengths > 0
        return kept

    def _bands(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """Means (B, heads, n, D) cut to each band, (B, 2 heads, n, d) in float32, filled up with zeros; and the band's
        share of the energy of all blocks, (B, 2 heads)."""
        dim = means.shape[-1]
        if dim % 2:
            raise SparsekitError(f"prism: head size {dim}: it must be even, as rotary embedding turns pairs.")
        half = dim // 2
        low, high = (max(round(share * half), 1) for share in (self.low_share, self.high_share))
        width = -(-2 * max(low, high) // GRAIN) * GRAIN
        pairs = means.float().unflatten(3, (2, half))
        energy = pairs.square().sum((2, 3))  # (B, heads, half): of a frequency
        total = energy.sum(-1).clamp(min=TINY)
        bands = [(pairs[..., at:end].flatten(3), energy[..., at:end]) for at, end in ((half - low, half), (0, high))]
        cut = torch.cat([pad(band, (0, width - band.shape[3])) for band, _ in bands], 1)
        return cut, torch.cat([part.sum(-1) / total for _, part in bands], 1)

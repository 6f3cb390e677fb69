"""prism: key blocks by two products of means, of low and of high rotary frequencies (Prism)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select import pooled_scores, top_p_bits
from sparsekit.patterns.blocks import BlockPattern, Blocks
from sparsekit.plan import upload

__all__ = ["Prism"]

TINY = 1e-12  # a band without energy says nothing: its logits are 0


class Prism(BlockPattern):
    """Every block of 128 queries keeps, for each of two bands, the fewest key blocks that hold a share of its softmax.

    Prism (arXiv 2602.08426). The mean of a high rotary frequency over a block cancels, and drowns in what is left of
    the low ones; so each band has a softmax of its own, at a temperature that gives its logits the size of whole ones.
    Kept is the union, the first key block, and the query's own.
    """

    name: Literal["prism"] = "prism"
    source: ClassVar[str] = "Prism, arXiv 2602.08426"
    sweep_points = tuple({"top_p": share} for share in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95))
    test_points = ({"top_p": 0.05, "low_share": 1.0, "high_share": 1.0}, {"top_p": 0.05})
    top_p: float = Field(0.95, gt=0, le=1, description="share of each band's softmax to keep; 1 keeps everything")
    low_share: float = Field(0.75, gt=0, le=1, description="share of the dimensions in the band of low frequencies")
    high_share: float = Field(0.5, gt=0, le=1, description="share of the dimensions in the band of high frequencies")

    def keeps_all(self, blocks: Blocks) -> bool:
        return self.top_p >= 1

    def scratch_per_score(self) -> int:
        return 2  # one a band

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        """Logits (B, 2 H, rows, columns): of each head the low band, then the high one."""
        q, k = blocks.means
        low, high = self._frequencies(q.shape[-1])
        share_q, share_k = (_shares(means, low, high) for means in (q, k))
        share_k = share_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        factor = blocks.softmax.scale * (share_q * share_k).clamp(min=TINY).rsqrt()
        # Queries that are 0 outside their band: keys stay as they are, for both.
        factor = factor[..., None] * _bands(q.shape[-1], low, high, q.device)  # (B, H, 2, D)
        banded = (q[:, :, None] * factor[:, :, :, None]).flatten(1, 2).to(q.dtype)
        return blocks.softmax.capped(pooled_scores(banded, k, blocks.grid, blocks.block_tokens, first, rows))

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        bits = top_p_bits(scores, self.top_p, lengths=lengths.repeat(1, 2, 1), logits=True)  # of all heads alike
        low, high = bits.unflatten(1, (-1, 2)).unbind(2)
        kept = low | high
        kept[..., 0] |= lengths > 0
        return kept

    def _frequencies(self, dim: int) -> tuple[int, int]:
        """How many of the `dim / 2` frequencies the low band has, and the high one."""
        if dim % 2:
            raise SparsekitError(f"prism: head size {dim}: it must be even, as rotary embedding turns pairs.")
        low, high = (max(round(share * (dim // 2)), 1) for share in (self.low_share, self.high_share))
        return low, high


def _shares(means: Tensor, low: int, high: int) -> Tensor:
    """float32 (B, heads, 2): each band's share of the energy of all means (B, heads, n, D)."""
    half = means.shape[-1] // 2
    energy = means.float().unflatten(3, (2, half)).square().sum((2, 3))  # (B, heads, half): of a frequency
    bands = torch.stack([energy[..., half - low :].sum(-1), energy[..., :high].sum(-1)], -1)
    return bands / energy.sum(-1, keepdim=True).clamp(min=TINY)


@per_geometry
def _bands(dim: int, low: int, high: int, device: torch.device) -> Tensor:
    """float32 (2, dim): 1 where a dimension is in the low band, and in the high one; uploaded once, without a wait."""
    frequency = torch.arange(dim, device="cpu") % (dim // 2)
    return upload(torch.stack([frequency >= dim // 2 - low, frequency < high]).float(), device)

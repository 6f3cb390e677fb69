"""What the columns of dense attention get, in parts of the rows: the sums that sink measures are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.lab.calibrate.blocks import row_blocks, scores, wide

__all__ = ["SCORE_TOKENS", "Columns", "columns", "sink_scores"]

SCORE_TOKENS = 64  # over which a sink score was published


@dataclass(frozen=True)
class Columns:
    """What the columns of the attention weights of one layer get, float64 but for `lse`.

    Rows are cut at `ends`: the first `score_tokens` of them, then runs that end at twice that, four times, and so on;
    the last one ends with the prompt, and is at least half as long as the one before. A prompt's rows are those of a
    longer prompt that begins with it, so a run shows what a prompt of that length shows in its second half.

    Attributes:
        parts: sums over the rows of each run, (P, B, H, N).
        ends: of each run, the row that comes after it.
        lse: logarithm of the softmax denominator, (B, H, N).
    """

    parts: Tensor
    ends: tuple[int, ...]
    lse: Tensor

    @property
    def whole(self) -> Tensor:
        """Sums over all rows, (B, H, N)."""
        return self.parts.sum(0)

    @property
    def early(self) -> Tensor:
        """Sums over the first `score_tokens` rows, (B, H, T)."""
        return self.parts[0, ..., : self.ends[0]]

    @property
    def learned(self) -> Tensor:
        """Mean share of a learned sink logit, 1 - the row's sum, (B, H)."""
        return 1 - self.parts.sum((0, -1)) / self.ends[-1]

    def share(self, at: Tensor, part: int | None = None) -> Tensor:
        """Mean attention of a row to the keys at these positions, int64 (n,), together: (B, H).

        Over the rows of run `part`, or those from `score_tokens` on; over all where a prompt has no more.
        """
        sums, rows = self._rows(part)
        return sums[..., at].sum(-1) / rows

    def mass(self, at: Tensor, part: int | None = None) -> Tensor:
        """`share`, and that of a learned sink logit."""
        sums, rows = self._rows(part)
        return (sums[..., at].sum(-1) + (rows - sums.sum(-1)).clamp(min=0)) / rows

    def _rows(self, part: int | None) -> tuple[Tensor, int]:
        """Sums over the rows of a run, and how many there are."""
        if part is not None:
            return self.parts[part], self.ends[part] - (self.ends[part - 1] if part else 0)
        late = min(1, len(self.ends) - 1)
        return self.parts[late:].sum(0), self.ends[-1] - (self.ends[0] if late else 0)


def columns(q: Tensor, k: Tensor, softmax: Softmax, score_tokens: int = SCORE_TOKENS) -> Columns:
    """Column sums of dense causal attention of q (B, H, N, D) over k (B, G, N, D), never holding N x N weights."""
    tokens = q.shape[2]
    ends = [min(score_tokens, tokens)]
    while ends[-1] < tokens:
        ends.append(2 * ends[-1] if 5 * ends[-1] <= 2 * tokens else tokens)
    parts = torch.zeros(len(ends), *q.shape[:2], tokens, dtype=torch.float64, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=wide(q), device=q.device)
    for a, b in row_blocks(q):
        logits = scores(q, k, softmax, a, b)[0]
        total = logits.logsumexp(-1)
        if softmax.sink_logits is not None:
            total = torch.logaddexp(total, softmax.sink_logits.to(total)[None, :, None])
        weights = torch.exp(logits - total[..., None])
        lse[:, :, a:b] = total
        for part, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if first < b and a < end:
                parts[part, ..., :b] += weights[:, :, max(first - a, 0) : end - a].sum(2)
    return Columns(parts, tuple(ends), lse)


def sink_scores(sums: Tensor) -> Tensor:
    """alpha_k = 1/(T - k + 1) sum over i >= k of A[i, k], k from 1, of column sums (..., T): Gu et al.'s sink score."""
    tokens = sums.shape[-1]
    return sums / torch.arange(tokens, 0, -1, dtype=sums.dtype, device=sums.device)

"""What a sparse attention loses: attention mass not recalled, output error. Nothing quadratic is held."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_lse", "output_error", "recall", "sampled_rows"]

SAMPLED_ROWS = 256


def sampled_rows(tokens: int, count: int = SAMPLED_ROWS) -> Tensor:
    """int64 (at most `count`,): query rows spread evenly over the prompt, the first and the last included."""
    return torch.linspace(0, tokens - 1, min(count, tokens), dtype=torch.float64).round().long()


def dense_lse(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """float32 (B, H, rows): logarithm of the dense causal softmax denominator of some rows, in float32, head by head.

    q (B, H, N, D) over k (B, G, N, D), one token a row of both.
    """
    out = torch.empty(*q.shape[:2], len(rows), device=q.device)
    rows = rows.to(q.device)
    future = torch.arange(k.shape[2], device=q.device) > rows[:, None]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key = k[b, h * k.shape[1] // q.shape[1]].float()
            scores = (q[b, h, rows].float() @ key.T) * scale
            out[b, h] = scores.masked_fill_(future, float("-inf")).logsumexp(-1)
    return out


def recall(lse: Tensor, dense: Tensor) -> Tensor:
    """The share of the dense softmax mass that lies on the kept pairs, row by row.

    Kept pairs have the sum exp(lse) of exponentials, all causal ones exp(dense): recall is their ratio. It needs the
    kept pairs of no row, so it also holds where a kernel decides while it runs.

    Args:
        lse: (B, H, rows), of the attention that was computed. dense: the same of dense attention.
    """
    return (lse.to(dense) - dense).exp()


def output_error(out: Tensor, dense: Tensor) -> tuple[float, float]:
    """(L1, L2): `sum |out - dense| / sum |dense|` and `||out - dense|| / ||dense||`, over everything, in float32."""
    sums = torch.zeros(4, dtype=torch.float64, device=out.device)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            exact = dense[b, h].float()
            off = out[b, h].float() - exact
            parts = off.abs().sum(), exact.abs().sum(), off.square().sum(), exact.square().sum()
            sums += torch.stack(parts).double()
    l1, norm1, l2, norm2 = sums.tolist()
    return l1 / norm1, (l2 / norm2) ** 0.5

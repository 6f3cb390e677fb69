"""What a sparse attention loses: attention mass not recalled, output error. Nothing quadratic is held."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RECALL_SLACK", "dense_lse", "output_error", "recall", "recall_bound", "sampled_rows"]

SAMPLED_ROWS = 256
RECALL_SLACK = 1e-3  # of a plan's recall, read off two softmax sums of which one is a kernel's
LSE_STEPS = 8


def sampled_rows(tokens: int, count: int = SAMPLED_ROWS) -> Tensor:
    """int64 (at most `count`,): query rows spread evenly over the prompt, the first and the last included."""
    return torch.linspace(0, tokens - 1, min(count, tokens), dtype=torch.float64).round().long()


def dense_lse(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """float64 (B, H, rows): logarithm of the dense causal softmax denominator of some rows, in float64, head by head.

    q (B, H, N, D) over k (B, G, N, D), one token a row of both. Real logits reach ten thousand, where float32 has steps
    of 0.001.
    """
    out = torch.empty(*q.shape[:2], len(rows), dtype=torch.float64, device=q.device)
    rows = rows.to(q.device)
    future = torch.arange(k.shape[2], device=q.device) > rows[:, None]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key = k[b, h * k.shape[1] // q.shape[1]].double()
            scores = (q[b, h, rows].double() @ key.T) * scale
            out[b, h] = scores.masked_fill_(future, float("-inf")).logsumexp(-1)
    return out


def recall(lse: Tensor, dense: Tensor) -> Tensor:
    """The share of the dense softmax mass that lies on the kept pairs, row by row.

    Kept pairs have the sum exp(lse) of exponentials, all causal ones exp(dense): recall is their ratio. It needs the
    kept pairs of no row, so it also holds where a kernel decides while it runs. It is as exact as a kernel's lse:
    `recall_bound`.

    Args:
        lse: (B, H, rows), of the attention that was computed. dense: the same of dense attention.
    """
    return (lse.to(dense) - dense).exp()


def recall_bound(dense: Tensor) -> Tensor:
    """The largest `recall` of rows whose kept pairs are counted once; of `dense_lse`'s result, in its shape.

    All of the mass, and what a kernel's rounding adds: `RECALL_SLACK`, and `LSE_STEPS` steps of a float32 as large as
    the logarithm, for the logits that it sums are products in float32.
    """
    return 1 + RECALL_SLACK + LSE_STEPS * torch.finfo(torch.float32).eps * dense.abs()


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

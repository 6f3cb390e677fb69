"""Dense causal attention weights in blocks of rows: what a measurement needs to see, without an N x N tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax

__all__ = ["BLOCK_ENTRIES", "grouped", "row_blocks", "scores", "times", "wide"]

# Entries of one block of attention weights, all heads and samples: 64 MiB in float32, three or four of them at a time.
BLOCK_ENTRIES = 1 << 24


def wide(q: Tensor) -> torch.dtype:
    """What weights of q are computed in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def row_blocks(q: Tensor) -> Iterator[tuple[int, int]]:
    """Runs [a, b) of the rows of q (B, H, N, D), so short that their weights fit `BLOCK_ENTRIES`."""
    tokens = q.shape[2]
    step = max(16, min(128, BLOCK_ENTRIES // (q.shape[0] * q.shape[1] * tokens)))
    return ((a, min(a + step, tokens)) for a in range(0, tokens, step))


def grouped(rows: Tensor, groups: int) -> Tensor:
    """(B, H, r, x) -> (B, G, H/G * r, x): the rows of all query heads that share a key head."""
    return rows.unflatten(1, (groups, -1)).flatten(2, 3)


def times(rows: Tensor, keys: Tensor) -> Tensor:
    """(B, H, r, x) times (B, G, x, y) -> (B, H, r, y), in the rows' type."""
    groups = keys.shape[1]
    return (grouped(rows, groups) @ keys.to(rows.dtype)).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)


def scores(q: Tensor, k: Tensor, softmax: Softmax, a: int, b: int) -> tuple[Tensor, Tensor | None]:
    """(scores (B, H, b - a, b) with -inf in the future, their slope in the logits where a soft-cap bends them)."""
    scores = times(q[:, :, a:b].to(wide(q)), k[:, :, :b].mT) * softmax.scale
    slope = None
    if softmax.softcap is not None:
        bent = torch.tanh(scores / softmax.softcap)
        scores, slope = softmax.softcap * bent, 1 - bent**2
    at = torch.arange(b, device=q.device)
    return scores.masked_fill_(at > at[a:b, None], -math.inf), slope

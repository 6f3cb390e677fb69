"""What the best selector could have done: the least density of tiles at a recall, from the dense attention weights.

A plan of whole, aligned tiles has a recall, the mean share of a query's attention mass on what it keeps. The tiles of
the largest mass, over all heads and rows together, reach it with the fewest tiles, so no selector of such tiles can do
better. Patterns of smaller units (single columns, tiles that start at any token) may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError

__all__ = ["Oracle", "oracle"]

TILE = 128


@dataclass(frozen=True)
class Oracle:
    """Tiles of one attention call, those on the diagonal first (every plan keeps them), then by falling mass.

    Attributes:
        recall: float64 (tiles,), with the first n tiles kept: the mean over heads and queries.
        first: how many are on the diagonal.
    """

    recall: Tensor
    first: int

    def tile_density(self, recall: float) -> float:
        """The least share of the causal tiles with which `recall` can be reached."""
        if not 0 <= recall <= 1:
            raise SparsekitError(f"recall = {recall}: a share of the attention mass, from 0 to 1.")
        total = len(self.recall)
        needed = int(torch.searchsorted(self.recall, torch.tensor(recall, dtype=torch.float64))) + 1
        return min(max(needed, self.first), total) / total


def oracle(q: Tensor, k: Tensor, scale: float | None = None, tile: int = TILE) -> Oracle:
    """Of dense causal attention of q (1, H, N, D) over k (1, G, N, D), in tiles of `tile` queries by `tile` keys.

    In float32 whatever q and k are: logits of a hundred rounded to bfloat16 are off by a quarter. Holds H x tile x N
    logits at a time, the keys in float32, and a number for each tile.
    """
    _, heads, tokens, dim = q.shape
    groups, rows = heads // k.shape[1], -(-tokens // tile)
    scale = dim**-0.5 if scale is None else scale
    keys = k[0].float().mT.repeat_interleave(groups, 0)
    near, far = [], []
    for row in range(rows):
        a, b = row * tile, min((row + 1) * tile, tokens)
        logits = q[0, :, a:b].float() @ keys[:, :, :b] * scale
        future = torch.arange(b, device=q.device) > torch.arange(a, b, device=q.device)[:, None]
        weights = logits.masked_fill_(future, float("-inf")).softmax(-1).sum(1, dtype=torch.float64)  # (H, b)
        mass = torch.nn.functional.pad(weights, (0, (row + 1) * tile - b)).view(heads, row + 1, tile).sum(-1)
        near.append(mass[:, -1])
        far.append(mass[:, :-1].reshape(-1))
    ordered = torch.cat([*near, torch.cat(far).sort(descending=True).values])
    return Oracle((ordered.cumsum(0) / (heads * tokens)).cpu(), heads * rows)

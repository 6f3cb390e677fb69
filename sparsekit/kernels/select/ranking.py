"""Earlier keys of segments of queries, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.topk import topk_indices_mask
from sparsekit.plan import segment_bounds, upload

__all__ = ["KEY_TILE"]

KEY_TILE = 64  # keys that are gathered together, and after which the stop is looked at
SCRATCH_BYTES = 1 << 27  # of scores, or of queries in float32, at once


@per_geometry
def _key_ptr(
    geometry: Geometry, samples: int, segment_tokens: int, max_tokens: int | None, device: torch.device
) -> tuple[list[list[int]], Tensor]:
    """Where each segment's ranked keys start, on the host and, int64 (S, n + 1), on the device."""
    first, low, high = segment_bounds(geometry, samples, segment_tokens, torch.device("cpu"))
    counts = (first - KEY_TILE).clamp(min=0, max=max_tokens) * (low < high)
    ptr = pad(counts.cumsum(1), (1, 0))
    return ptr.tolist(), upload(ptr, device)


def _rank_keys(means: Tensor, k: Tensor, rows: list[list[int]], ptr: list[int], size: int, keys: Tensor) -> None:
    """Fills in keys (H, L) of one sample: per segment, what precedes it by `mean . k`, ties to the earlier key.

    Args:
        means: float32 (H, n, D). k: (G, K, D), from position 0 on. size: tokens of a segment.
    """
    for a, b, count in _groups(rows, ptr, len(means)):
        width = rows[b - 1][0] - KEY_TILE
        scores = _products(means[:, a:b], k[:, KEY_TILE : KEY_TILE + width])  # (H, b - a, width)
        history = rows[a][0] + torch.arange(b - a, device=k.device) * size
        future = torch.arange(KEY_TILE, KEY_TILE + width, device=k.device) >= history[:, None]
        ranked = _largest(_finite(scores).masked_fill_(future, -torch.inf).flatten(0, 1), count)
        ranked = (ranked + KEY_TILE).to(torch.int32).unflatten(0, (len(means), b - a))
        if ptr[b] - ptr[a] == (b - a) * count:
            keys[:, ptr[a] : ptr[b]] = ranked.flatten(1)
        else:
            for i in range(a, b):
                keys[:, ptr[i] : ptr[i + 1]] = ranked[:, i - a, : ptr[i + 1] - ptr[i]]


def _groups(rows: list[list[int]], ptr: list[int], heads: int) -> Iterator[tuple[int, int, int]]:
    """(first segment, one past the last, most keys of one) of segments that are ranked together.

    As many as the scratch holds; and one that may visit all its history, never with one that may not.
    """
    counts = [ptr[i + 1] - ptr[i] for i in range(len(rows))]
    a = 0
    while a < len(rows):
        if not counts[a]:
            a += 1
            continue
        b = a + 1
        while b < len(rows) and counts[b] and heads * (b + 1 - a) * rows[b][0] * 4 <= SCRATCH_BYTES:
            if (counts[b] < rows[b][0] - KEY_TILE) != (counts[a] < rows[a][0] - KEY_TILE):
                break
            b += 1
        yield a, b, counts[b - 1]
        a = b


def _products(means: Tensor, keys: Tensor) -> Tensor:
    """float32 (H, n, w): means (H, n, D) times the keys (G, w, D) of each head's key head, rounded to their type."""
    heads, n, _ = means.shape
    rows = means.to(keys.dtype).unflatten(0, (len(keys), -1)).flatten(1, 2)
    if keys.is_cuda and keys.element_size() <= 2:
        scores = torch.bmm(rows, keys.mT, out_dtype=torch.float32)
    else:
        scores = rows.float() @ keys.float().mT
    return scores.view(heads, n, -1)


def _finite(scores: Tensor) -> Tensor:
    """In place: NaN counts as the lowest number, and infinities as numbers, so that only absence is -inf."""
    most = torch.finfo(torch.float32).max
    return scores.nan_to_num_(nan=-most, posinf=most, neginf=-most)


def _largest(scores: Tensor, count: int) -> Tensor:
    """(rows, count): indices of each row's largest scores, largest first, ties to the lower index."""
    if count == scores.shape[1] or not runs_triton(scores.device):
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    from sparsekit.kernels.select.ranking_triton import bit_positions_triton

    chosen = bit_positions_triton(topk_indices_mask(scores, count), count).long()
    return chosen.gather(1, scores.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices)

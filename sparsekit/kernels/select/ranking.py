"""Earlier keys of segments of queries, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.segments import KEY_TILE, Segments
from sparsekit.kernels.select.topk import topk_indices_mask

__all__ = ["mean_queries", "rank_keys"]

SCRATCH_BYTES = 1 << 27  # of scores, or of queries in float32, at once; by torch


def mean_queries(q: Tensor, segments: Segments, guide: str, q_index: Tensor) -> Tensor:
    """(S, H, n, D), in q's type: the mean query of each segment, summed in float32; q_index is filled in.

    Args:
        q: (S, H, Q, D).
        guide: what orders a segment's queries: "mean" or "last", by their product with that query; "none": position.
        q_index: int32 (S, H, n, T): positions of a segment's queries, then -1.
    """
    if guide == "none" and runs_triton(q.device):
        from sparsekit.kernels.select.ranking_triton import mean_queries_triton

        return mean_queries_triton(q, segments, q_index)
    means = q.new_zeros(*q_index.shape[:3], q.shape[3])
    q_index.fill_(-1)
    for b, rows in enumerate(segments.rows):
        _mean_queries(q[b], segments.geometry.q_index(b, 0), rows, segments.size, guide, q_index[b], means[b])
    return means


def _mean_queries(
    q: Tensor, offset: int, rows: list[list[int]], size: int, guide: str, q_index: Tensor, means: Tensor
) -> None:
    """Those of one sample, from q (H, Q, D), whose row `offset` holds position 0."""
    step = max(SCRATCH_BYTES // (q.shape[0] * size * q.shape[2] * 4), 1)
    for i in range(0, len(rows), step):
        part = [row for row in rows[i : i + step] if row[1] < row[2]]
        if not part:
            break
        (first, low, _), high = part[0], part[-1][2]
        lead, n = low - first, len(part)
        trail = n * size - lead - (high - low)
        some = q[:, low + offset : high + offset]
        if lead or trail:
            some = pad(some, (0, 0, lead, trail))
        some = some.unflatten(1, (n, size))
        place = torch.arange(n * size, device=q.device).view(n, size)
        valid = (place >= lead) & (place < n * size - trail)
        count = valid.sum(1)[:, None]
        mean = some.sum(2, dtype=torch.float32) / count
        means[:, i : i + n] = mean
        if guide == "none":
            order = (first + place[:, :1]).clamp(min=low) + place[:1]
        else:
            some = some.float()
            last = torch.cat([some[:, :-1, -1:], some[:, -1:, size - trail - 1 : size - trail]], 1)
            likeness = _finite((some @ (mean[:, :, None] if guide == "mean" else last).mT)[..., 0])
            likeness = likeness.masked_fill_(~valid, -torch.inf)
            order = first + place[:, :1] + likeness.sort(dim=-1, descending=True, stable=True).indices
        q_index[:, i : i + n, :size] = torch.where(place[:1] < count, order, -1)


def rank_keys(means: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """int32 (S, H, L): per segment, positions of what precedes it by `mean . k`, ties to the earlier key.

    NaN counts as the lowest number. Places after a sample's last list hold 0.

    Args:
        means: (S, H, n, D). k: (S, G, K, D).
    """
    starts, room = segments.geometry.kv_start, max(segments.room, 1)
    keys = torch.zeros(*means.shape[:2], room, dtype=torch.int32, device=k.device)
    if runs_triton(k.device):
        from sparsekit.kernels.select.ranking_triton import LONGEST, rank_keys_triton

        if segments.longest <= LONGEST:
            rank_keys_triton(means, k, segments, keys)
            return keys
    for b, (rows, ptr) in enumerate(zip(segments.rows, segments.ptr, strict=True)):
        _rank_keys(means[b], k[b, :, starts[b] :], rows, ptr, segments.size, keys[b])
    return keys


def _rank_keys(means: Tensor, k: Tensor, rows: list[list[int]], ptr: list[int], size: int, keys: Tensor) -> None:
    """Fills in keys (H, L) of one sample: per segment, what precedes it by `mean . k`, ties to the earlier key.

    Args:
        means: (H, n, D). k: (G, K, D), from position 0 on. size: tokens of a segment.
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
    """float32 (H, n, w): means (H, n, D) times the keys (G, w, D) of each head's key head."""
    heads, n, _ = means.shape
    rows = means.unflatten(0, (len(keys), -1)).flatten(1, 2)
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

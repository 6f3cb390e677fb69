"""What the queries of a block, one by one, make of a block's mean key; and the choice by a share of a row's largest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.block_scores import row_groups
from sparsekit.kernels.select.grid import BlockGrid
from sparsekit.kernels.select.topk import _check_row, _check_scores

__all__ = ["near_top_bits", "query_block_lse"]


def query_block_lse(
    q: Tensor,
    k_means: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    softmax: Softmax,
    first_row: int = 0,
    n_rows: int | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """`log sum exp z(i, c)` over the queries i of a block that exist; z: logit of query i and the mean key of block c.

    The logit is scaled and soft-capped; a sink logit weighs all blocks alike, and is left out.

    Args:
        q: (B, H, Q, D). Any strides, the last 1.
        k_means: (B, G, C, D), of `pooled_means`; on the Triton path multiplied in q's dtype.
        grid: `block_grid(geometry, block_tokens, B, device)`.
        first_row, n_rows: the pattern rows wanted, default all.

    Returns:
        float32 (B, H, n_rows, C), natural logarithms. Columns ahead of a row (`grid.lengths`) are -inf on the torch
        path, and hold anything on the Triton path.
    """
    n_rows = grid.rows - first_row if n_rows is None else n_rows
    if runs_triton(q.device, impl):
        from sparsekit.kernels.select.mean_keys_triton import query_block_lse_triton

        return query_block_lse_triton(q, k_means, geometry, grid, block_tokens, softmax, first_row, n_rows)
    heads, key_heads = q.shape[1], k_means.shape[1]
    out = q.new_full((*q.shape[:2], n_rows, grid.columns), -torch.inf, dtype=torch.float32)
    for b, span in enumerate(geometry.spans):
        means = k_means[b, :, None].float().transpose(-1, -2)  # (G, 1, D, C)
        for at, rows in row_groups(n_rows, heads * block_tokens * grid.columns * 4):
            first = span.q_first // block_tokens + first_row + at
            begin, end = first * block_tokens, (first + rows) * block_tokens
            low, high = max(begin, span.q_first), min(end, span.q_end)
            if low >= high:
                continue
            there = torch.arange(begin, end, device=q.device)
            there = (there >= low) & (there < high)
            index = geometry.q_index(b, low)
            queries = pad(q[b, :, index : index + high - low].float(), (0, 0, low - begin, end - high))
            z = softmax.logits((queries.unflatten(0, (key_heads, -1)) @ means).flatten(0, 1))
            z = z.masked_fill(~there[:, None], -torch.inf)
            out[b, :, at : at + rows] = z.unflatten(1, (rows, block_tokens)).logsumexp(2)
    ahead = torch.arange(grid.columns, device=q.device) >= grid.lengths[:, :, first_row : first_row + n_rows, None]
    return out.masked_fill_(ahead, -torch.inf)


def near_top_bits(
    scores: Tensor,
    margin: float,
    *,
    lengths: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    impl: str | None = None,
) -> Tensor:
    """The columns whose score is at least the row's largest less `margin`. No sort, no sum.

    Of logarithms, a margin of `-log(share)` is a share of the largest. `-inf` and NaN are never selected by score.

    Args:
        scores: float32 (..., C), contiguous; on CUDA at most 2^15 columns.
        lengths: int32 broadcastable to `scores.shape[:-1]`: columns from there on do not exist, whatever they hold.
        first, last: so many columns at the row's beginning, and before `lengths`, are selected whatever their score.

    Returns:
        int32 (..., ceil(C / 32)), bit c % 32 of word c // 32; on the same scores the same on both paths.
    """
    _check_scores(scores)
    if runs_triton(scores.device, impl):
        _check_row(scores)
        from sparsekit.kernels.select.mean_keys_triton import near_top_bits_triton

        return near_top_bits_triton(scores, margin, lengths, first, last)
    column = torch.arange(scores.shape[-1], device=scores.device)
    if lengths is None:
        lengths = torch.full((), scores.shape[-1], dtype=torch.int32, device=scores.device)
    length = lengths.expand(scores.shape[:-1])[..., None]
    ranked = torch.where((column < length) & (scores > -torch.inf), scores, -torch.inf)
    near = (ranked > -torch.inf) & (ranked >= ranked.amax(-1, keepdim=True) - margin)
    return pack_bits(near | (((column < first) | (column >= length - last)) & (column < length)))

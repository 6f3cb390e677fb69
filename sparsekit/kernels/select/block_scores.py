"""What a block of queries makes of a block of keys, for the patterns that choose key blocks.

Pooled: the product of the blocks' means. Antidiagonal: the softmax mass of strided antidiagonal logits. Scores of all
heads at 1M tokens fit no memory, so callers walk `row_groups` and select from one before the next is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.grid import BlockGrid

__all__ = ["SCRATCH_BYTES", "antidiagonal_mass", "pooled_means", "pooled_scores", "row_groups"]

# Scores that are in memory at once, of all heads; at 128K tokens those of 64-token blocks are one group.
SCRATCH_BYTES = 1 << 29
GROUP_STEP = 16  # rows: 128 stride rows of 16, one tile of the antidiagonal kernel


def row_groups(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of groups whose scores, `row_bytes` each, fit `SCRATCH_BYTES`; all but the last are alike."""
    most = max(SCRATCH_BYTES // row_bytes, 1)
    size = -(-rows // -(-rows // most))  # as equal as they come: a short last group leaves processors idle
    size = min(-(-size // GROUP_STEP) * GROUP_STEP, max(most // GROUP_STEP * GROUP_STEP, 1))
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


# ---- pooled


def pooled_means(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    *,
    half: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean query and mean key of every block, over the positions that exist: true counts at both ends.

    Args:
        q: (B, H, Q, D). k: (B, G, K, D). Any strides, the last 1.
        grid: `block_grid(geometry, block_tokens, B, device)`.
        half: on CUDA, float16: the 11 bits of a factor that tf32 keeps, in half the bytes. A finite mean beyond its
            range becomes its largest.

    Returns:
        float32 (B, H, Rb, D) and (B, G, C, D); 0 where a block holds nothing. Keys after a sample's last query are not
        among them.
    """
    if runs_triton(q.device, impl):
        from sparsekit.kernels.select.block_scores_triton import pooled_means_triton

        return pooled_means_triton(q, k, geometry, grid, block_tokens, half)
    mean_q = q.new_zeros(*q.shape[:2], grid.rows, q.shape[3], dtype=torch.float32)
    mean_k = k.new_zeros(*k.shape[:2], grid.columns, k.shape[3], dtype=torch.float32)
    for b, span in enumerate(geometry.spans):
        if span.q_first == span.q_end:
            continue
        at = geometry.q_index(b, span.q_first)
        queries = q[b, :, at : at + span.q_end - span.q_first]
        keys = k[b, :, geometry.kv_start[b] : geometry.kv_start[b] + span.q_end]
        for out, x, lead in ((mean_q[b], queries, span.q_first % block_tokens), (mean_k[b], keys, 0)):
            blocks = -(-(lead + x.shape[1]) // block_tokens)
            spare = blocks * block_tokens - lead - x.shape[1]
            total = pad(x.float(), (0, 0, lead, spare)).unflatten(1, (blocks, block_tokens)).sum(2)
            place = torch.arange(blocks, device=q.device) * block_tokens
            count = (place + block_tokens).clamp(max=lead + x.shape[1]) - place.clamp(min=lead)
            out[:, :blocks] = total / count[:, None]
    return mean_q, mean_k


def pooled_scores(
    q_means: Tensor,
    k_means: Tensor,
    grid: BlockGrid,
    block_tokens: int,
    first_row: int = 0,
    n_rows: int | None = None,
    *,
    exact: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Products of mean queries and mean keys (MInference's block-sparse score; a scale would not change its order).

    Args:
        q_means, k_means: of `pooled_means`.
        first_row, n_rows: the pattern rows wanted, default all.
        exact: on CUDA, False multiplies float32 means in tf32; float16 ones are multiplied as they are.

    Returns:
        float32 (B, H, n_rows, C). Columns ahead of a row (`grid.lengths`) are -inf on the torch path, and hold anything
        on the Triton path.
    """
    n_rows = grid.rows - first_row if n_rows is None else n_rows
    if runs_triton(q_means.device, impl):
        from sparsekit.kernels.select.block_scores_triton import pooled_scores_triton

        return pooled_scores_triton(q_means, k_means, grid, block_tokens, first_row, n_rows, exact)
    rows = slice(first_row, first_row + n_rows)
    grouped = q_means[:, :, rows].unflatten(1, (k_means.shape[1], -1))
    scores = (grouped.float() @ k_means[:, :, None].float().transpose(-1, -2)).flatten(1, 2)
    ahead = torch.arange(grid.columns, device=scores.device) >= grid.lengths[:, :, rows, None]
    return scores.masked_fill(ahead, float("-inf"))


# ---- antidiagonal


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    stride: int,
    softmax: Softmax,
    first_row: int = 0,
    n_rows: int | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Softmax mass of each query block on each key block, seen through antidiagonals (XAttention, algorithm 1).

    Positions fall into strides of `stride`. The logit of stride row i and stride column j is the mean over s of
    `scale * q[stride * i + stride - 1 - s] . k[stride * j + s]`; the softmax of a stride row is over the columns
    j <= i, and its sums over the columns of each key block are added up over the rows of a query block. Queries and
    keys that do not exist add nothing, and the mean of a row is over the queries it has. The soft-cap is applied to
    the mean; the sink logit joins the softmax as one key among the `stride` that a logit stands for.

    Args:
        q: (B, H, Q, D). k: (B, G, K, D). Any strides, the last 1.
        grid: `block_grid(geometry, block_tokens, B, device)`.
        stride: divides `block_tokens`.
        first_row, n_rows: the pattern rows wanted, default all.

    Returns:
        float32 (B, H, n_rows, C). Columns ahead of a row (`grid.lengths`) are 0 on the torch path, and hold anything on
        the Triton path.
    """
    n_rows = grid.rows - first_row if n_rows is None else n_rows
    if runs_triton(q.device, impl):
        from sparsekit.kernels.select.block_scores_triton import antidiagonal_mass_triton

        return antidiagonal_mass_triton(q, k, geometry, grid, block_tokens, stride, softmax, first_row, n_rows)
    per = block_tokens // stride
    out = q.new_zeros(*q.shape[:2], n_rows, grid.columns, dtype=torch.float32)
    for b, span in enumerate(geometry.spans):
        first = span.q_first // block_tokens + first_row
        low, high = max(first * block_tokens, span.q_first), min((first + n_rows) * block_tokens, span.q_end)
        if low >= high:
            continue
        blocks = -(-high // block_tokens)
        at = geometry.q_index(b, low)
        lead, spare = low - first * block_tokens, blocks * block_tokens - high
        rows = pad(q[b, :, at : at + high - low].float(), (0, 0, lead, spare))  # (H, rows, D), on the grid
        rows = rows.unflatten(1, (-1, stride)).flip(2).flatten(2)  # (H, n, stride * D)
        keys = k[b, :, geometry.kv_start[b] : geometry.kv_start[b] + high].float()
        keys = pad(keys, (0, 0, 0, blocks * block_tokens - high)).unflatten(1, (-1, stride)).flatten(2)
        row = torch.arange(rows.shape[1], device=q.device)[:, None] + first * per
        queries = ((row + 1) * stride).clamp(max=high) - (row * stride).clamp(min=low)  # (n, 1)
        logits = (rows.unflatten(0, (keys.shape[0], -1)) @ keys[:, None].transpose(-1, -2)).flatten(0, 1)
        logits = logits * (softmax.scale / queries.clamp(min=1))
        logits = softmax.capped(logits).masked_fill(torch.arange(keys.shape[1], device=q.device) > row, float("-inf"))
        norm = logits.logsumexp(-1, keepdim=True)
        if softmax.sink_logits is not None:
            sinks = softmax.sink_logits.float()[:, None, None] - math.log(stride)
            norm = torch.logaddexp(norm, sinks)
        weights = torch.exp(logits - norm) * (queries > 0)
        mass = weights.unflatten(2, (-1, per)).sum(-1).unflatten(1, (-1, per)).sum(2)
        out[b, :, : mass.shape[1], : mass.shape[2]] = mass
    return out

"""What the last queries of a call attend to: their softmax, summed by key and by distance. One read of k, or two."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton

__all__ = ["MAX_QUERIES", "last_query_sums"]

MAX_QUERIES = 128


def last_query_sums(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    softmax: Softmax,
    queries: int,
    *,
    force_columns: int = 0,
    force_distances: int = 0,
    impl: str | None = None,
) -> Tensor:
    """Column and distance sums of the softmax that each sample's last valid queries of this call have over all keys.

    With P the softmax of those n = min(queries, valid queries) rows, as it will be computed (scale, soft-cap, sink
    logit in the denominator), `sums[0, s, h, j] = sum_i P[i, j]` and `sums[1, s, h, d] = sum_i P[i, i - d]`. The order
    of every addition is fixed, so equal inputs give equal bits.

    Args:
        q: (B, H, Q, D). k: (B, G, K, D), never repeated in memory.
        queries: rows to sum over, 1 to 128.
        force_columns, force_distances: the first positions, and the nearest distances, that hold `inf` instead, so that
            a top-k keeps them.

    Returns:
        float32 (2, B, H, N), N the largest `q_end` of the samples: columns, then distances, by position. 0 past a
        sample's own last query.

    float32 on a GPU runs the torch path for head sizes above 64 (128 for up to 64 queries): the tile of the Triton
    path does not fit the processor's shared memory.

    Raises:
        SparsekitError: `queries` out of range, or `impl` cannot run here, or this.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise SparsekitError(f"queries={queries}: 1 to {MAX_QUERIES} of the last queries.")
    covered = _fits(q, queries)
    if impl == "triton" and not covered:
        raise SparsekitError(
            f"impl='triton': {queries} last queries of head size {q.shape[3]} in {q.dtype} do not fit."
        )
    if covered and runs_triton(q.device, impl):
        from sparsekit.kernels.select.last_queries_triton import last_query_sums_triton

        return last_query_sums_triton(q, k, geometry, softmax, queries, force_columns, force_distances)
    heads, most = q.shape[1], max(max(span.q_end for span in geometry.spans), 1)
    sums = torch.zeros(2, geometry.batch, heads, most, dtype=torch.float32, device=q.device)
    for b, span in enumerate(geometry.spans):
        n = min(queries, span.q_end - span.q_first)
        if n:
            weights = _weights(q, k, geometry, softmax, b, n)
            sums[0, b, :, : span.q_end] = weights.sum(1)
            sums[1, b, :, : span.q_end] = _by_distance(weights).sum(1)
        sums[0, b, :, : min(force_columns, span.q_end)] = torch.inf
        sums[1, b, :, : min(force_distances, span.q_end)] = torch.inf
    return sums


def _fits(q: Tensor, queries: int) -> bool:
    """Whether a tile fits a processor's shared memory; float32 is multiplied in three parts of twice the size."""
    padded, size = 1 << (q.shape[3] - 1).bit_length(), q.element_size()
    return padded * size * size <= (2048 if queries <= 64 else 1024)


def _weights(q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax, b: int, n: int) -> Tensor:
    """(H, n, q_end): the softmax of the last n queries of sample b."""
    span, group = geometry.spans[b], q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    row, key = geometry.q_index(b, span.q_end - n), geometry.kv_start[b]
    rows = q[b, :, row : row + n].to(wide).unflatten(0, (-1, group))  # (G, H / G, n, D)
    keys = k[b, :, key : key + span.q_end].to(wide)
    z = (rows.flatten(1, 2) @ keys.mT).view(q.shape[1], n, span.q_end)
    position = torch.arange(span.q_end, device=q.device)
    future = position > position[span.q_end - n :, None]
    z = softmax.logits(z).masked_fill(future, -torch.inf)
    lse = z.logsumexp(-1, keepdim=True)
    if softmax.sink_logits is not None:
        lse = torch.logaddexp(lse, softmax.sink_logits.to(wide)[:, None, None])
    return torch.exp(z - lse).masked_fill(future, 0)


def _by_distance(weights: Tensor) -> Tensor:
    """(H, n, N) weights of the last n of N queries, by key -> by distance: element (r, d) is key `N - n + r - d`."""
    heads, n, tokens = weights.shape
    width = tokens + n - 1
    # Keys backwards: distance d of query r is at d + n - 1 - r.
    reversed_ = torch.nn.functional.pad(weights.flip(-1), (0, n - 1)).contiguous()
    return reversed_.as_strided((heads, n, tokens), (n * width, width - 1, 1), n - 1)

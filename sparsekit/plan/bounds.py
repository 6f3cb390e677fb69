"""A geometry's numbers as tensors: where the rows of a plan, and the samples of a call, begin and end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry

__all__ = [
    "anchor_positions",
    "causal_tiles",
    "key_bounds",
    "row_bounds",
    "row_starts",
    "segment_bounds",
    "span_numbers",
    "upload",
]

# Rows are those of `samples` plan samples, 1 for a batch of samples that are all alike. int64 unless said otherwise.


def row_starts(geometry: Geometry, samples: int, device: torch.device | str = "cpu") -> Tensor:
    """(S, R): position at which each query tile starts."""
    firsts = [[span.q_first // geometry.block_q] for span in geometry.spans[:samples]]
    first = torch.tensor(firsts, dtype=torch.int64, device=device)
    return (first + torch.arange(geometry.rows, dtype=torch.int64, device=device)) * geometry.block_q


def anchor_positions(geometry: Geometry, samples: int) -> Tensor:
    """(S, q_rows) on the CPU, of a geometry with a `q_step`: the position of each row of q; -1 where it has none."""
    spans, step = torch.tensor(geometry.spans[:samples], dtype=torch.int64, device="cpu"), geometry.q_step
    first, end = spans[:, :1], spans[:, 1:2]
    block = first // step + torch.arange(geometry.q_rows, dtype=torch.int64, device="cpu")
    position = torch.maximum(block * step, first)
    return torch.where(position < end, position, -1)


@per_geometry
def row_bounds(geometry: Geometry, samples: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(S, R) each: a row's first query, one past its last, the tiles and the keys that dense attention visits."""
    spans = torch.tensor(geometry.spans[:samples], dtype=torch.int64, device="cpu")
    if geometry.q_step > 1:
        each = anchor_positions(geometry, samples)
        each = pad(each, (0, geometry.rows * geometry.block_q - each.shape[1]), value=-1)
        each = each.unflatten(1, (-1, geometry.block_q))
        low, high = each[..., 0].clamp(min=0), each.amax(-1) + 1
    else:
        start = row_starts(geometry, samples)
        low = torch.maximum(start, spans[:, :1])
        high = torch.minimum(start + geometry.block_q, spans[:, 1:2]).maximum(low)
    tiles = torch.where(high > low, -(-high // geometry.block_kv), 0)
    keys = spans[:, 2:3].expand(samples, geometry.rows)
    return upload(low, device), upload(high, device), upload(tiles, device), upload(keys, device)


def causal_tiles(geometry: Geometry, samples: int) -> Tensor:
    """(S, R) on the CPU: tiles of `block_kv` keys that dense attention visits in a row; 0 past a sample's last row."""
    return row_bounds(geometry, samples, torch.device("cpu"))[2]


@per_geometry
def segment_bounds(
    geometry: Geometry, samples: int, segment_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(S, n) each: a segment's first position, its first query in this call, one past the last (equal: none)."""
    spans = torch.tensor(geometry.spans[:samples], dtype=torch.int64, device="cpu")
    begins, ends = spans[:, :1] // segment_tokens, -(-spans[:, 1:2] // segment_tokens)
    most = max(int((ends - begins).max()), 1)
    first = (begins + torch.arange(most, dtype=torch.int64, device="cpu")) * segment_tokens
    low = torch.maximum(first, spans[:, :1])
    high = torch.minimum(first + segment_tokens, spans[:, 1:2]).maximum(low)
    return upload(first, device), upload(low, device), upload(high, device)


@per_geometry
def span_numbers(geometry: Geometry, samples: int, device: torch.device, behind: int = 0) -> Tensor:
    """int32 (S, 4): q_first, q_end, keys, kv_start. One copy a geometry, which a forward's layers share.

    `behind`: as if each sample's last so many queries did not exist.
    """
    rows = [
        [span.q_first, max(span.q_end - behind, span.q_first), span.keys, start]
        for span, start in zip(geometry.spans[:samples], geometry.kv_start, strict=False)
    ]
    return upload(torch.tensor(rows, dtype=torch.int32, device="cpu"), device)


@per_geometry
def key_bounds(geometry: Geometry, device: torch.device) -> Tensor:
    """int32 (B, 2): kv_start, and the last valid position; -1 where there is none."""
    bounds = [(start, end - start - 1) for start, end in zip(geometry.kv_start, geometry.kv_end, strict=True)]
    return upload(torch.tensor(bounds, dtype=torch.int32, device="cpu"), device)


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`. From the CPU to a GPU from pinned memory, since a pageable copy makes the host wait."""
    if values.device.type != "cpu" or torch.device(device).type != "cuda":
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)

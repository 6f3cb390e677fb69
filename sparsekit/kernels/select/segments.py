"""The segments of a call, each with a list of earlier keys, in host numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.plan import segment_bounds, upload

__all__ = ["KEY_TILE", "Segments", "segments_of", "turns_of"]

KEY_TILE = 64  # keys that are gathered together, and after which the stop is looked at


class Segments(NamedTuple):
    """Segments of `size` positions, n of each of S samples, and the lists of what is ranked for them.

    Attributes:
        rows: per sample and segment: first position, first query, one past the last query; equal: it has none.
        ptr: per sample, n + 1 numbers: where each segment's list starts.
        key_ptr: the same, int64 (S, n + 1), on the device.
        room, longest: keys of a sample's lists together, and of a single one, at most.
    """

    geometry: Geometry
    size: int
    rows: list[list[list[int]]]
    ptr: list[list[int]]
    key_ptr: Tensor
    room: int
    longest: int


@per_geometry
def segments_of(geometry: Geometry, size: int, max_tokens: int | None, device: torch.device) -> Segments:
    """The segments of a call; each ranks the keys before it but the first KEY_TILE, and lists `max_tokens` of them."""
    bounds = segment_bounds(geometry, geometry.batch, size, torch.device("cpu"))
    first, low, high = bounds
    counts = (first - KEY_TILE).clamp(min=0, max=max_tokens) * (low < high)
    ptr = pad(counts.cumsum(1), (1, 0))
    rows = torch.stack(bounds, -1).tolist()
    room, longest = int(ptr[:, -1].max()), int(counts.max())
    return Segments(geometry, size, rows, ptr.tolist(), upload(ptr, device), room, longest)


@per_geometry
def turns_of(
    geometry: Geometry, size: int, heads: int, step: int, spare: int, limit: int
) -> tuple[tuple[int, int, int], ...]:
    """(first segment, one past the last, numbers a row) of neighbours whose rows take at most `limit` numbers together.

    A row is one segment of one head and sample: the keys before it but the first KEY_TILE, rounded up to `step`, and
    `spare` numbers more. A segment without such keys is in no turn, and one alone may pass the limit.
    """
    first, low, high = segment_bounds(geometry, geometry.batch, size, torch.device("cpu"))
    longest = ((first - KEY_TILE) * (low < high)).amax(0).tolist()
    turns, a, b = [], 0, 0
    while a < len(longest):
        b = a + 1
        if longest[a] > 0:
            while b < len(longest) and longest[b] > 0:
                width = -(-max(longest[a : b + 1]) // step) * step + spare
                if geometry.batch * heads * (b + 1 - a) * width > limit:
                    break
                b += 1
            turns.append((a, b, -(-max(longest[a:b]) // step) * step + spare))
        a = b
    return tuple(turns)

"""What a selection owes to the geometry alone: the grids on which patterns decide, and what they may list."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import TILES, Geometry
from sparsekit.errors import SparsekitError
from sparsekit.plan import causal_tiles, span_numbers, upload

__all__ = ["BLOCK", "BlockGrid", "Budgets", "Form", "SlashGrid", "block_grid", "head_lengths", "slash_grid"]


class BlockGrid(NamedTuple):
    """How a pattern's blocks lie in a call: host integers and small tensors, the same for all layers of a forward."""

    plan: Geometry  # cut into the plan's tile
    spans: Tensor  # int32 (S, 4): q_first, q_end, keys, kv_start
    causal: Tensor  # int32 (S, R): tiles that dense attention visits in each plan row
    lengths: Tensor  # int32 (S, 1, Rb): key blocks that pattern row r may attend, its own included; 0 past the last row
    rows: int  # Rb, pattern rows of a sample
    columns: int  # C, key blocks
    causal_tiles: int  # sum of `causal`


@per_geometry
def block_grid(geometry: Geometry, block_tokens: int, samples: int, device: torch.device) -> BlockGrid:
    """The grid of `block_tokens` positions on which a pattern decides, and the plan's tiles over it.

    Uploaded once a geometry, from pinned memory: no wait.

    Raises:
        SparsekitError: `block_tokens` is no tile size, or `samples` neither the batch nor 1 for samples all alike.
    """
    if block_tokens not in TILES:
        raise SparsekitError(f"block_tokens={block_tokens}: one of {', '.join(map(str, TILES))}.")
    if samples != geometry.batch and (samples != 1 or not geometry.uniform):
        alike = "1 or " if geometry.uniform else ""
        raise SparsekitError(f"{samples} plan samples: {alike}{geometry.batch} for this batch.")
    cut = geometry.with_tile(geometry.block_q, min(block_tokens, geometry.block_kv))
    spans, causal = cut.spans[:samples], causal_tiles(cut, samples)
    rows = max(max(-(-s.q_end // block_tokens) - s.q_first // block_tokens for s in spans), 1)
    lengths = torch.zeros(len(spans), 1, rows, dtype=torch.int64, device="cpu")
    for s, span in enumerate(spans):
        if span.q_end > span.q_first:
            first = span.q_first // block_tokens
            own = torch.arange(first, first + rows, device="cpu")
            lengths[s, 0] = torch.where(own <= (span.q_end - 1) // block_tokens, own + 1, 0)
    columns = max(-(-max(span.q_end for span in spans) // block_tokens), 1)
    there, held = (upload(t.to(torch.int32), device) for t in (causal, lengths))
    return BlockGrid(cut, span_numbers(cut, samples, device), there, held, rows, columns, int(causal.sum()))


@per_geometry
def head_lengths(geometry: Geometry, block_tokens: int, samples: int, heads: int, device: torch.device) -> Tensor:
    """int32 (S, heads, Rb): `block_grid(...).lengths`, a copy for each head."""
    lengths = block_grid(geometry, block_tokens, samples, device).lengths
    return lengths.expand(-1, heads, -1).contiguous()


def rows_that_fit(counts: Tensor, causal: Tensor, capacity: int) -> Tensor:
    """bool like counts: the rows that stay listed, sparsest first, so that all their entries fit `capacity`."""
    flat = counts.flatten()
    order = torch.argsort(flat / causal.flatten().clamp(min=1), stable=True)
    fits = flat[order].cumsum(0) <= capacity
    return torch.zeros_like(fits).scatter_(0, order, fits).view(counts.shape)


class SlashGrid(NamedTuple):
    """What a plan owes to the geometry alone: the same for all layers of a forward. S is the batch."""

    plan: Geometry  # cut into the plan's tile
    spans: Tensor  # int32 (S, 4): q_first, q_end, keys, kv_start
    causal: Tensor  # int32 (S, R): tiles that dense attention visits
    order: Tensor  # int32 (S * R,)
    room: int  # entries of a head at most


@per_geometry
def slash_grid(geometry: Geometry, block_kv: int, slashes: int, device: torch.device) -> SlashGrid:
    """The rows of a call and what they may list at most. Uploaded once a geometry, from pinned memory: no wait."""
    cut = geometry.with_tile(geometry.block_q, block_kv)
    causal = causal_tiles(cut, geometry.batch)
    # A diagonal of one row lies in so many tiles, and a cover with the fewest tiles has no more than any other.
    most = slashes * -(-cut.block_q // block_kv)
    # A row's tiles grow with its distance from the first key.
    order = torch.argsort(causal.flatten(), descending=True, stable=True)
    there, first = (upload(t.to(torch.int32), device) for t in (causal, order))
    room = int(causal.clamp(max=most).sum())
    return SlashGrid(cut, span_numbers(cut, geometry.batch, device), there, first, room)


def fit(counts: Tensor, grid: SlashGrid, limit: int) -> Tensor | None:
    """bool like counts (S, H, R): rows that run dense so that the others' entries fit; None where all must fit."""
    if grid.room * counts.shape[1] <= limit:
        return None
    return ~rows_that_fit(counts, grid.causal[:, None].expand(counts.shape), limit)


class Form(NamedTuple):
    """Rows of the joined plan: (S, H, R)."""

    samples: int
    heads: int
    rows: int

    @property
    def total(self) -> int:
        return self.samples * self.heads * self.rows


BLOCK = 128  # tokens
CODES = 4096  # 32 octaves, 2^-24 to 2^8, of 128 steps
LOWEST = (127 - 24) << 7  # exponent and first 7 bits of the mantissa of 2^-24; what is less has no mass


class Budgets(NamedTuple):
    """What a head may and must keep; `blocks` are of 128 tokens."""

    gamma: float
    tau: float
    min_blocks: int
    max_blocks: int

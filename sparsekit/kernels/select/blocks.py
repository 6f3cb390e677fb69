"""Block bits -> BlockPlan."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import WORD, unpack_bits
from sparsekit.kernels.select.grid import BlockGrid, block_grid, rows_that_fit
from sparsekit.plan import CAUSAL, BlockPlan, pack

__all__ = ["CAPACITY", "plan_from_block_bits"]

# Entries that a plan has room for, 1 GiB. All causal 128 x 64 tiles of 32 heads take 1/8 of it at 128K tokens; at 1M
# tokens it holds an eighth of them.
CAPACITY = 1 << 28


def plan_from_block_bits(
    bits: Tensor,
    geometry: Geometry,
    block_tokens: int,
    *,
    capacity: int | None = None,
    row_blocks: int | None = None,
    impl: str | None = None,
) -> BlockPlan:
    """The plan in which the queries of each block attend the key blocks whose bits are set.

    Blocks are `block_tokens` positions, their grid starts at position 0. Key blocks after a row's own are dropped and
    its own is always kept, whatever the bits say. A plan row that holds several pattern rows keeps what any of them
    keeps. The plan's tile is `(geometry.block_q, min(block_tokens, geometry.block_kv))`. A row that keeps every causal
    tile is DENSE by bounds. The plan names no launch order: the last rows, which may keep most, go first.

    Args:
        bits: int32 (S, P, Rb, W), contiguous. S is the batch, or 1 if all samples are alike. Row r is block
            `q_first // block_tokens + r` of its sample. Bit c % 32 of word c // 32: it attends key block c.
        capacity: entries that the plan has room for, default what all causal tiles take, at most `CAPACITY`. Where the
            rows list more, the densest of them run DENSE by bounds.
        row_blocks: the caller knows that no row has more bits set than this, so less room will do.

    Raises:
        SparsekitError: bits of another shape or type, or a capacity that int32 cannot count.
    """
    if bits.ndim != 4 or bits.dtype != torch.int32 or not bits.is_contiguous():
        raise SparsekitError(
            f"bits {tuple(bits.shape)} {bits.dtype}: want contiguous int32 (samples, heads, rows, words)."
        )
    samples, heads = bits.shape[:2]
    grid = block_grid(geometry, block_tokens, samples, bits.device)
    words = -(-grid.columns // WORD)
    if bits.shape[2] < grid.rows or bits.shape[3] < words:
        raise SparsekitError(
            f"bits {tuple(bits.shape)}: {grid.rows} rows and {words} words at least, for blocks of {block_tokens}."
        )
    limit = CAPACITY if capacity is None else capacity
    if not 0 <= limit < 2**31:
        raise SparsekitError(f"capacity={capacity}: 0 to {2**31 - 1} entries.")
    room = grid.causal_tiles * heads
    if row_blocks is not None:  # and the row's own block, of each pattern row that a plan row holds
        in_row = max(grid.plan.block_q // block_tokens, 1) * (row_blocks + 1) * (block_tokens // grid.plan.block_kv)
        room = min(room, samples * heads * grid.plan.rows * in_row)
    if runs_triton(bits.device, impl):
        from sparsekit.kernels.select.blocks_triton import plan_from_bits_triton

        return plan_from_bits_triton(bits, grid, block_tokens, room, limit)
    kept = _tiles_of_bits(bits, grid, block_tokens)  # (S, P, R, T)
    counts = kept.sum(-1)
    causal = grid.causal[:, None].expand(counts.shape)
    dense = (counts == causal) & (causal > 0)
    if room > limit:
        dense = dense | ~rows_that_fit(torch.where(dense, 0, counts), causal, limit)
    kept = kept & ~dense[..., None]
    tile = torch.arange(kept.shape[-1], device=bits.device) * grid.plan.block_kv
    low = torch.maximum(_row_starts(grid), grid.spans[:, :1])[:, None, :, None]
    flags = (tile + grid.plan.block_kv - 1 > low).long() * CAUSAL
    entries = pack(tile, flags).expand_as(kept)[kept]
    row_ptr = torch.nn.functional.pad(kept.sum(-1).flatten().cumsum(0), (1, 0))
    return BlockPlan(
        grid.plan,
        samples=samples,
        heads=heads,
        row_ptr=row_ptr.to(torch.int32),
        entries=entries.to(torch.int32),
        dense_rows=dense.flatten(),
        on_grid=True,
    )


def _row_starts(grid: BlockGrid) -> Tensor:
    """int32 (S, R): position at which each plan row starts."""
    row = torch.arange(grid.plan.rows, dtype=torch.int32, device=grid.spans.device)
    return (grid.spans[:, :1] // grid.plan.block_q + row) * grid.plan.block_q


def _tiles_of_bits(bits: Tensor, grid: BlockGrid, block_tokens: int) -> Tensor:
    """bool (S, P, R, T): the plan's tiles that the block bits keep."""
    block_q, block_kv, device = grid.plan.block_q, grid.plan.block_kv, bits.device
    own = grid.lengths - 1  # (S, 1, Rb); -1 past the last row
    column = torch.arange(grid.columns, device=device)
    blocks = unpack_bits(bits[:, :, : grid.rows], grid.columns) & (column <= own[..., None])
    blocks = blocks | (column == own[..., None])
    start, first = _row_starts(grid), grid.spans[:, :1] // block_tokens
    union = torch.zeros(*bits.shape[:2], grid.plan.rows, grid.columns, dtype=torch.bool, device=device)
    for part in range(0, block_q, min(block_tokens, block_q)):
        row = (start + part) // block_tokens - first  # (S, R)
        inside = (row >= 0) & (row < grid.rows)
        at = row.clamp(0, grid.rows - 1).long()[:, None, :, None].expand(-1, bits.shape[1], -1, grid.columns)
        union |= blocks.gather(2, at) & inside[:, None, :, None]
    tiles = union.repeat_interleave(block_tokens // block_kv, -1)
    return tiles & (torch.arange(tiles.shape[-1], device=device) < grid.causal[:, None, :, None])

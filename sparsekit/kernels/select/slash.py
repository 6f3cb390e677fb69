"""Chosen columns and diagonals -> a plan: the fewest tiles that hold the diagonals, and single columns beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import pack_bits, unpack_bits
from sparsekit.kernels.select.grid import SlashGrid, fit, slash_grid
from sparsekit.plan import CAUSAL, BlockPlan, pack

__all__ = ["CAPACITY", "plan_from_vertical_slash"]

# Entries that a plan has room for, 1 GiB. At 128K tokens and 32 heads all causal tiles of 64 keys need an eighth.
CAPACITY = 1 << 28
# Rows of 64 queries are listed a second time, two by two, where two of them share what they read: past so many entries
# (32 MiB) a plan has room for half of what its rows might list, and the other half of that memory is for that list.
PAIRED_ROWS = 64
SMALL = 1 << 23
NO_TOKEN = 2**31 - 1


def plan_from_vertical_slash(
    bits: Tensor,
    geometry: Geometry,
    columns: int,
    slashes: int,
    block_kv: int,
    *,
    capacity: int | None = None,
    impl: str | None = None,
) -> BlockPlan:
    """The plan of chosen key columns and distances of each head.

    In a row, distance d of queries low..high touches the keys `low - d .. high - d`. The row lists the fewest tiles of
    `block_kv` keys that hold all keys so touched: each starts at the first that no earlier one holds. Tiles are kept
    whole, causality apart; a tile may hold keys between two diagonals. Chosen columns that no tile of the row holds
    are single columns. Where the listed tiles do not fit `capacity`, the densest rows run DENSE by bounds.

    Args:
        bits: int32 (2, B, H, W), contiguous: bit j % 32 of word j // 32 says that column j, and that distance j, is
            chosen; of distances, 0 must be. Bits past a sample's last query are ignored.
        columns, slashes: no head has more of them.
        block_kv: keys of the plan's tiles.
        capacity: entries that the plan has room for, default what the rows can list, at most `CAPACITY`; of rows of
            64 queries half of that, but no fewer than `SMALL`.

    Raises:
        SparsekitError: bits of another shape or type; distance 0 missing (looked at on a CPU only: a look at a GPU's
            bits would wait for it, and there it counts as chosen).
    """
    batch, words = geometry.batch, -(-max(max(span.q_end for span in geometry.spans), 1) // 32)
    fits = bits.ndim == 4 and bits.shape[0] == 2 and bits.shape[1] == batch and bits.shape[3] >= words
    if not fits or bits.dtype != torch.int32 or not bits.is_contiguous():
        raise SparsekitError(
            f"bits {tuple(bits.shape)} {bits.dtype}: want contiguous int32 (2, {batch}, heads, {words} words)."
        )
    grid = slash_grid(geometry, block_kv, slashes, bits.device)
    limit = _capacity(grid, bits.shape[2]) if capacity is None else capacity
    if not 0 <= limit < 2**31:
        raise SparsekitError(f"capacity={capacity}: 0 to {2**31 - 1} entries.")
    if bits.device.type == "cpu" and not bool((bits[1, ..., 0] & 1).all()):
        raise SparsekitError("distance 0 is missing from the chosen diagonals: every query keeps itself.")
    if runs_triton(bits.device, impl):
        from sparsekit.kernels.select.slash_triton import plan_triton

        return plan_triton(bits, grid, columns, limit)
    return _plan(bits, grid, columns, limit)


def _capacity(grid: SlashGrid, heads: int) -> int:
    room = min(grid.room * heads, CAPACITY)
    return max(room // 2, min(room, SMALL)) if grid.plan.block_q == PAIRED_ROWS else CAPACITY


def _plan(bits: Tensor, grid: SlashGrid, columns: int, limit: int) -> BlockPlan:
    device, block_q, block_kv = bits.device, grid.plan.block_q, grid.plan.block_kv
    samples, heads = bits.shape[1:3]
    q_first, q_end = grid.spans[:, 0, None], grid.spans[:, 1, None]
    start = (q_first // block_q + torch.arange(grid.plan.rows, device=device)) * block_q
    low = torch.maximum(start, q_first)[:, None].long().expand(-1, heads, -1)  # (S, H, R)
    high = torch.minimum(start + block_q, q_end)[:, None].long().expand(-1, heads, -1) - 1
    high = torch.where(low <= high, high, -1)  # past a sample's last row
    chosen, distances = unpack_bits(bits, bits.shape[3] * 32)
    distance = torch.arange(distances.shape[-1], device=device)
    nearest = torch.where(distances, distance, 0).cummax(-1).values  # the largest one chosen up to each

    key, steps = torch.zeros_like(low), []
    while bool((active := key <= high).any()):
        # The farthest diagonal that reaches `key` or a later one, and where it enters the row.
        farthest = nearest.gather(-1, (high - key).clamp(min=0))
        key = torch.maximum(key, low - farthest)
        steps.append(torch.where(active, key, NO_TOKEN))
        key = key + block_kv
    keys = torch.stack(steps, -1) if steps else torch.zeros(*low.shape, 0, dtype=torch.int64, device=device)
    listed = keys < NO_TOKEN
    dense = fit(listed.sum(-1), grid, limit)
    if dense is not None:
        listed = listed & ~dense[..., None]
        keys = keys.masked_fill(~listed, NO_TOKEN)
    entries = pack(keys, (keys + block_kv - 1 > low[..., None]).long() * CAUSAL)

    position = torch.arange(chosen.shape[-1], device=device)
    tokens = torch.where(chosen & (position < q_end[:, None]), position, NO_TOKEN).sort(-1).values
    tokens = torch.nn.functional.pad(tokens, (0, columns), value=NO_TOKEN)[..., :columns]
    each = tokens[:, :, None].expand(-1, -1, low.shape[2], -1).contiguous()
    at = torch.searchsorted(keys.contiguous(), each, right=True) - 1  # the last tile that starts at or before it
    edge = torch.nn.functional.pad(keys, (1, 0), value=-block_kv).gather(-1, at + 1)
    needed = (each <= high[..., None]) & (each >= edge + block_kv)
    if dense is not None:
        needed = needed & ~dense[..., None]
    return BlockPlan(
        grid.plan,
        samples=samples,
        heads=heads,
        row_ptr=torch.nn.functional.pad(listed.sum(-1).flatten().cumsum(0), (1, 0)).to(torch.int32),
        entries=entries[listed].to(torch.int32),
        dense_rows=None if dense is None else dense.flatten(),
        tokens=tokens.to(torch.int32),
        token_bits=pack_bits(needed).flatten(0, 2),
        order=grid.order,
    )

"""Selection for the dynamic patterns: top-k and top-p of rows of scores, and block bits -> BlockPlan.

Each function has a torch path, which is the definition, and a Triton path for CUDA (`select_kernel.py`); on the same
scores both give the same bits and the same plan. Neither waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.geometry import TILES, Geometry
from sparsekit.kernels import choose_device
from sparsekit.plan import CAUSAL, FLAG_BITS, BlockPlan, upload

__all__ = [
    "CAPACITY",
    "BlockGrid",
    "block_grid",
    "head_lengths",
    "join_rows",
    "pack_bits",
    "plan_from_block_bits",
    "runs_triton",
    "top_p_bits",
    "topk_bits",
    "topk_indices_mask",
    "unpack_bits",
]

# Entries that a plan has room for, 1 GiB. All causal 128 x 64 tiles of 32 heads take 1/8 of it at 128K tokens; at 1M
# tokens it holds an eighth of them.
CAPACITY = 1 << 28
WORD = 32
LONGEST_ROW = 1 << 15  # columns of a row that one program holds
# Quantised masses: the largest of a row lies in [2^30, 2^31), so that 2^22 of them add up exactly in a float64.
MASS_BITS = 30
SMALLEST = 2.0**-126  # normal float32: what lies below counts as 0


def runs_triton(device: torch.device, impl: str | None = None) -> bool:
    """Whether an estimator runs its Triton path on `device`; `impl` "torch" or "triton" asks for one.

    Raises:
        SparsekitError: `impl` cannot run there.
    """
    return choose_device(device, impl).impl in ("triton", "hopper")


# ---- bits


def pack_bits(mask: Tensor) -> Tensor:
    """bool (..., C) -> int32 (..., ceil(C / 32)): bit c % 32 of word c // 32."""
    columns = mask.shape[-1]
    words = -(-columns // WORD)
    padded = torch.nn.functional.pad(mask, (0, words * WORD - columns)).unflatten(-1, (words, WORD))
    return (padded.long() << torch.arange(WORD, device=mask.device)).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """int32 (..., W) -> bool (..., columns)."""
    lanes = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> lanes) & 1).bool().flatten(-2)[..., :columns]


def join_rows(parts: Iterable[Tensor], rows: int) -> Tensor:
    """Bits of groups of rows, (S, P, n, W) each and in order, as (S, P, rows, W). A lone group is not copied."""
    joined, first = None, 0
    for part in parts:
        if part.shape[2] == rows:
            return part
        if joined is None:
            joined = part.new_empty(*part.shape[:2], rows, part.shape[3])
        joined[:, :, first : first + part.shape[2]] = part
        first += part.shape[2]
    assert joined is not None and first == rows
    return joined


# ---- top-k and top-p


def topk_bits(
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    force_first: bool = False,
    force_last: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The `k` largest of each row; ties go to the lower index. `-inf` and NaN are never selected.

    Args:
        scores: float32 (..., C), contiguous; on CUDA at most 2^15 columns.
        k: how many, or int32 broadcastable to `scores.shape[:-1]`. A row with fewer finite scores selects them all.
        lengths: int32 broadcastable to `scores.shape[:-1]`: columns from there on do not exist, whatever they hold.
        force_first, force_last: column 0, and column `lengths - 1`, are selected whatever their score. They are among
            the k; where k has no room for them they are all that is selected.

    Returns:
        int32 (..., ceil(C / 32)), bit c % 32 of word c // 32.
    """
    _check_scores(scores)
    if runs_triton(scores.device, impl):
        _check_row(scores)
        from sparsekit.kernels.select_kernel import topk_bits_triton

        return topk_bits_triton(scores, k, lengths, force_first, force_last)
    exists, forced = _exists_and_forced(scores, lengths, force_first, force_last)
    # +0: the two zeros are one value.
    ranked = torch.where(exists & ~scores.isnan(), scores + 0.0, -torch.inf)
    selectable = (ranked > -torch.inf) | forced
    ranked = ranked.masked_fill(forced, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    wanted = torch.as_tensor(k, device=scores.device).expand(scores.shape[:-1])[..., None]
    # A score of +inf before a forced column must not push it out.
    first = forced.gather(-1, order)
    order = order.gather(-1, torch.sort(first.int(), dim=-1, descending=True, stable=True).indices)
    place = torch.arange(scores.shape[-1], device=scores.device)
    taken = torch.zeros_like(exists).scatter_(-1, order, place < wanted)
    return pack_bits((taken & selectable) | forced)


def top_p_bits(
    scores: Tensor,
    p: float | Tensor,
    *,
    lengths: Tensor | None = None,
    force_first: bool = False,
    force_last: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The fewest columns of each row, largest first, whose sum reaches `p` times the row's; ties to the lower index.

    The sum is one of integers, `floor(score * 2^e)` with the e that brings the row's largest score into [2^30, 2^31):
    exact in any order, so the two paths agree, and every score counts to 2^-30 of the largest. `p` is multiplied, and
    compared, in float64. Scores below 2^-126 and NaN count 0, `inf` as the largest float. A row of zeros selects the
    forced columns only.

    Args:
        scores: float32 (..., C), contiguous, at most 2^22 columns, on CUDA 2^15.
        p: a share, or float64 broadcastable to `scores.shape[:-1]`. From 1 on: every column but `-inf` and NaN.
        lengths, force_first, force_last: as in `topk_bits`. Forced columns are summed first.

    Returns:
        int32 (..., ceil(C / 32)), bit c % 32 of word c // 32.
    """
    _check_scores(scores)
    if runs_triton(scores.device, impl):
        _check_row(scores)
        from sparsekit.kernels.select_kernel import top_p_bits_triton

        return top_p_bits_triton(scores, p, lengths, force_first, force_last)
    exists, forced = _exists_and_forced(scores, lengths, force_first, force_last)
    share = torch.as_tensor(p, dtype=torch.float64, device=scores.device).expand(scores.shape[:-1])[..., None]
    every = exists & (scores > -torch.inf)
    mass = torch.where(exists & (scores >= SMALLEST), scores, 0.0).clamp(max=torch.finfo(torch.float32).max)
    units = _units(mass)
    required = units.sum(-1, keepdim=True).double() * share
    start = units.masked_fill(~forced, 0).sum(-1, keepdim=True)
    ranked, order = torch.sort(mass.masked_fill(forced, -1.0), dim=-1, descending=True, stable=True)
    sorted_units = units.gather(-1, order).masked_fill(ranked < 0, 0)
    before = start + sorted_units.cumsum(-1) - sorted_units
    taken = torch.zeros_like(exists).scatter_(-1, order, (before.double() < required) & (ranked > 0))
    return pack_bits(torch.where(share >= 1, every, taken) | forced)


def _units(mass: Tensor) -> Tensor:
    """int64: masses, 0 or normal floats, as integers; the row's largest in [2^30, 2^31). Their mantissas, shifted."""
    bits = mass.view(torch.int32).long()
    exponent = bits >> 23
    shift = MASS_BITS - 23 + exponent - exponent.amax(-1, keepdim=True)
    mantissa = bits & 0x7FFFFF | 0x800000
    moved = torch.where(shift >= 0, mantissa << shift.clamp(min=0), mantissa >> (-shift).clamp(0, 31))
    return moved.masked_fill(bits == 0, 0)


def topk_indices_mask(scores: Tensor, k: int | Tensor, *, impl: str | None = None) -> Tensor:
    """`topk_bits` for few long rows (64 rows of 128K, say): several programs a row, by radix select.

    Args:
        scores: float32 (rows, N), contiguous. `-inf` and NaN are never selected.
        k: how many, or int32 (rows,).

    Returns:
        int32 (rows, ceil(N / 32)): exactly k bits a row, as far as it holds as many finite scores; ties to the lower
        index.
    """
    _check_scores(scores)
    if scores.ndim != 2:
        raise SparsekitError(f"scores {tuple(scores.shape)}: want (rows, N).")
    if runs_triton(scores.device, impl):
        from sparsekit.kernels.select_kernel import topk_indices_mask_triton

        return topk_indices_mask_triton(scores, k)
    return topk_bits(scores, k, impl="torch")


def _check_scores(scores: Tensor) -> None:
    if scores.dtype != torch.float32 or not scores.is_contiguous() or scores.shape[-1] < 1:
        raise SparsekitError(f"scores {tuple(scores.shape)} {scores.dtype}: want contiguous float32, 1 column or more.")


def _check_row(scores: Tensor) -> None:
    if scores.shape[-1] > LONGEST_ROW:
        raise SparsekitError(
            f"scores {tuple(scores.shape)}: rows of up to {LONGEST_ROW} columns on {scores.device}; "
            f"topk_indices_mask takes longer ones."
        )


def _exists_and_forced(
    scores: Tensor, lengths: Tensor | None, force_first: bool, force_last: bool
) -> tuple[Tensor, Tensor]:
    """bool like scores: the columns that exist, and those that are selected whatever their score."""
    column = torch.arange(scores.shape[-1], device=scores.device)
    if lengths is None:
        lengths = torch.full((), scores.shape[-1], dtype=torch.int32, device=scores.device)
    length = lengths.expand(scores.shape[:-1])[..., None]
    exists = (column < length).expand(scores.shape)
    forced = ((column == 0) & force_first) | ((column == length - 1) & force_last)
    return exists, forced & exists


# ---- block bits -> plan


class BlockGrid(NamedTuple):
    """How a pattern's blocks lie in a call: host integers and small tensors, the same for all layers of a forward."""

    plan: Geometry  # cut into the plan's tile
    spans: Tensor  # int32 (S, 4): q_first, q_end, keys, kv_start
    causal: Tensor  # int32 (S, R): tiles that dense attention visits in each plan row
    lengths: Tensor  # int32 (S, 1, Rb): key blocks that pattern row r may attend, its own included; 0 past the last row
    rows: int  # Rb, pattern rows of a sample
    columns: int  # C, key blocks
    causal_tiles: int  # sum of `causal`


@lru_cache(maxsize=64)
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
    plan = BlockPlan(cut, samples=samples)
    spans = plan.spans()
    causal = torch.stack([plan._causal_tiles(s) for s in range(plan.samples)])
    rows = max(max(-(-s.q_end // block_tokens) - s.q_first // block_tokens for s in spans), 1)
    lengths = torch.zeros(len(spans), 1, rows, dtype=torch.int64)
    for s, span in enumerate(spans):
        if span.q_end > span.q_first:
            first = span.q_first // block_tokens
            own = torch.arange(first, first + rows)
            lengths[s, 0] = torch.where(own <= (span.q_end - 1) // block_tokens, own + 1, 0)
    columns = max(-(-max(span.q_end for span in spans) // block_tokens), 1)
    starts = geometry.kv_start
    numbers = torch.tensor([[s.q_first, s.q_end, s.keys, start] for s, start in zip(spans, starts, strict=False)])
    small = [upload(t.to(torch.int32), device) for t in (numbers, causal, lengths)]
    return BlockGrid(cut, small[0], small[1], small[2], rows, columns, int(causal.sum()))


@lru_cache(maxsize=64)
def head_lengths(geometry: Geometry, block_tokens: int, samples: int, heads: int, device: torch.device) -> Tensor:
    """int32 (S, heads, Rb): `block_grid(...).lengths`, a copy for each head."""
    lengths = block_grid(geometry, block_tokens, samples, device).lengths
    return lengths.expand(-1, heads, -1).contiguous()


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
        from sparsekit.kernels.select_kernel import plan_from_bits_triton

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
    entries = (tile << FLAG_BITS | flags).expand_as(kept)[kept]
    row_ptr = torch.nn.functional.pad(kept.sum(-1).flatten().cumsum(0), (1, 0))
    return BlockPlan(
        grid.plan,
        samples=samples,
        heads=heads,
        row_ptr=row_ptr.to(torch.int32),
        entries=entries.to(torch.int32),
        dense_rows=dense.flatten(),
    )


def rows_that_fit(counts: Tensor, causal: Tensor, capacity: int) -> Tensor:
    """bool like counts: the rows that stay listed, sparsest first, so that all their entries fit `capacity`."""
    flat = counts.flatten()
    order = torch.argsort(flat / causal.flatten().clamp(min=1), stable=True)
    fits = flat[order].cumsum(0) <= capacity
    return torch.zeros_like(fits).scatter_(0, order, fits).view(counts.shape)


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

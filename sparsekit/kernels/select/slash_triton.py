"""The Triton side of `slash.py`: tables a head, a walk a row, a search a column."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import launch, on_device
from sparsekit.kernels.primitives import _ones
from sparsekit.kernels.select.grid import SlashGrid, fit
from sparsekit.plan import BlockPlan

__all__ = ["plan_triton"]

WORDS = 1024  # that a program looks at in one go
LANES = 32  # rows that a program walks side by side
UNROLL = 4  # tiles between two looks at whether all have arrived
SEARCH = 1024  # columns that a program looks up in one go

NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
@no_type_check
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
@no_type_check
def _top_bit(word):
    """Index of the highest bit of uint32 words, by a float's exponent; the next bit is cleared, so none rounds up."""
    lone = (word & ~(word >> 1)).to(tl.float32)
    return (lone.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["pairs", "heads", "words", "columns"])
@no_type_check
def _tables(p_bits, p_last, p_token, p_span, pairs, heads, words, columns, WORDS: tl.constexpr):
    """A program a head and kind: its columns as an ascending list; of its distances the largest up to each word."""
    i_pair = tl.program_id(0) // 2
    p_own = p_bits + i_pair.to(tl.int64) * words
    if tl.program_id(0) % 2 == 0:
        q_end = tl.load(p_span + i_pair // heads * 4 + 1)
        p_token += i_pair.to(tl.int64) * columns
        found = 0
        for first in range(0, words, WORDS):
            at = first + tl.arange(0, WORDS)
            word = tl.load(p_own + at, mask=at * 32 < q_end, other=0).to(tl.uint32, bitcast=True)
            left = q_end - at * 32
            cut = (tl.full([WORDS], 1, tl.uint32) << (tl.minimum(tl.maximum(left, 0), 31)).to(tl.uint32)) - 1
            word = tl.where(left < 32, word & cut, word)
            count = _ones(word)
            place = found + tl.cumsum(count, 0) - count
            for bit in tl.static_range(32):
                on = ((word >> bit) & 1) != 0
                tl.store(p_token + place, at * 32 + bit, mask=on & (place < columns))
                place += on.to(tl.int32)
            found += tl.sum(count)
        for first in range(found // WORDS * WORDS, columns, WORDS):
            at = first + tl.arange(0, WORDS)
            tl.store(p_token + at, tl.full([WORDS], NO_TOKEN, tl.int32), mask=(at >= found) & (at < columns))
    else:
        p_own += pairs.to(tl.int64) * words
        p_last += i_pair.to(tl.int64) * words
        before = 0
        for first in range(0, words, WORDS):
            at = first + tl.arange(0, WORDS)
            word = tl.load(p_own + at, mask=at < words, other=0).to(tl.uint32, bitcast=True)
            largest = tl.where(word != 0, at * 32 + _top_bit(word), 0)
            largest = tl.maximum(tl.associative_scan(largest, 0, _larger), before)
            tl.store(p_last + at, largest, mask=at < words)
            before = tl.max(largest)


@triton.jit
@no_type_check
def _bounds(p_span, i_sample, i_tile, BLOCK_Q: tl.constexpr):
    """First and last query of rows; last < first where there is none."""
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = (q_first // BLOCK_Q + i_tile) * BLOCK_Q
    return tl.maximum(start, q_first), tl.minimum(start + BLOCK_Q, q_end) - 1


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "words"])
@no_type_check
def _walk(
    p_bits, p_last, p_span, p_count, p_entry, pairs, heads, rows, words,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Tiles of LANES rows, from key 0 on. Without p_entry: how many, at place row + 1; with it p_count is row_ptr."""
    groups = (rows + LANES - 1) // LANES
    i_pair = tl.program_id(0) // groups
    i_tile = tl.program_id(0) % groups * LANES + tl.arange(0, LANES)
    low, high = _bounds(p_span, i_pair // heads, i_tile, BLOCK_Q)
    i_row = i_pair * rows + i_tile
    p_bits += (pairs + i_pair).to(tl.int64) * words
    p_last += i_pair.to(tl.int64) * words
    active = (i_tile < rows) & (low <= high)
    key = tl.zeros([LANES], tl.int32)
    count = tl.zeros([LANES], tl.int32)
    if p_entry is not None:
        count = tl.load(p_count + i_row, mask=active, other=0)
        active = active & (tl.load(p_count + i_row + 1, mask=active, other=0) > count)  # else dense
    while tl.max(active.to(tl.int32), 0) > 0:
        for _ in tl.static_range(UNROLL):
            # The farthest chosen distance that reaches `key` or a later one, and where it enters the row.
            reach = tl.where(active, high - key, 0)
            at = reach >> 5
            word = tl.load(p_bits + at, mask=active, other=0).to(tl.uint32, bitcast=True)
            word = word & ((tl.full([LANES], 2, tl.uint32) << (reach & 31).to(tl.uint32)) - 1)
            before = tl.load(p_last + at - 1, mask=active & (at > 0), other=0)
            farthest = tl.where(word != 0, at * 32 + _top_bit(word), before)
            key = tl.maximum(key, low - farthest)
            if p_entry is not None:
                entry = (key << 2) | (key + BLOCK_KV - 1 > low).to(tl.int32)
                tl.store(p_entry + count, entry, mask=active)
            count += active.to(tl.int32)
            key += BLOCK_KV
            active = active & (key <= high)
    if p_entry is None:
        tl.store(p_count + i_row + 1, count, mask=i_tile < rows)
        if tl.program_id(0) == 0:
            tl.store(p_count, 0)


@triton.jit(do_not_specialize=["heads", "rows", "columns", "token_words"])
@no_type_check
def _column_bits(
    p_token, p_span, p_row, p_entry, p_dense, p_need, heads, rows, columns, token_words,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """A program a row: bits of the columns up to its last query that none of its tiles holds."""
    i_row = tl.program_id(0)
    i_pair = i_row // rows
    low, high = _bounds(p_span, i_pair // heads, i_row % rows, BLOCK_Q)
    first = tl.load(p_row + i_row)
    tiles = tl.load(p_row + i_row + 1) - first
    high = tl.where(low <= high, high, -1)
    if p_dense is not None:
        high = tl.where(tl.load(p_dense + i_row) != 0, -1, high)  # a row without tiles wants no column
    p_entry += first
    p_token += i_pair.to(tl.int64) * columns
    p_need += i_row.to(tl.int64) * token_words
    for c in range(0, columns, SEARCH):
        at = c + tl.arange(0, SEARCH)
        token = tl.load(p_token + at, mask=at < columns, other=NO_TOKEN)
        wanted = token <= high
        place = tl.zeros([SEARCH], tl.int32)
        left = tl.where(high >= 0, tiles, 0)
        while left > 1:  # place .. place + left holds the last tile that starts at or before the column
            half = left // 2
            key = tl.load(p_entry + place + half, mask=wanted, other=0) >> 2
            place += tl.where(key <= token, half, 0)
            left -= half
        key = tl.load(p_entry + place, mask=wanted, other=0) >> 2
        held = (key <= token) & (token - key < BLOCK_KV)
        need = tl.reshape((wanted & ~held).to(tl.int32), (SEARCH // 32, 32)) << tl.arange(0, 32)[None, :]
        word = c // 32 + tl.arange(0, SEARCH // 32)
        tl.store(p_need + word, tl.sum(need, 1), mask=word < token_words)


def plan_triton(bits: Tensor, grid: SlashGrid, columns: int, limit: int) -> BlockPlan:
    """`slash.plan_from_vertical_slash` on checked bits."""
    _, samples, heads, words = bits.shape
    plan, device, pairs = grid.plan, bits.device, samples * heads
    rows, token_words = plan.rows, -(-columns // 32)

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    last, tokens = make(pairs, words), make(samples, heads, columns)
    counts, need = make(pairs * rows + 1), make(pairs * rows, token_words)
    groups = -(-rows // LANES)
    dense, room = None, grid.room * heads
    tile = {"BLOCK_Q": plan.block_q, "BLOCK_KV": plan.block_kv}
    walk: dict[str, Any] = {**tile, "LANES": LANES, "UNROLL": UNROLL, "num_warps": 1}
    with on_device(device):
        sizes = (pairs, heads, words, columns)
        launch(_tables, 2 * pairs, (bits, last, tokens, grid.spans, *sizes), {"WORDS": WORDS, "num_warps": 8})
        numbers = (pairs, heads, rows, words)
        launch(_walk, pairs * groups, (bits, last, grid.spans, counts, None, *numbers), walk)
        if room > limit:
            dense = fit(counts[1:].view(samples, heads, rows), grid, limit)
            assert dense is not None
            counts[1:] *= ~dense.flatten()
            room = limit
        row_ptr = counts.cumsum(0, dtype=torch.int32)
        entries = make(max(room, 1))
        launch(_walk, pairs * groups, (bits, last, grid.spans, row_ptr, entries, *numbers), walk)
        flags = None if dense is None else dense.flatten()
        held = None if flags is None else flags.view(torch.uint8)
        args = (tokens, grid.spans, row_ptr, entries, held, need, heads, rows, columns, token_words)
        search: dict[str, Any] = {**tile, "SEARCH": min(max(triton.next_power_of_2(columns), 32), SEARCH)}
        launch(_column_bits, pairs * rows, args, {**search, "num_warps": 4})
    return BlockPlan(
        plan,
        samples=samples,
        heads=heads,
        row_ptr=row_ptr,
        entries=entries,
        dense_rows=flags,
        tokens=tokens,
        token_bits=need,
        order=grid.order,
    )

"""The Triton side of `join.py`: a row of two plans is merged by one program, tile by tile from left to right.

It walks once to count and once to write, so that rows lie end to end without the host knowing how many tiles there are.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.kernels.launch import launch, on_device
from sparsekit.kernels.select.bits import WORD
from sparsekit.kernels.select.grid import Form
from sparsekit.plan import CAUSAL, FLAG_BITS, RULE, BlockPlan

__all__ = ["drop_columns_triton", "merge_triton"]

COLUMNS = 512  # looked at by one program
_CAUSAL, _RULE, _FLAG_BITS, _WORD = (tl.constexpr(n) for n in (CAUSAL, RULE, FLAG_BITS, WORD))


@triton.jit
@no_type_check
def _source_row(i_sample, i_head, i_row, rows, group, heads, samples):
    """The row of a plan of that many samples and heads that a joined row takes."""
    own = tl.where(samples > 1, i_sample, 0) * heads + i_head // group
    return own * rows + i_row


@triton.jit
@no_type_check
def _write(p_out, at, key, whole, low, now, WIDTH: tl.constexpr, WRITE: tl.constexpr):
    """Stores a tile as an entry where `now`; the next place."""
    if WRITE:
        flags = tl.where(key + WIDTH - 1 > low, _CAUSAL, 0) | tl.where(whole, 0, _RULE)
        tl.store(p_out + at, (key << _FLAG_BITS) | flags, mask=now)
    return at + now.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "heads", "heads_a", "heads_b", "samples_a", "samples_b"])
@no_type_check
def _merge_row(
    p_ptr_a, p_entry_a, p_ptr_b, p_entry_b, p_dense, p_first, p_last, p_out_ptr, p_out,
    rows, heads, heads_a, heads_b, samples_a, samples_b,
    DENSE: tl.constexpr, WIDTH: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Counts the tiles of one row, or writes them. The last two tiles stay open: a later one may still touch them."""
    i_all = tl.program_id(0)
    i_row = i_all % rows
    i_head = (i_all // rows) % heads
    i_sample = i_all // (rows * heads)
    row_a = _source_row(i_sample, i_head, i_row, rows, heads // heads_a, heads_a, samples_a)
    row_b = _source_row(i_sample, i_head, i_row, rows, heads // heads_b, heads_b, samples_b)
    at_a, end_a = tl.load(p_ptr_a + row_a).to(tl.int64), tl.load(p_ptr_a + row_a + 1).to(tl.int64)
    at_b, end_b = tl.load(p_ptr_b + row_b).to(tl.int64), tl.load(p_ptr_b + row_b + 1).to(tl.int64)
    low = tl.load(p_first + i_sample * rows + i_row).to(tl.int32)
    high = tl.load(p_last + i_sample * rows + i_row).to(tl.int32)
    if DENSE:
        dense = tl.load(p_dense + i_all) != 0
        end_a, end_b = tl.where(dense, at_a, end_a), tl.where(dense, at_b, end_b)
    at = tl.zeros([], tl.int64)
    if WRITE:
        at += tl.load(p_out_ptr + i_all)
    begun = at
    none = -(1 << 30)
    earlier, current = tl.full([], none, tl.int32), tl.full([], none, tl.int32)
    earlier_whole, current_whole = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    while (at_a < end_a) | (at_b < end_b):
        entry_a = tl.load(p_entry_a + at_a, mask=at_a < end_a, other=0x7FFFFFFF)
        entry_b = tl.load(p_entry_b + at_b, mask=at_b < end_b, other=0x7FFFFFFF)
        from_a = (entry_a >> _FLAG_BITS) <= (entry_b >> _FLAG_BITS)
        from_a = ((at_a < end_a) & from_a) | (at_b >= end_b)
        entry = tl.where(from_a, entry_a, entry_b)
        at_a += from_a.to(tl.int64)
        at_b += 1 - from_a.to(tl.int64)
        start = entry >> _FLAG_BITS
        live = start < high
        whole = (live & ((entry & _RULE) == 0)).to(tl.int32)
        earlier_whole |= tl.where(start < current, whole, 0)
        current_whole |= tl.where(start < current + WIDTH, whole, 0)
        new = live & (start > current)
        at = _write(p_out, at, earlier, earlier_whole > 0, low, new & (earlier >= 0), WIDTH, WRITE)
        earlier, earlier_whole = tl.where(new, current, earlier), tl.where(new, current_whole, earlier_whole)
        current_whole = tl.where(new, whole, current_whole)
        current = tl.where(new, tl.maximum(start, current + WIDTH), current)
    at = _write(p_out, at, earlier, earlier_whole > 0, low, earlier >= 0, WIDTH, WRITE)
    at = _write(p_out, at, current, current_whole > 0, low, current >= 0, WIDTH, WRITE)
    if not WRITE:
        tl.store(p_out + i_all, (at - begun).to(tl.int32))


@triton.jit(do_not_specialize=["rows", "columns", "words", "blocks"])
@no_type_check
def _drop_row(
    p_ptr, p_entry, p_token, p_bits, p_out, rows, columns, words, blocks,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds, for BLOCK columns of a row, the tile that holds each, by bisection."""
    i_all = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    o_column = i_block * BLOCK + tl.arange(0, BLOCK)
    # (BLOCK,): the columns, and whether the row needs them
    exists = o_column < columns
    token = tl.load(p_token + i_all // rows * columns + o_column, mask=exists, other=0)
    word = tl.load(p_bits + i_all * words + o_column // _WORD, mask=exists, other=0)
    needed = ((word >> (o_column % _WORD)) & 1) != 0
    begin, end = tl.load(p_ptr + i_all), tl.load(p_ptr + i_all + 1)
    low, high = tl.zeros([BLOCK], tl.int32) + begin, tl.zeros([BLOCK], tl.int32) + end
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        key = tl.load(p_entry + middle, mask=low < high, other=0) >> _FLAG_BITS
        before = (low < high) & (key <= token)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    place = low - 1
    inside = place >= begin
    key = tl.load(p_entry + place, mask=inside, other=0) >> _FLAG_BITS
    held = inside & (token - key < WIDTH)
    tl.atomic_and(p_entry + place, ~_RULE, mask=held & needed)
    lane = tl.arange(0, BLOCK // _WORD)
    bit = tl.reshape((needed & ~held).to(tl.int32), (BLOCK // _WORD, _WORD)) << tl.arange(0, _WORD)[None, :]
    o_word = i_block * (BLOCK // _WORD) + lane
    tl.store(p_out + i_all * words + o_word, tl.sum(bit, 1), mask=o_word < words)


def merge_triton(
    a: BlockPlan, b: BlockPlan, form: Form, first: Tensor, last: Tensor, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(row_ptr, entries) of the two plans' disjoint tiles; entries have room for all that both list."""
    assert a.row_ptr is not None and b.row_ptr is not None and a.entries is not None and b.entries is not None
    device = a.row_ptr.device
    room = sum(
        plan.entries.numel() * (form.heads // plan.heads) * (form.samples // plan.samples)
        for plan in (a, b)
        if plan.entries is not None
    )
    count = torch.empty(form.total, dtype=torch.int32, device=device)
    entries = torch.empty(room, dtype=torch.int32, device=device)
    flags = None if dense is None else dense.view(torch.uint8)
    numbers = (form.rows, form.heads, a.heads, b.heads, a.samples, b.samples)
    lists = (a.row_ptr, a.entries, b.row_ptr, b.entries, flags, first, last)
    options = {"DENSE": dense is not None, "WIDTH": a.block_kv, "WRITE": False, "num_warps": 1}
    with on_device(device):
        launch(_merge_row, form.total, (*lists, None, count, *numbers), options)
        row_ptr = torch.nn.functional.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
        launch(_merge_row, form.total, (*lists, row_ptr, entries, *numbers), {**options, "WRITE": True})
    return row_ptr, entries


def drop_columns_triton(
    row_ptr: Tensor, entries: Tensor, tokens: Tensor, bits: Tensor, form: Form, geometry: Geometry
) -> Tensor:
    """As `_drop_columns`: new bits, and entries changed in place."""
    out = torch.empty_like(bits)
    columns = tokens.shape[-1]
    most = max(span.keys for span in geometry.spans) // geometry.block_kv + 1  # disjoint tiles that start on a key
    blocks = triton.cdiv(columns, COLUMNS)
    args = (row_ptr, entries, tokens.contiguous(), bits.contiguous(), out, form.rows, columns, bits.shape[1], blocks)
    options = {"STEPS": most.bit_length() + 1, "WIDTH": geometry.block_kv, "BLOCK": COLUMNS, "num_warps": 4}
    with on_device(bits.device):
        launch(_drop_row, form.total * blocks, args, options)
    return out

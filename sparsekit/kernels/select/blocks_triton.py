"""The Triton side of `blocks.py`: a count a row, their running sum, the entries."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import launch, on_device
from sparsekit.kernels.primitives import _ones
from sparsekit.kernels.select.grid import BlockGrid, rows_that_fit
from sparsekit.plan import BlockPlan

__all__ = ["plan_from_bits_triton"]


@triton.jit
@no_type_check
def _row_of(p_span, i_row, heads, rows, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr):
    """Of a plan row: (sample, tile, first position, first query, one past the last, the sample's first block)."""
    i_sample = i_row // rows // heads
    i_tile = i_row % rows
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = (q_first // BLOCK_Q + i_tile) * BLOCK_Q
    return i_sample, i_tile, start, q_first, q_end, q_first // BLOCK


@triton.jit
@no_type_check
def _row_bits(
    p_bits, i_row, lane, start, q_end, first, rows, bit_rows, words,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """uint32 (LANES,): words `lane` of the blocks that a plan row keeps, over its PARTS block rows, each with its own
    block."""
    p_bits += (i_row // rows).to(tl.int64) * bit_rows * words
    union = tl.zeros([LANES], tl.uint32)
    for part in tl.static_range(PARTS):
        own = start // BLOCK + part
        inside = (own >= first) & (own * BLOCK < q_end)
        p_words = p_bits + (own - first).to(tl.int64) * words
        up_to = tl.where(inside, tl.minimum(own // 32 + 1, words), 0)
        word = tl.load(p_words + lane, mask=lane < up_to, other=0)
        word = word.to(tl.uint32, bitcast=True)
        one = tl.full([], 1, tl.uint32) << (own % 32).to(tl.uint32)
        last = (word & (one - 1)) | one  # before its own block, and its own
        union = union | tl.where(lane == tl.where(inside, own // 32, -1), last, word)
    return union


@triton.jit(do_not_specialize=["heads", "rows", "bit_rows", "words", "all_rows"])
@no_type_check
def _count_entries(
    p_bits, p_span, p_causal, p_count, p_dense, heads, rows, bit_rows, words, all_rows,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """Tiles that a plan row lists, at place row + 1; a row that keeps every causal one is dense, and lists none.

    A program counts PER rows, whose loads need not wait for each other; past the last row, that one again.
    """
    lane = tl.arange(0, WORDS)
    for i in tl.static_range(PER):
        i_row = tl.minimum(tl.program_id(0) * PER + i, all_rows - 1)
        i_sample, i_tile, start, _, q_end, first = _row_of(p_span, i_row, heads, rows, BLOCK_Q, BLOCK)
        causal = tl.load(p_causal + i_sample * rows + i_tile)
        union = _row_bits(p_bits, i_row, lane, start, q_end, first, rows, bit_rows, words, BLOCK, PARTS, WORDS)
        # The row's last block is a part of one where the row ends before the block does.
        spare = (causal + FACTOR - 1) // FACTOR * FACTOR - causal
        count = tl.where(causal > 0, FACTOR * tl.sum(_ones(union)) - spare, 0)
        dense = (count == causal) & (causal > 0)
        tl.store(p_dense + i_row, dense.to(tl.uint8))
        tl.store(p_count + i_row + 1, tl.where(dense, 0, count))
    if tl.program_id(0) == 0:
        tl.store(p_count, 0)


@triton.jit(do_not_specialize=["heads", "rows", "bit_rows", "words", "all_rows"])
@no_type_check
def _write_entries(
    p_bits, p_span, p_causal, p_row, p_entry, heads, rows, bit_rows, words, all_rows,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """The entries of PER plan rows, ascending: a lane a bit, so that neighbours write to one place in memory."""
    TILE: tl.constexpr = BLOCK // FACTOR
    CHUNK: tl.constexpr = WORDS if WORDS < 32 else 32  # words at once
    lane = tl.arange(0, CHUNK * 32)
    for i in tl.static_range(PER):
        i_row = tl.minimum(tl.program_id(0) * PER + i, all_rows - 1)
        at = tl.load(p_row + i_row)
        lists = tl.load(p_row + i_row + 1) > at
        i_sample, i_tile, start, q_first, q_end, first = _row_of(p_span, i_row, heads, rows, BLOCK_Q, BLOCK)
        limit = tl.where(lists, tl.load(p_causal + i_sample * rows + i_tile) * TILE, 0)
        low = tl.maximum(start, q_first)
        for word in range(0, WORDS, CHUNK):
            union = _row_bits(
                p_bits, i_row, word + lane // 32, start, q_end, first, rows, bit_rows, words, BLOCK, PARTS, CHUNK * 32
            )
            on = ((union >> (lane % 32).to(tl.uint32)) & 1).to(tl.int32)
            p_place = p_entry + at + FACTOR * (tl.cumsum(on, 0) - on)
            at += FACTOR * tl.sum(on)
            for j in tl.static_range(FACTOR):
                key = (word * 32 + lane) * BLOCK + j * TILE
                entry = (key << 2) | (key + TILE - 1 > low).to(tl.int32)
                tl.store(p_place + j, entry, mask=(on != 0) & (key < limit))


ROWS_COUNTED, ROWS_WRITTEN = 4, 2  # by a program


def plan_from_bits_triton(bits: Tensor, grid: BlockGrid, block_tokens: int, room: int, limit: int) -> BlockPlan:
    """`blocks.plan_from_block_bits` on checked bits: a count a row, their running sum, the entries. `room` entries are
    enough, `limit` all that there may be."""
    samples, heads, bit_rows, words = bits.shape
    plan, device = grid.plan, bits.device
    programs = samples * heads * plan.rows
    counts = torch.empty(programs + 1, dtype=torch.int32, device=device)
    dense = torch.empty(programs, dtype=torch.bool, device=device)
    numbers = (heads, plan.rows, bit_rows, words)
    parts = max(plan.block_q // block_tokens, 1)
    shared = {"BLOCK_Q": plan.block_q, "BLOCK": block_tokens}
    with on_device(device):
        options = {
            **shared, "FACTOR": block_tokens // plan.block_kv, "PARTS": parts,
            "WORDS": triton.next_power_of_2(words), "num_warps": 1,
        }  # fmt: skip
        args = (bits, grid.spans, grid.causal, counts, dense.view(torch.uint8), *numbers)
        options["PER"] = ROWS_COUNTED
        launch(_count_entries, -(-programs // ROWS_COUNTED), (*args, programs), options)
        if room > limit:
            causal = grid.causal[:, None].expand(samples, heads, plan.rows)
            fits = rows_that_fit(counts[1:], causal, limit)
            dense |= ~fits
            counts[1:] *= fits
            room = limit
        row_ptr = counts.cumsum(0, dtype=torch.int32)
        entries = torch.zeros(room, dtype=torch.int32, device=device)
        options["PER"] = ROWS_WRITTEN
        args = (bits, grid.spans, grid.causal, row_ptr, entries, *numbers)
        launch(_write_entries, -(-programs // ROWS_WRITTEN), (*args, programs), options)
    return BlockPlan(
        plan, samples=samples, heads=heads, row_ptr=row_ptr, entries=entries, dense_rows=dense, on_grid=True
    )

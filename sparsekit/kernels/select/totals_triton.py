"""How much a plan computes, row by row in one launch: `BlockPlan.sums` for plans that are gone before anyone asks."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import launch, on_device
from sparsekit.kernels.select.bits import WORD
from sparsekit.plan import CAUSAL, FLAG_BITS, RULE, BlockPlan, row_bounds

__all__ = ["sums_triton"]

_CAUSAL, _RULE, _FLAG_BITS, _WORD = (tl.constexpr(n) for n in (CAUSAL, RULE, FLAG_BITS, WORD))


@triton.jit
@no_type_check
def _triangle(n):
    return n * (n + 1) // 2


@triton.jit
@no_type_check
def _clamped_run(low, high, width):
    """sum over low < y <= high of clamp(y, 0, width)."""
    below, above = tl.maximum(low, 0), tl.maximum(high, 0)
    before, after = tl.minimum(below, width), tl.minimum(above, width)
    return _triangle(after) + (above - after) * width - _triangle(before) - (below - before) * width


@triton.jit(do_not_specialize=["rows", "heads", "columns", "words", "rule_samples", "rule_heads"])
@no_type_check
def _sum_row(
    p_ptr, p_entry, p_rule, p_dense, p_token, p_bits, p_first, p_last, p_tiles, p_keys, p_out,
    rows, heads, columns, words, rule_samples, rule_heads,
    RULED: tl.constexpr, DENSE: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs, tiles and single columns of one row, as `BlockPlan._kept_from` counts them."""
    i_all = tl.program_id(0).to(tl.int64)
    i_row, i_head, i_sample = i_all % rows, (i_all // rows) % heads, i_all // rows // heads
    at_row = i_sample * rows + i_row
    low, high, keys = tl.load(p_first + at_row), tl.load(p_last + at_row), tl.load(p_keys + at_row)
    begin, end = tl.load(p_ptr + i_all).to(tl.int64), tl.load(p_ptr + i_all + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sink, window, cut = tl.zeros([], tl.int64), tl.zeros([], tl.int64), low
    if RULED:
        own = tl.where(rule_samples > 1, i_sample, 0) * rule_heads + tl.where(rule_heads > 1, i_head, 0)
        sink, window = tl.load(p_rule + own * 3).to(tl.int64), tl.load(p_rule + own * 3 + 1).to(tl.int64)
        cut = tl.minimum(tl.maximum(tl.load(p_rule + own * 3 + 2).to(tl.int64), low), high)
    pairs = tl.zeros([BLOCK], tl.int64)
    at = begin
    while at < end:
        # (BLOCK,): entries
        there = at + lane < end
        entry = tl.load(p_entry + at + lane, mask=there, other=0).to(tl.int64)
        key, flags = entry >> _FLAG_BITS, entry & 3
        causal = _clamped_run(low - key, high - key, WIDTH)
        whole = (high - low) * tl.minimum(tl.maximum(keys - key, 0), WIDTH)
        kept = tl.where((flags & _CAUSAL) != 0, causal, whole)
        if RULED:
            sinks = tl.minimum(tl.maximum(sink - key, 0), WIDTH)
            far_low, far_high = low - key - window, cut - key - window
            ruled = causal - _clamped_run(far_low, far_high, WIDTH) + _clamped_run(far_low, far_high, sinks)
            kept = tl.where((flags & _RULE) != 0, ruled, kept)
        pairs += tl.where(there, kept, 0)
        at += BLOCK
    total, visited, singles = tl.sum(pairs), end - begin, tl.zeros([], tl.int64)
    if DENSE:
        dense = tl.load(p_dense + i_all) != 0
        total += tl.where(dense, _triangle(high) - _triangle(low), 0)
        visited += tl.where(dense, tl.load(p_tiles + at_row), 0)
    if COLUMNS:
        at_head = i_all // rows * columns
        for first in range(0, columns, BLOCK):
            # (BLOCK,): single columns
            there = first + lane < columns
            token = tl.load(p_token + at_head + first + lane, mask=there, other=0).to(tl.int64)
            word = tl.load(p_bits + i_all * words + (first + lane) // _WORD, mask=there, other=0)
            needed = there & (((word >> ((first + lane) % _WORD)) & 1) != 0)
            total += tl.sum(tl.where(needed, tl.maximum(high - tl.maximum(low, token), 0), 0))
            singles += tl.sum(needed.to(tl.int64))
    tl.store(p_out + i_all * 3, total)
    tl.store(p_out + i_all * 3 + 1, visited)
    tl.store(p_out + i_all * 3 + 2, singles)


def sums_triton(plan: BlockPlan) -> Tensor:
    """`plan.sums()` of a plan with rows, int64 (3,), on its device."""
    assert plan.row_ptr is not None and plan.entries is not None
    rows, device = plan.samples * plan.heads * plan.rows, plan.row_ptr.device
    first, last, tiles, keys = (x.contiguous() for x in row_bounds(plan.geometry, plan.samples, device))
    out = torch.empty(rows, 3, dtype=torch.int64, device=device)
    dense = None if plan.dense_rows is None else plan.dense_rows.view(torch.uint8)
    rule = None if plan.rule is None else plan.rule.contiguous()
    columns = plan.tokens is not None and plan.token_bits is not None
    tokens, bits = (plan.tokens, plan.token_bits) if columns else (None, None)
    numbers = (
        plan.rows, plan.heads, 0 if tokens is None else tokens.shape[-1], 0 if bits is None else bits.shape[-1],
        *((1, 1) if rule is None else rule.shape[:2]),
    )  # fmt: skip
    args = (plan.row_ptr, plan.entries, rule, dense, tokens, bits, first, last, tiles, keys, out, *numbers)
    options = {
        "RULED": rule is not None, "DENSE": dense is not None, "COLUMNS": columns, "WIDTH": plan.block_kv, "BLOCK": 128,
        "num_warps": 4,
    }  # fmt: skip
    with on_device(device):
        launch(_sum_row, rows, args, options)
    return out.sum(0)

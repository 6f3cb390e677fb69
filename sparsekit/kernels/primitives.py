"""Device functions that kernels share. p_: pointer, b_: tile, m_: mask, i_: index."""

from __future__ import annotations

import math
from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# Finite stand-ins for -inf: no row becomes NaN. A running maximum starts at UNSEEN, above every masked logit however it
# is scaled, so that a wholly masked tile adds exactly 0. Were the maximum itself a scaled MASKED, a fused multiply-add
# would make `logit * factor - maximum` its rounding error, huge and of either sign: 2 to that power is 0 or inf.
MASKED = tl.constexpr(-1.0e30)
UNSEEN = tl.constexpr(-1.0e15)


@triton.jit
@no_type_check
def _offset(i_batch, i_head, row, batch_step, head_step, row_step):
    """Elements to a row of one head: 64-bit, since tensors may pass 2^31 elements."""
    head = tl.cast(i_batch, tl.int64) * batch_step + tl.cast(i_head, tl.int64) * head_step
    return head + tl.cast(row, tl.int64) * row_step


@triton.jit
@no_type_check
def _in_pages(p_table, key, inside, nowhere, PAGE: tl.constexpr):
    """(page, place in it) of key positions in pages of PAGE keys; page `nowhere` of those that are not inside."""
    return tl.load(p_table + key // PAGE, mask=inside, other=nowhere), key % PAGE


@triton.jit
@no_type_check
def _address(p_base, stride, first, lane, inside, p_table, page_stride, PAGE: tl.constexpr):
    """Pointers to rows `first + lane` of one head: in one piece, or, of PAGE keys a page, where the table says."""
    if PAGE == 0:
        return p_base + tl.cast(first, tl.int64) * stride + lane * stride
    else:  # noqa: RET505  (Triton compiles one branch only, and types what follows a return)
        page, place = _in_pages(p_table, first + lane, inside, 0, PAGE)
        return p_base + page.to(tl.int64) * page_stride + place.to(tl.int64) * stride


@triton.jit
@no_type_check
def _load_rows(
    desc, p_base, stride, i_batch, i_head, i_first, row, limit,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr,
    p_table=None, page_stride=None, PAGE: tl.constexpr = 0,
):  # fmt: skip
    """(ROWS, DP): rows `row ..` of one head; zeros outside [0, limit) and past the true head size."""
    if TMA:
        return desc.load([i_batch, i_head, i_first + row, 0]).reshape(ROWS, DP)
    else:  # noqa: RET505  (Triton compiles one branch only, and types what follows a return)
        lane = tl.arange(0, ROWS)
        column = tl.arange(0, DP)
        inside = ((row + lane >= 0) & (row + lane < limit))[:, None]
        p_tile = _address(p_base, stride, row, lane[:, None], inside, p_table, page_stride, PAGE) + column[None, :]
        if DP != D:
            inside = inside & (column < D)[None, :]
        return tl.load(p_tile, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _gather_rows(
    p_base, stride, b_row, D: tl.constexpr, DP: tl.constexpr, p_table=None, page_stride=None, PAGE: tl.constexpr = 0
):  # fmt: skip
    """(len(b_row), DP): rows of one head, by number."""
    column = tl.arange(0, DP)
    b_row = b_row.to(tl.int64)[:, None]
    p_tile = _address(p_base, stride, 0, b_row, b_row >= 0, p_table, page_stride, PAGE) + column[None, :]
    if DP != D:
        return tl.load(p_tile, mask=(column < D)[None, :], other=0.0)
    else:  # noqa: RET505
        return tl.load(p_tile)


@triton.jit
@no_type_check
def _logits(b_q, b_k, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BN): q.k, or the capped logits; `factor` of the softmax turns either into powers of 2."""
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if SOFTCAP:  # tanh by its exponential: no library call, so that the interpreter runs it too
        b_s = cap - 2.0 * cap / (1.0 + tl.math.exp2(b_s * (scale / cap * 2.0 * LOG2E)))
    return b_s


@triton.jit
@no_type_check
def _mask_tile(b_s, q_pos, low, pos, flags, sink, RULE: tl.constexpr, MASKED: tl.constexpr = MASKED):
    """Causality (flag 1) and the token rule (flag 2): a key stays iff low < key <= query, or key < sink."""
    k_pos = pos + tl.arange(0, b_s.shape[1])
    last = tl.where((flags & 1) != 0, q_pos, 0x7FFFFFFF)
    keep = k_pos[None, :] <= last[:, None]
    if RULE:
        first = tl.where((flags & 2) != 0, low, -1)
        keep = keep & (tl.where(k_pos < sink, 0x7FFFFFFF, k_pos)[None, :] > first[:, None])
    return tl.where(keep, b_s, MASKED)


@triton.jit
@no_type_check
def _softmax_step(b_s, b_v, m, norm, acc, factor, PRECISION: tl.constexpr):
    """One tile of the running softmax, in powers of 2: m is the maximum of logits * factor, at first UNSEEN, norm the
    sum."""
    m_new = tl.maximum(m, tl.max(b_s, 1) * factor)
    b_p = tl.math.exp2(b_s * factor - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    norm = norm * alpha + tl.sum(b_p, 1)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, norm, acc


@triton.jit
@no_type_check
def _finish(m, norm, acc, p_sink, i_head, inside):
    """(out, lse) of finished rows: the sink logit joins; rows outside the call or without keys give 0 and -inf.

    A row that saw no key has a sum of exactly 0. The maximum would not tell: one of NaN logits stays UNSEEN.
    """
    seen = inside & (norm != 0)
    if p_sink is not None:
        sink = tl.load(p_sink + i_head).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        shrink = tl.math.exp2(m - top)
        norm = norm * shrink + tl.math.exp2(sink - top)
        acc = acc * shrink[:, None]
        m = top
    norm = tl.where(seen, norm, 1.0)
    out = tl.where(seen[:, None], acc * (1.0 / norm)[:, None], 0.0)
    return out, tl.where(seen, (m + tl.math.log2(norm)) * LN2, float("-inf"))


@triton.jit
@no_type_check
def _store_rows(
    out, lse, p_out, p_lse, o_batch, o_head, o_token, i_batch, i_head, heads, row, q_len,
    D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes rows `row ..` of out (through pointers) and lse, those inside the tensor."""
    lane = tl.arange(0, out.shape[0])
    inside = (row + lane >= 0) & (row + lane < q_len)
    if p_out is not None and (not TMA or row < 0):
        column = tl.arange(0, DP)
        p_tile = (
            p_out + _offset(i_batch, i_head, row, o_batch, o_head, o_token) + lane[:, None] * o_token + column[None, :]
        )
        tl.store(p_tile, out.to(p_out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    if p_lse is not None:
        p_row = p_lse + (i_batch.to(tl.int64) * heads + i_head) * q_len + row
        tl.store(p_row + lane, lse, mask=inside)


@triton.jit
@no_type_check
def _place(
    i_item, p_order, p_span, rows, samples, batch_per, q_offset,
    SUB_Q: tl.constexpr, BM: tl.constexpr, Q_STEP: tl.constexpr,
):  # fmt: skip
    """Which rows a work item is: (plan sample, plan tile, batch sample, first position, its index in q, span).

    Items run through the plan's order; below that, through the samples of a plan sample, and the parts of a tile.
    With Q_STEP above 1 q holds every Q_STEP-th query, in tiles from row 0 on; the first position may then lie before
    the first query's.
    """
    sub = i_item % SUB_Q
    at = i_item // SUB_Q // batch_per
    if p_order is not None:
        place = tl.load(p_order + at)
        i_sample = place // rows
        i_tile = place % rows
    else:  # a dense plan: the last tiles are the heaviest
        i_sample = at % samples
        i_tile = rows - 1 - at // samples
    i_batch = tl.where(samples > 1, i_sample, i_item // SUB_Q % batch_per)
    q_first = tl.load(p_span + i_batch * 4)
    q_end = tl.load(p_span + i_batch * 4 + 1)
    keys = tl.load(p_span + i_batch * 4 + 2)
    start = tl.load(p_span + i_batch * 4 + 3)
    if Q_STEP > 1:
        row = i_tile * (SUB_Q * BM) + sub * BM
        pos = (q_first // Q_STEP + row) * Q_STEP
        return i_sample, i_tile, i_batch, pos, row, start, q_first, q_end, keys
    pos = (q_first // (SUB_Q * BM) + i_tile) * (SUB_Q * BM) + sub * BM
    return i_sample, i_tile, i_batch, pos, pos + start - q_offset, start, q_first, q_end, keys


@triton.jit
@no_type_check
def _query_positions(pos, q_first, lane, Q_STEP: tl.constexpr):
    """Of the rows `lane` after the one at `pos`: of every Q_STEP-th query, the first of its block in this call."""
    if Q_STEP > 1:
        return tl.maximum(pos + lane * Q_STEP, q_first)
    else:  # noqa: RET505  (Triton compiles one branch only, and types what follows a return)
        return pos + lane


@triton.jit
@no_type_check
def _whole(length, STEP: tl.constexpr):
    """A row's length in whole steps: still its own memory, and loads of 16 bytes (`load_step`)."""
    return (length + STEP - 1) // STEP * STEP


@triton.jit
@no_type_check
def _ones(word):
    """Bits set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)

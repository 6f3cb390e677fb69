"""THE shared kernel in portable Triton, and its launcher: every plan, every CUDA device, and Triton's interpreter.

A program owns `block_m` queries of one head and walks the tiles of its row with a running softmax: one loop, in which
only flagged tiles pay for a mask, after another one for single key columns. Rows that are dense by bounds walk the same
loop on computed tiles. The kernel's own tile divides the plan's, so a plan is made once and runs on any architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels.attend.tiles import SHORT_ROW_STEPS, Tile, tile_for
from sparsekit.kernels.attend.triton_e4m3 import HEADROOM, _rounded_rows, _scales_of, _softmax_step_e4m3, quantised
from sparsekit.kernels.device import capability_of, processors_of
from sparsekit.kernels.launch import (
    _check,
    _descriptor,
    _descriptor_fields,
    _has_tma,
    _intern,
    _padded,
    _pointer_form,
    _precision,
    _start,
    _steps_fit_tma,
    on_device,
    steps_of,
)
from sparsekit.kernels.primitives import (
    LOG2E,
    MASKED,
    UNSEEN,
    _finish,
    _gather_rows,
    _load_rows,
    _logits,
    _mask_tile,
    _offset,
    _place,
    _query_positions,
    _softmax_step,
    _store_rows,
)
from sparsekit.plan import BlockPlan, span_numbers
from sparsekit.plan.memo import TRITON

__all__ = ["attend_triton", "attend_triton_fp8"]


@triton.jit
@no_type_check
def _load_values(
    desc, p_base, stride, i_batch, i_head, i_first, row, limit,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr, p_table, page_stride, PAGE: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    """`_load_rows` of V; in e4m3 (DP, ROWS), all inside."""
    if not E4M3:
        return _load_rows(
            desc, p_base, stride, i_batch, i_head, i_first, row, limit, ROWS, D, DP, TMA, p_table, page_stride, PAGE
        )
    elif TMA:  # noqa: RET505  (Triton compiles one branch only, and types what follows a return)
        return desc.load([i_batch, i_head, 0, row]).reshape(DP, ROWS)
    else:
        key = row // ROWS * ROWS + tl.arange(0, ROWS)  # as the compiler cannot know otherwise
        return tl.load(p_base + tl.arange(0, DP)[:, None] * stride + key[None, :])


@triton.jit
@no_type_check
def _products(
    b_q, b_k, q_scale, p_scales, m, pos, scale, cap, factor, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(logits, the factor that makes them powers of 2, log2 of the values' scale) of the keys from `pos` on.

    Products of e4m3 are logits by that factor alone, but under a soft-cap.
    """
    if p_scales is None:
        return _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION), factor, 0.0
    else:  # noqa: RET505
        k_scale, v_log = _scales_of(p_scales, pos)
        by = (m * 0.0 + k_scale) * q_scale  # in m's layout, into which q_scale comes once and not in each step
        b_s = _logits(b_q, b_k, (by * scale)[:, None], cap, SOFTCAP, PRECISION)
        return b_s, by * 0.0 + factor if SOFTCAP else by * factor, v_log


@triton.jit
@no_type_check
def _add_values(
    b_s, b_v, m, norm, acc, factor, v_log, PRECISION: tl.constexpr, SUMMED: tl.constexpr, E4M3: tl.constexpr
):
    """A tile of the running softmax, in either precision."""
    if E4M3:
        return _softmax_step_e4m3(b_s, b_v, m, norm, acc, factor, v_log, SUMMED)
    else:  # noqa: RET505
        return _softmax_step(b_s, b_v, m, norm, acc, factor, PRECISION)


# Numbers that differ from call to call must not compile a kernel each.
_UNSPECIALIZED = ["scale", "cap", "q_offset", "q_len", "rows", "samples", "batch_per", "rule_sample", "rule_head",
                  "n_tokens", "n_words", "long_rows", "chunks", "table_sample", "blocks"]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=["p_table"])
@no_type_check
def _attend(
    d_q, d_k, d_v, d_out, p_q, p_k, p_v, p_out, p_lse, p_sink, p_part, p_span,
    p_row, p_entry, p_rule, p_dense, p_token, p_bit, p_order, p_table, p_scales, p_common,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    scale, cap, q_offset, q_len, rows, samples, batch_per, rule_sample, rule_head, n_tokens, n_words, long_rows, chunks,
    table_sample, blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PLAN_HEADS: tl.constexpr, AT_ONCE: tl.constexpr, SUB_Q: tl.constexpr,
    SUB_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, COLUMN_GROUPS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, Q_STEP: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. Pointers that a call does not need are None, and their code is not compiled.

    p_scales, p_common: what `quantised` made besides K and V in e4m3, whose key 0 is a sample's first. Then products
    are of e4m3, and SUMMED is what Triton is told of their sum.
    """
    # Consecutive programs walk the query heads of one row, so that the heads of a key head share K and V in L2.
    i_program = tl.program_id(0)
    # AT_ONCE heads at a time, long rows of all heads before all others: they would decide the finish.
    n_long = long_rows * chunks
    section_programs = tl.maximum(tl.num_programs(0) // HEADS - n_long, 1) * AT_ONCE
    after = i_program - n_long * HEADS
    is_long = after < 0
    i_head = tl.where(is_long, i_program % HEADS, after // section_programs * AT_ONCE + after % AT_ONCE)
    i_item = tl.where(is_long, i_program // HEADS, n_long + after % section_programs // AT_ONCE)
    i_chunk = 0
    n_chunks = 1
    if p_part is not None:
        i_chunk = tl.where(is_long, i_item % chunks, 0)
        n_chunks = tl.where(is_long, chunks, 1)
        i_item = tl.where(is_long, i_item // chunks, i_item - long_rows * (chunks - 1))
    i_sample, i_tile, i_batch, pos0, row0, start, q_first, q_end, keys = _place(
        i_item, p_order, p_span, rows, samples, batch_per, q_offset, SUB_Q, BM, Q_STEP
    )
    i_key_head = i_head // GROUP
    i_plan_head = i_head // (HEADS // PLAN_HEADS)
    i_row = (i_sample * PLAN_HEADS + i_plan_head) * rows + i_tile
    q_low = tl.maximum(pos0, q_first)
    if Q_STEP > 1:
        last = tl.minimum(pos0 + (BM - 1) * Q_STEP, (q_end - 1) // Q_STEP * Q_STEP)
        q_high = tl.minimum(tl.maximum(last, q_first) + 1, q_end)
    else:
        q_high = tl.minimum(pos0 + BM, q_end)  # one past the last query
    q_pos = _query_positions(pos0, q_first, tl.arange(0, BM), Q_STEP)
    factor = LOG2E if SOFTCAP else scale * LOG2E

    causal_steps = tl.where(q_high > q_low, (q_high + BN - 1) // BN, 0)
    if p_row is not None:  # what the row holds: asked for before q, whose load waits
        first = tl.load(p_row + i_row)
        steps = (tl.load(p_row + i_row + 1) - first).to(tl.int32) * SUB_K
        listed = True
        if p_dense is not None:
            listed = tl.load(p_dense + i_row) == 0
            steps = tl.where(listed, steps, causal_steps)
        steps = tl.where(q_high > q_low, steps, 0)
        p_entries = p_entry + first
        sink = 0
        low = q_pos
        if p_rule is not None:
            p_limits = p_rule + i_sample * rule_sample + i_plan_head * rule_head
            sink = tl.load(p_limits)
            low = tl.where(q_pos >= tl.load(p_limits + 2), -1, q_pos - tl.load(p_limits + 1))
        if SUB_Q > 1:  # the plan's last tiles may lie wholly ahead of this part of its row
            LAST: tl.constexpr = triton.next_power_of_2(triton.cdiv((SUB_Q - 1) * BM, BN))
            i_last = tl.where(listed, steps - 1 - tl.arange(0, LAST), -1)
            b_entry = tl.load(p_entries + i_last // SUB_K, mask=i_last >= 0, other=0)
            behind = (i_last >= 0) & ((b_entry >> 2) + i_last % SUB_K * BN < q_high)
            reached = tl.maximum(tl.max(tl.where(behind, i_last + 1, 0), 0), steps - LAST)
            steps = tl.where(listed, reached, steps)

    first_key = start if p_scales is None else 0
    if p_q is not None:
        p_q += _offset(i_batch, i_head, 0, q_batch, q_head, q_token)
    if p_table is not None:  # a step in `k_batch` is one to the next page
        p_table += tl.cast(i_batch, tl.int64) * table_sample
        p_k += _offset(0, i_key_head, 0, k_batch, k_head, k_token)
        p_v += _offset(0, i_key_head, 0, v_batch, v_head, v_token)
    elif p_k is not None:
        p_k += _offset(i_batch, i_key_head, first_key, k_batch, k_head, k_token)
        p_v += _offset(i_batch, i_key_head, first_key, v_batch, v_head, v_token)
    b_q = _load_rows(d_q, p_q, q_token, i_batch, i_head, 0, row0, q_len, BM, D, DP, TMA)
    E4M3: tl.constexpr = p_scales is not None
    UNKEPT: tl.constexpr = float("-inf") if E4M3 else MASKED  # however small scales are
    q_scale = 1.0
    if E4M3:
        i_pair = i_batch * (HEADS // GROUP) + i_key_head
        p_scales += i_pair * blocks * 2
        p_common += i_pair * 2 * D + tl.arange(0, D)
        # What was taken off the keys is taken off all logits of a row; nothing, where a soft-cap would see it.
        shift = tl.sum(b_q.to(tl.float32) * tl.load(p_common).to(tl.float32)[None, :], 1) * factor
        b_q, q_scale = _rounded_rows(b_q)

    m = tl.full([BM], UNSEEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)

    if p_token is not None:
        p_tokens = p_token + (i_sample * PLAN_HEADS + i_plan_head).to(tl.int64) * n_tokens
        p_bits = p_bit + i_row.to(tl.int64) * n_words
        # They come before the tiles: after them, ptxas 13.0 serialises the wgmma of both loops (C7515).
        # Groups of BC columns between the first and the last that this row needs and may see.
        group = tl.arange(0, COLUMN_GROUPS)
        word = group[:, None] * (BC // 32) + tl.arange(0, BC // 32)[None, :]
        used = tl.max((tl.load(p_bits + word, mask=word < n_words, other=0) != 0).to(tl.int32), 1)
        earliest = tl.load(p_tokens + group * BC, mask=group * BC < n_tokens, other=0x7FFFFFFF)
        used = (used != 0) & (earliest < q_high) & (q_high > q_low) & (i_chunk == 0)
        low_step = tl.min(tl.where(used, group, COLUMN_GROUPS), 0)
        high_step = tl.max(tl.where(used, group + 1, 0), 0)
        for i in tl.range(low_step, high_step, num_stages=STAGES):
            at = i * BC + tl.arange(0, BC)
            key = tl.load(p_tokens + at, mask=at < n_tokens, other=0)
            bits = tl.load(p_bits + at // 32, mask=at < n_tokens, other=0)
            needed = (((bits >> (at % 32)) & 1) != 0) & (key < keys)
            key = tl.where(needed, key, 0)
            b_k = _gather_rows(p_k, k_token, key, D, DP, p_table, k_batch, PAGE)
            b_s = _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
            b_s = tl.where(needed[None, :] & (key[None, :] <= q_pos[:, None]), b_s, MASKED)
            b_v = _gather_rows(p_v, v_token, key, D, DP, p_table, v_batch, PAGE)
            m, norm, acc = _softmax_step(b_s, b_v, m, norm, acc, factor, PRECISION)

    if p_row is None:  # dense everywhere: no index memory, and the tiles below the diagonal in a loop without a mask
        low_step = causal_steps * i_chunk // n_chunks
        high_step = causal_steps * (i_chunk + 1) // n_chunks
        whole = tl.minimum(tl.maximum((q_low + 1) // BN, low_step), high_step)
        for i in tl.range(low_step, whole, num_stages=STAGES):
            b_k = _load_rows(
                d_k, p_k, k_token, i_batch, i_key_head, first_key, i * BN, keys, BN, D, DP, TMA,
                p_table, k_batch, PAGE,
            )  # fmt: skip
            b_s, by, v_log = _products(b_q, b_k, q_scale, p_scales, m, i * BN, scale, cap, factor, SOFTCAP, PRECISION)
            b_v = _load_values(
                d_v, p_v, v_token, i_batch, i_key_head, first_key, i * BN, keys, BN, D, DP, TMA,
                p_table, v_batch, PAGE, E4M3,
            )  # fmt: skip
            m, norm, acc = _add_values(b_s, b_v, m, norm, acc, by, v_log, PRECISION, SUMMED, E4M3)
        for i in tl.range(whole, high_step, num_stages=STAGES):
            b_k = _load_rows(
                d_k, p_k, k_token, i_batch, i_key_head, first_key, i * BN, keys, BN, D, DP, TMA,
                p_table, k_batch, PAGE,
            )  # fmt: skip
            b_s, by, v_log = _products(b_q, b_k, q_scale, p_scales, m, i * BN, scale, cap, factor, SOFTCAP, PRECISION)
            b_s = _mask_tile(b_s, q_pos, q_pos, i * BN, 1, 0, False, UNKEPT)
            b_v = _load_values(
                d_v, p_v, v_token, i_batch, i_key_head, first_key, i * BN, keys, BN, D, DP, TMA,
                p_table, v_batch, PAGE, E4M3,
            )  # fmt: skip
            m, norm, acc = _add_values(b_s, b_v, m, norm, acc, by, v_log, PRECISION, SUMMED, E4M3)
    else:
        low_step = steps * i_chunk // n_chunks
        high_step = steps * (i_chunk + 1) // n_chunks
        for i in tl.range(low_step, high_step, num_stages=STAGES):
            if p_dense is not None:
                entry = tl.load(p_entries + i // SUB_K, mask=listed, other=1)
                pos = tl.where(listed, (entry >> 2) + i % SUB_K * BN, i * BN)
            else:
                entry = tl.load(p_entries + i // SUB_K)
                pos = (entry >> 2) + i % SUB_K * BN
            # The flag speaks for the plan's tile; a part of it that ends at the first query needs no causal mask.
            flags = tl.where(pos + BN - 1 > q_low, entry & 3, entry & 2)
            b_k = _load_rows(
                d_k, p_k, k_token, i_batch, i_key_head, first_key, pos, keys, BN, D, DP, TMA,
                p_table, k_batch, PAGE,
            )  # fmt: skip
            b_s, by, v_log = _products(b_q, b_k, q_scale, p_scales, m, pos, scale, cap, factor, SOFTCAP, PRECISION)
            if flags != 0:
                b_s = _mask_tile(b_s, q_pos, low, pos, flags, sink, p_rule is not None, UNKEPT)
            b_v = _load_values(
                d_v, p_v, v_token, i_batch, i_key_head, first_key, pos, keys, BN, D, DP, TMA,
                p_table, v_batch, PAGE, E4M3,
            )  # fmt: skip
            m, norm, acc = _add_values(b_s, b_v, m, norm, acc, by, v_log, PRECISION, SUMMED, E4M3)

    if E4M3:  # what was taken off comes back, and the frame of the weights
        m += shift - HEADROOM
        acc += norm[:, None] * tl.load(p_common + D).to(tl.float32)[None, :]

    whole_row = True
    if p_part is not None:
        whole_row = n_chunks == 1
        if n_chunks > 1:
            p_mine = p_part + ((i_item * chunks + i_chunk).to(tl.int64) * HEADS + i_head) * (BM * (DP + 2))
            lane = tl.arange(0, BM)
            tl.store(p_mine + lane[:, None] * DP + tl.arange(0, DP)[None, :], acc)
            tl.store(p_mine + BM * DP + lane, m)
            tl.store(p_mine + BM * DP + BM + lane, norm)
    if whole_row:
        out, lse = _finish(m, norm, acc, p_sink, i_head, (q_pos >= q_first) & (q_pos < q_end))
        if TMA:  # noqa: SIM102  (a choice of the compiler, then one of the program)
            # The copy engine clips a store past the end; one before the start is an illegal instruction (H100).
            if row0 >= 0:
                d_out.store([i_batch, i_head, row0, 0], out.to(d_out.dtype).reshape(1, 1, BM, DP))
        _store_rows(out, lse, p_out, p_lse, o_batch, o_head, o_token, i_batch, i_head, HEADS, row0, q_len, D, DP, TMA)


@triton.jit(do_not_specialize=["q_offset", "q_len", "rows", "samples", "batch_per", "chunks"])
@no_type_check
def _merge(
    p_part, p_out, p_lse, p_sink, p_span, p_order, o_batch, o_head, o_token,
    q_offset, q_len, rows, samples, batch_per, chunks,
    HEADS: tl.constexpr, SUB_Q: tl.constexpr, BM: tl.constexpr, STRIP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    Q_STEP: tl.constexpr,
):  # fmt: skip
    """Rows that were cut over keys: partial softmaxes joined in order, so that a result repeats bit for bit."""
    i_program = tl.program_id(0)
    strip = i_program % (BM // STRIP) * STRIP
    i_head = i_program // (BM // STRIP) % HEADS
    i_item = i_program // (BM // STRIP) // HEADS
    _, _, i_batch, pos0, row0, _, q_first, q_end, _ = _place(
        i_item, p_order, p_span, rows, samples, batch_per, q_offset, SUB_Q, BM, Q_STEP
    )
    lane = strip + tl.arange(0, STRIP)
    m = tl.full([STRIP], UNSEEN, tl.float32)
    norm = tl.zeros([STRIP], tl.float32)
    acc = tl.zeros([STRIP, DP], tl.float32)
    for i in range(chunks):
        p_one = p_part + ((i_item * chunks + i).to(tl.int64) * HEADS + i_head) * (BM * (DP + 2))
        m_one = tl.load(p_one + BM * DP + lane)
        m_new = tl.maximum(m, m_one)
        old = tl.math.exp2(m - m_new)
        new = tl.math.exp2(m_one - m_new)
        norm = norm * old + tl.load(p_one + BM * DP + BM + lane) * new
        b_one = tl.load(p_one + lane[:, None] * DP + tl.arange(0, DP)[None, :])
        acc = acc * old[:, None] + b_one * new[:, None]
        m = m_new
    q_pos = _query_positions(pos0, q_first, lane, Q_STEP)
    out, lse = _finish(m, norm, acc, p_sink, i_head, (q_pos >= q_first) & (q_pos < q_end))
    _store_rows(
        out, lse, p_out, p_lse, o_batch, o_head, o_token, i_batch, i_head, HEADS, row0 + strip, q_len, D, DP, False
    )


COLUMN_BLOCK = 32  # single columns a step: Triangle + 1024 at 128K 9.8 ms, 64 a step 12.3 ms (H100)
# Rows that are cut over keys: a chunk has at least so many tiles, and all partial results together so many bytes at
# most (or 1/64 of q, k, v and out).
MIN_CHUNK_STEPS = 16
MAX_CHUNKS = 64
PARTIAL_BYTES = 1 << 25
STRIP = 16


def attend_triton(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None,
    rounded: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the pairs of `plan`. No host synchronisation; what is derived from the plan stays with it.

    Args:
        q: (B, H, Q, D), D out of `HEAD_SIZES`, any strides with the last one 1; likewise keys, and out.
        rounded: scales, and what was taken off, of keys that `quantised` made.

    Returns:
        `out`, or a new (B, H, Q, D), laid out as (B, Q, H, D), and lse (B, H, Q) float32 where asked for.

    Raises:
        SparsekitError: a dtype, head size or stride that the kernel does not take.
    """
    _check(q, keys.k, keys.v)
    if plan.ranked is not None:
        from sparsekit.kernels.attend.triton_ranked import attend_ranked_triton

        return attend_ranked_triton(q, keys, plan, plan.ranked, softmax, return_lse, out)
    launch = _launch_for(q, keys, plan)
    batch, heads, q_len, _ = q.shape
    out = output(q, out, launch.padded)
    lse = None
    if return_lse:
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
        if launch.padded:
            lse.fill_(float("-inf"))
    if q.device.type == "cuda" and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            launch.run(q, keys, out, lse, softmax, rounded)
    else:
        launch.run(q, keys, out, lse, softmax, rounded)
    return out, lse


def attend_triton_fp8(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same with e4m3 products, for calls that fp8.py covers; k and v are rounded here, in each call."""
    with on_device(q.device):
        k8, v8, scales, common = quantised(keys, plan.geometry, softmax.softcap is None, True)
        return attend_triton(q, Keys(k8, v8), plan, softmax, return_lse, out, (scales, common))


class _Layout(NamedTuple):
    """What follows from the strides of q, k, v: whether the copy engine takes them, descriptors but for addresses."""

    tma: bool
    descriptors: tuple[dict[str, Any], ...]
    tma_steps: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class _Launch:
    """All of a launch that follows from the plan and the shapes; a call adds its tensors."""

    device: torch.device
    padded: bool
    early: bool  # whether a query tile begins before the first query
    tma: bool
    grid: tuple[int]
    merge_grid: tuple[int]
    tile: Tile
    key_rows: int  # rows of k that hold valid keys: the copy engine writes zeros for all others
    partials: int  # floats
    plan: tuple[Tensor | None, ...]  # spans, row_ptr, entries, rule, dense_rows, tokens, token_bits, order
    numbers: tuple[int, ...]
    form: int  # number of what Triton compiles for, of all this
    options: dict[str, Any]
    merge_options: dict[str, Any]
    layouts: dict[Any, _Layout] = field(default_factory=dict)

    def run(
        self, q: Tensor, keys: Keys, out: Tensor, lse: Tensor | None, softmax: Softmax,
        rounded: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:  # fmt: skip
        form, args, flags = self.arguments(q, keys, out, lse, softmax, rounded)
        _start(_attend, form, self.grid, args, self.options, flags)
        if self.merge_grid[0]:
            spans, order, sinks = self.plan[0], self.plan[7], softmax.sink_logits
            q_offset, q_len, rows, samples, batch_per, *_, chunks = self.numbers
            steps = steps_of(out)
            numbers = (*steps, q_offset, q_len, rows, samples, batch_per, chunks)
            merge_form = (self.form, lse is None, _pointer_form(sinks), _pointer_form(out), steps)
            merge_args = (args[10], out, lse, sinks, spans, order, *numbers)
            _start(_merge, merge_form, self.merge_grid, merge_args, self.merge_options, {})

    def arguments(
        self, q: Tensor, keys: Keys, out: Tensor, lse: Tensor | None, softmax: Softmax,
        rounded: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        """What `_attend` is compiled for, its arguments, and the options that the call decides."""
        spans, row_ptr, entries, rule, dense, tokens, bits, order = self.plan
        k, v, table = keys
        strides = q.stride(), k.stride(), v.stride(), out.stride()
        layout = self.layouts.get(strides)
        if layout is None:
            layout = self.layouts[strides] = self._layout(q, k, v, out)
        tma = layout.tma and not (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) & 15
        descriptors: tuple[Any, ...] = (None,) * 4
        pointers: tuple[Any, ...] = (q, k, v, out)
        if tma:
            descriptors = tuple(map(_descriptor, (q, k, v, out), layout.descriptors))
            # Through pointers go only single columns, and the store of a tile that begins before the first query.
            columns = tokens is not None
            pointers = (None, k if columns else None, v if columns else None, out if self.early else None)
        steps = layout.tma_steps if tma else layout.steps
        part = None
        if self.partials:
            part = torch.empty(self.partials, dtype=torch.float32, device=q.device)
        sinks, capped = softmax.sink_logits, softmax.softcap is not None
        args = (
            *descriptors, *pointers, lse, sinks, part, spans, row_ptr, entries, rule, dense, tokens, bits, order,
            table, *rounded, *steps, float(softmax.scale), float(softmax.softcap or 1.0), *self.numbers,
            None if table is None else table.stride(0), None if rounded[0] is None else rounded[0].shape[2],
        )  # fmt: skip
        form = (self.form, tma, capped, lse is None, *map(_pointer_form, (sinks, *pointers)), steps)
        return form, args, {"TMA": tma, "SOFTCAP": capped}

    def _layout(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> _Layout:
        m, n, dim = self.tile.block_m, self.tile.block_n, self.options["DP"]
        of_values = (v, self.key_rows, n, dim) if v.dtype == q.dtype else (v, dim, dim, n)  # `quantised` transposes V
        boxes = (q, q.shape[2], m, dim), (k, self.key_rows, n, dim), of_values, (out, out.shape[2], m, dim)
        steps = steps_of(q, k, v, out)
        keys = steps[3:9] if self.plan[5] is not None else (0,) * 6
        tma_steps = (0, 0, 0, *keys, *(steps[9:] if self.early else (0, 0, 0)))
        return _Layout(
            self.tma and all(_steps_fit_tma(tensor) for tensor, *_ in boxes),
            tuple(_descriptor_fields(*box) for box in boxes),
            tma_steps,
            steps,
        )


def _launch_for(q: Tensor, keys: Keys, plan: BlockPlan) -> _Launch:
    key = (TRITON, q.shape[1], keys.k.shape[1], keys.page, q.shape[3], q.dtype, keys.k.dtype, q.device)
    launch: _Launch | None = plan.memo.get(key)
    if launch is None:
        capability = capability_of(q.device)
        tile = tile_for(capability, q.shape[3], keys.k.dtype, _rows_are_short(plan))
        launch = plan.memo.keep(key, _make_launch(q, keys, plan, tile, capability))
    return launch


def _rows_are_short(plan: BlockPlan) -> bool:
    """By what the host knows: the entries there is room for, a row."""
    if plan.entries is None or plan.long_rows * 8 > plan.rows:
        return False
    return plan.entries.numel() <= SHORT_ROW_STEPS * plan.samples * plan.heads * plan.rows


def _make_launch(q: Tensor, keys: Keys, plan: BlockPlan, tile: Tile, capability: tuple[int, int]) -> _Launch:
    batch, heads, q_len, dim = q.shape
    key_heads, g = keys.k.shape[1], plan.geometry
    tile = tile._replace(block_m=min(tile.block_m, plan.block_q), block_n=min(tile.block_n, plan.block_kv))
    sub_q, sub_k = plan.block_q // tile.block_m, plan.block_kv // tile.block_n
    padded_dim, batch_per = _padded(dim), batch // plan.samples
    per_row = batch_per * sub_q
    long_rows, chunks = _cut(q, key_heads, plan, tile)
    items = plan.samples * plan.rows * per_row + long_rows * per_row * (chunks - 1)
    rule_sample, rule_head, n_tokens, n_words, groups = 0, 0, 0, 0, 1
    if plan.rule is not None:
        rule_sample = plan.rule.stride(0) if plan.rule.shape[0] > 1 else 0
        rule_head = plan.rule.stride(1) if plan.rule.shape[1] > 1 else 0
    if plan.tokens is not None and plan.token_bits is not None:
        n_tokens, n_words = plan.tokens.shape[-1], plan.token_bits.shape[-1]
        groups = _padded(max(-(-n_tokens // COLUMN_BLOCK), 1))
    shared = {"HEADS": heads, "SUB_Q": sub_q, "BM": tile.block_m, "D": dim, "DP": padded_dim, "Q_STEP": g.q_step}
    options = {
        **shared,
        "GROUP": heads // key_heads,
        "PLAN_HEADS": plan.heads,
        "AT_ONCE": heads if plan.heads == 1 and not plan.all_dense else heads // key_heads,
        "SUB_K": sub_k,
        "BN": tile.block_n,
        "PAGE": keys.page,
        "BC": COLUMN_BLOCK,
        "COLUMN_GROUPS": groups,
        "STAGES": tile.stages,
        "PRECISION": _precision(capability, q.dtype),
        "SUMMED": None if keys.k.dtype == q.dtype or capability[0] == 9 else tile.block_n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # a multiply-add a logit; Triton 3.10 turns it off by default
    }
    dense = plan.dense_rows if plan.dense_rows is None else plan.dense_rows.view(torch.uint8)
    numbers = (g.q_offset, q_len, plan.rows, plan.samples, batch_per, rule_sample, rule_head, n_tokens, n_words)
    partials = long_rows * per_row * chunks * heads
    plan_tensors = (
        span_numbers(g, g.batch, q.device), plan.row_ptr, plan.entries, plan.rule, dense, plan.tokens, plan.token_bits,
        plan.order,
    )  # fmt: skip
    return _Launch(
        device=q.device,
        padded=g.padded,
        early=g.q_step == 1
        and any(g.q_index(b, span.q_first // plan.block_q * plan.block_q) < 0 for b, span in enumerate(g.spans)),
        tma=_has_tma(q.device) and not keys.page,
        grid=(items * heads,),
        merge_grid=(long_rows * per_row * heads * (tile.block_m // STRIP) if chunks > 1 else 0,),
        tile=tile,
        key_rows=max(max(g.kv_end), 1) if keys.k.dtype == q.dtype else keys.k.shape[2],
        partials=partials * tile.block_m * (padded_dim + 2) if chunks > 1 else 0,
        plan=plan_tensors,
        numbers=(*numbers, long_rows * per_row, chunks),
        form=_intern(
            (q.device, q.dtype, keys.k.dtype, chunks > 1, *options.values(), *map(_pointer_form, plan_tensors))
        ),
        options=options,
        merge_options={**shared, "STRIP": STRIP, "num_warps": 4},
    )  # fmt: skip


def _cut(q: Tensor, key_heads: int, plan: BlockPlan, tile: Tile) -> tuple[int, int]:
    """(long plan rows, chunks each): cut over keys so that none runs longer than a quarter of the whole launch.

    Host arithmetic on shapes. Triangle's last rows at 128K are a chain of 2048 tiles: with 32 heads the rest hides it,
    8 heads leave 800 tiles a processor. H100, 8 heads: 4.0 ms whole, 1.2 ms cut.
    """
    g, heads, batch = plan.geometry, q.shape[1], q.shape[0]
    per_row = batch // plan.samples * (plan.block_q // tile.block_m)
    known = plan.samples * plan.rows if plan.all_dense else min(plan.long_rows, plan.samples * plan.rows)
    whole = (0 if plan.all_dense else known), 1
    longest = max(-(-span.q_end // tile.block_n) for span in g.spans)
    if not known or longest < 2 * MIN_CHUNK_STEPS:
        return whole
    total = float(known * per_row * heads * longest)
    if plan.entries is not None:
        listed = plan.entries.numel() * (plan.block_kv // tile.block_n) * (plan.block_q // tile.block_m)
        total += listed * (heads // plan.heads) * (batch // plan.samples)
    share = total / processors_of(q.device)
    if longest <= share:
        return whole
    partial = known * per_row * heads * tile.block_m * (_padded(q.shape[3]) + 2) * 4
    key_bytes = batch * key_heads * g.kv_len * q.shape[3] * q.element_size()
    budget = max(PARTIAL_BYTES, (2 * q.nbytes + 2 * key_bytes) // 64)
    chunks = min(math.ceil(4 * longest / share), longest // MIN_CHUNK_STEPS, MAX_CHUNKS, budget // partial)
    return (known, chunks) if chunks > 1 else whole

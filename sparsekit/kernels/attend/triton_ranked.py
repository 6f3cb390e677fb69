"""Attention over a ranked plan in portable Triton, and its launcher.

The inner step is that of `triton_blocks.py`, in two loops: the query tile's own segment, then gathered key tiles in
order of importance, until none of them matters any more. Queries are gathered too, and results scattered; nothing is
permuted in memory.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.errors import SparsekitError
from sparsekit.kernels.attend.tiles import Tile, tile_for
from sparsekit.kernels.device import capability_of
from sparsekit.kernels.launch import _padded, _pointer_form, _precision, _start, on_device, steps_of
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
    _softmax_step,
)
from sparsekit.plan import BlockPlan, Ranked, span_numbers
from sparsekit.plan.memo import VISITED
from sparsekit.plan.rows import nothing_visited

__all__ = ["CHECK", "attend_ranked_triton"]

# Tiles between two looks at the stop. The loop over them has a fixed length, so that Triton loads ahead in it; a tile
# past the stop is computed and masked out.
CHECK = 4


@triton.jit
@no_type_check
def _walk_step(b_s, b_v, m, norm, acc, total, factor, PRECISION: tl.constexpr):
    """`_softmax_step`, and the sum of the key tile so far: `total` comes in and goes out in the frame of m."""
    m_new = tl.maximum(m, tl.max(b_s, 1) * factor)
    b_p = tl.math.exp2(b_s * factor - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    part = tl.sum(b_p, 1)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, norm * alpha + part, acc, total * alpha + part


_UNSPECIALIZED = ["scale", "cap", "tau", "patience", "q_offset", "q_len", "samples", "segments", "segment_tokens",
                  "head_keys", "table_sample"]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
@no_type_check
def _attend_ranked(
    p_q, p_k, p_v, p_out, p_lse, p_sink, p_span, p_index, p_key, p_ptr, p_visited,
    p_table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    scale, cap, tau, patience, q_offset, q_len, samples, segments, segment_tokens, head_keys, table_sample,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUB: tl.constexpr, CHECK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of one segment and head. SUB steps of BN keys are one key tile of the plan."""
    # The query tiles of a segment share their key list, hence its keys, in L2; the last segments may walk farthest.
    i_program = tl.program_id(0)
    i_tile = i_program % TILES
    i_head = i_program // TILES % HEADS
    i_at = i_program // TILES // HEADS
    i_sample = i_at % samples
    i_segment = segments - 1 - i_at // samples
    i_key_head = i_head // GROUP
    q_first = tl.load(p_span + i_sample * 4)
    keys = tl.load(p_span + i_sample * 4 + 2)
    start = tl.load(p_span + i_sample * 4 + 3)
    first = (q_first // segment_tokens + i_segment) * segment_tokens
    i_row = (i_sample * HEADS + i_head).to(tl.int64) * segments + i_segment
    q_pos = tl.load(p_index + i_row * (TILES * BM) + i_tile * BM + tl.arange(0, BM))
    inside = q_pos >= 0
    last = tl.max(q_pos, 0)  # -1: no query
    row = tl.where(inside, q_pos + start - q_offset, 0)
    begin = tl.load(p_ptr + i_sample * (segments + 1) + i_segment)
    listed = (tl.load(p_ptr + i_sample * (segments + 1) + i_segment + 1) - begin).to(tl.int32)
    tiles = tl.where(last >= 0, (listed + SUB * BN - 1) // (SUB * BN), 0)
    p_keys = p_key + (i_sample * HEADS + i_head).to(tl.int64) * head_keys + begin
    factor = LOG2E if SOFTCAP else scale * LOG2E

    p_q += _offset(i_sample, i_head, 0, q_batch, q_head, q_token)
    if p_table is not None:  # a step in `k_batch` is one to the next page
        p_table += tl.cast(i_sample, tl.int64) * table_sample
        p_k += _offset(0, i_key_head, 0, k_batch, k_head, k_token)
        p_v += _offset(0, i_key_head, 0, v_batch, v_head, v_token)
    else:
        p_k += _offset(i_sample, i_key_head, start, k_batch, k_head, k_token)
        p_v += _offset(i_sample, i_key_head, start, v_batch, v_head, v_token)
    b_q = _gather_rows(p_q, q_token, row, D, DP)
    m = tl.full([BM], UNSEEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    if p_sink is not None:  # it joins first: a gain is a share of the whole denominator
        sink = tl.load(p_sink + i_head).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
        norm = tl.math.exp2(sink - m)

    own_steps = tl.where(last >= 0, (last - first) // BN + 1, 0)
    for i in tl.range(0, own_steps, num_stages=STAGES):
        pos = first + i * BN
        b_k = _load_rows(
            None, p_k, k_token, 0, 0, 0, pos, keys, BN, D, DP, False, p_table, k_batch, PAGE
        )  # fmt: skip
        b_s = _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
        b_s = _mask_tile(b_s, q_pos, q_pos, pos, 1, 0, False)
        b_v = _load_rows(
            None, p_v, v_token, 0, 0, 0, pos, keys, BN, D, DP, False, p_table, v_batch, PAGE
        )  # fmt: skip
        m, norm, acc = _softmax_step(b_s, b_v, m, norm, acc, factor, PRECISION)
    sink_steps = tl.where((last >= 0) & (first > 0), SUB, 0)
    for i in tl.range(0, sink_steps, num_stages=STAGES):
        b_k = _load_rows(
            None, p_k, k_token, 0, 0, 0, i * BN, keys, BN, D, DP, False, p_table, k_batch, PAGE
        )  # fmt: skip
        b_s = _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
        b_v = _load_rows(
            None, p_v, v_token, 0, 0, 0, i * BN, keys, BN, D, DP, False, p_table, v_batch, PAGE
        )  # fmt: skip
        m, norm, acc = _softmax_step(b_s, b_v, m, norm, acc, factor, PRECISION)

    total = tl.zeros([BM], tl.float32)
    seen = tiles * 0
    quiet = tiles * 0
    base = tiles * 0
    while base < tiles:
        for i in tl.range(0, CHECK * SUB, num_stages=STAGES):
            i_key = base + i // SUB
            at = i_key * (SUB * BN) + i % SUB * BN + tl.arange(0, BN)
            exists = at < listed
            going = (quiet < patience) & (i_key < tiles)
            key = tl.load(p_keys + at, mask=exists, other=0)
            b_k = _gather_rows(p_k, k_token, key, D, DP, p_table, k_batch, PAGE)
            b_s = _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
            b_s = tl.where((exists & going)[None, :], b_s, MASKED)
            b_v = _gather_rows(p_v, v_token, key, D, DP, p_table, v_batch, PAGE)
            total = tl.where(i % SUB == 0, 0.0, total)
            m, norm, acc, total = _walk_step(b_s, b_v, m, norm, acc, total, factor, PRECISION)
            ends = going & (i % SUB == SUB - 1)
            # Not `gain >= tau`: NaN is no reason to stop.
            loud = tl.max((inside & ((total / norm < tau) == 0)).to(tl.int32), 0)
            quiet = tl.where(ends, tl.where(loud != 0, 0, quiet + 1), quiet)
            seen += ends.to(tl.int32)
        base = tl.where(quiet < patience, base + CHECK, tiles)
    tl.store(p_visited + i_row * TILES + i_tile, seen)

    out, lse = _finish(m, norm, acc, None, i_head, inside)
    if p_lse is not None:
        tl.store(p_lse + (i_sample * HEADS + i_head).to(tl.int64) * q_len + row, lse, mask=inside)
    column = tl.arange(0, DP)
    p_row = p_out + _offset(i_sample, i_head, 0, o_batch, o_head, o_token) + row.to(tl.int64)[:, None] * o_token
    tl.store(p_row + column[None, :], out.to(p_out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


def tile_of(capability: tuple[int, int], dim: int, dtype: torch.dtype, plan: BlockPlan) -> Tile:
    """The kernel's tile: all of the plan's queries, since they stop together, and as much of its key tile as fits."""
    tile = tile_for(capability, dim, dtype)
    fewer = max(plan.block_q // tile.block_m, 1)
    return Tile(
        plan.block_q,
        max(min(tile.block_n // fewer, plan.block_kv), 16),
        8 if plan.block_q * _padded(dim) * dtype.itemsize >= 1 << 15 else 4,  # 4: 128 x 128 spills 700 bytes a thread
        tile.stages if dtype.itemsize * _padded(dim) < 1024 else 1,
    )


def attend_ranked_triton(
    q: Tensor,
    keys: Keys,
    plan: BlockPlan,
    ranked: Ranked,
    softmax: Softmax,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torch_ranked.attend_ranked` on a CUDA device, for tensors that `attend_triton` has checked. The host does not
    wait."""
    batch, heads, q_len, dim = q.shape
    visited = nothing_visited(plan, ranked)
    g, segments, tiles = plan.geometry, visited.shape[2], visited.shape[3]
    if plan.samples != batch or plan.heads != heads:
        raise SparsekitError(
            f"a ranked plan of {plan.samples} samples and {plan.heads} heads: want the batch, {batch}, and the query "
            f"heads, {heads}."
        )
    padded = g.padded
    out = output(q, out, padded)
    lse = None
    if return_lse:
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
        if padded:
            lse.fill_(float("-inf"))
    capability = capability_of(q.device)
    tile = tile_of(capability, dim, q.dtype, plan)
    spans, sinks = span_numbers(g, batch, q.device), softmax.sink_logits
    k, v, table = keys
    tensors = (q, k, v, out, lse, sinks, spans, ranked.q_index, ranked.keys, ranked.key_ptr, visited, table)
    steps = steps_of(q, k, v, out)
    args = (
        *tensors, *steps, float(softmax.scale), float(softmax.softcap or 1.0), float(ranked.stop_tau), ranked.patience,
        g.q_offset, q_len, batch, segments, ranked.segment_tokens, ranked.keys.shape[2],
        None if table is None else table.stride(0),
    )  # fmt: skip
    options: dict[str, Any] = {
        "HEADS": heads,
        "GROUP": heads // keys.k.shape[1],
        "TILES": tiles,
        "BM": tile.block_m,
        "BN": tile.block_n,
        "SUB": plan.block_kv // tile.block_n,
        "CHECK": CHECK,
        "D": dim,
        "DP": _padded(dim),
        "PAGE": keys.page,
        "SOFTCAP": softmax.softcap is not None,
        "STAGES": tile.stages,
        "PRECISION": _precision(capability, q.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    form = ("ranked", q.device, *map(_pointer_form, tensors), steps, *options.values())
    with on_device(q.device):
        _start(_attend_ranked, form, (batch * segments * heads * tiles,), args, options, {})
    plan.memo[VISITED] = visited
    return out, lse

"""The Triton side of `last_queries.py`: two passes over k, cut into parts that many programs share.

The query heads of a key head sit in one tile, so that a key is read once for them. Key tiles are laid out from the
first of the last queries backwards: distances then come in whole blocks too. A tile is summed along its diagonals by
turning row r by r places; what sticks out belongs to the next block, and is carried in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.device import capability_of, processors_of
from sparsekit.kernels.launch import _check, _padded, _pointer_form, _precision, _start, on_device, steps_of
from sparsekit.kernels.primitives import LOG2E, MASKED, UNSEEN, _load_rows, _logits, _offset
from sparsekit.plan import span_numbers

__all__ = ["last_query_sums_triton"]


class Form(NamedTuple):
    """How a kernel's tile is cut."""

    rows: int  # queries times heads
    warps: int
    stages: int


# The last 64 of 128K queries, 32 heads over 8, head size 128, H100: 155 and 556 us. Turning a tile takes 44 barriers:
# two programs of 4 warps a processor, with two heads each, beat one of 8 with four (836 us) and one head (759 us).
DENOMINATORS = Form(256, 8, 3)
SUMS = Form(128, 4, 3)
# Queries of a launch. A tile of 128 x 128 costs 3.8 times one of 64 x 64 of four heads, for twice the work (H100).
AT_MOST = 64
PROGRAMS_PER_PROCESSOR = 4
MIN_TILES = 4  # a part has so many, or it is not worth a program

_UNSPECIALIZED = ["scale", "cap", "q_offset", "queries", "splits", "tokens", "samples", "force_columns",
                  "force_distances"]  # fmt: skip


@triton.jit
@no_type_check
def _part(
    p_span, queries, splits, i_program,
    KEY_HEADS: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of a program: (sample, key head, head block, part, kv_start, q_end, queries, first one, tiles, its own)."""
    i_block = i_program % SLOTS
    i_split = i_program // SLOTS % splits
    i_pair = i_program // SLOTS // splits
    i_sample = i_pair // KEY_HEADS
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    n = tl.minimum(queries, q_end - q_first)
    first = q_end - n
    tiles = (first + BN - 1) // BN + 1
    share = (tiles + splits - 1) // splits
    low = i_split * share
    high = tl.minimum(low + share, tiles)
    return i_sample, i_pair % KEY_HEADS, i_block, i_split, start, q_end, n, first, tiles, low, high


@triton.jit
@no_type_check
def _rows(
    p_q, q_batch, q_head, q_token, i_sample, i_key_head, i_block, n, row0,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """(AT_ONCE * BM, DP) queries of AT_ONCE heads, each row's head, and whether it is one."""
    lane = tl.arange(0, AT_ONCE * BM)
    slot = i_block * AT_ONCE + lane // BM
    valid = (slot < GROUP) & (lane % BM < n)
    head = i_key_head * GROUP + tl.minimum(slot, GROUP - 1)
    o_row = head.to(tl.int64) * q_head + (row0 + lane % BM).to(tl.int64) * q_token
    column = tl.arange(0, DP)
    p_tile = p_q + tl.cast(i_sample, tl.int64) * q_batch + o_row[:, None] + column[None, :]
    b_q = tl.load(p_tile, mask=valid[:, None] & (column < D)[None, :], other=0.0)
    return b_q, head, valid


@triton.jit
@no_type_check
def _tile(
    b_q, p_k, k_token, first, q_end, tiles, i, scale, cap,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of tile i, the future and what lies before key 0 masked."""
    k0 = first - (tiles - 1 - i) * BN
    b_k = _load_rows(None, p_k, k_token, 0, 0, 0, k0, q_end, BN, D, DP, False)
    b_s = _logits(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
    if (i == 0) | (i == tiles - 1):
        k_pos = k0 + tl.arange(0, BN)
        q_pos = first + tl.arange(0, b_s.shape[0]) % BM
        b_s = tl.where((k_pos >= 0)[None, :] & (k_pos[None, :] <= q_pos[:, None]), b_s, MASKED)
    return b_s


@triton.jit(do_not_specialize=_UNSPECIALIZED)
@no_type_check
def _denominators(
    p_q, p_k, p_part, p_span, q_batch, q_head, q_token, k_batch, k_head, k_token,
    scale, cap, q_offset, queries, splits, samples,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Row maximum and sum, in powers of 2, over one part of the keys: p_part (2, B, H, splits, BM)."""
    i_sample, i_key_head, i_block, i_split, start, q_end, n, first, tiles, low, high = _part(
        p_span, queries, splits, tl.program_id(0), KEY_HEADS, SLOTS, BN
    )
    b_q, head, valid = _rows(
        p_q, q_batch, q_head, q_token, i_sample, i_key_head, i_block, n, first + start - q_offset,
        GROUP, AT_ONCE, BM, D, DP,
    )  # fmt: skip
    p_k += _offset(i_sample, i_key_head, start, k_batch, k_head, k_token)
    factor = LOG2E if SOFTCAP else scale * LOG2E
    m = tl.full([AT_ONCE * BM], UNSEEN, tl.float32)
    norm = tl.zeros([AT_ONCE * BM], tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        b_s = _tile(b_q, p_k, k_token, first, q_end, tiles, i, scale, cap, BM, BN, D, DP, SOFTCAP, PRECISION)
        m_new = tl.maximum(m, tl.max(b_s, 1) * factor)
        norm = norm * tl.math.exp2(m - m_new) + tl.sum(tl.math.exp2(b_s * factor - m_new[:, None]), 1)
        m = m_new
    lane = tl.arange(0, AT_ONCE * BM)
    place = ((i_sample * (KEY_HEADS * GROUP) + head) * splits + i_split).to(tl.int64) * BM + lane % BM
    half = tl.cast(samples, tl.int64) * (KEY_HEADS * GROUP) * splits * BM
    tl.store(p_part + place, m, mask=valid)
    tl.store(p_part + half + place, norm, mask=valid)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
@no_type_check
def _sums(
    p_q, p_k, p_part, p_sink, p_sums, p_span, q_batch, q_head, q_token, k_batch, k_head, k_token,
    scale, cap, q_offset, queries, splits, samples, tokens, force_columns, force_distances,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Columns and distances of one part of the keys: p_sums (2, B, H, tokens), each written by one program, or with ADD
    added to what stands there."""
    i_sample, i_key_head, i_block, _, start, q_end, n, first, tiles, low, high = _part(
        p_span, queries, splits, tl.program_id(0), KEY_HEADS, SLOTS, BN
    )
    b_q, head, valid = _rows(
        p_q, q_batch, q_head, q_token, i_sample, i_key_head, i_block, n, first + start - q_offset,
        GROUP, AT_ONCE, BM, D, DP,
    )  # fmt: skip
    p_k += _offset(i_sample, i_key_head, start, k_batch, k_head, k_token)
    factor = LOG2E if SOFTCAP else scale * LOG2E

    # The parts' maxima and sums, in their order.
    lane = tl.arange(0, AT_ONCE * BM)
    place = (i_sample * (KEY_HEADS * GROUP) + head).to(tl.int64) * splits * BM + lane % BM
    half = tl.cast(samples, tl.int64) * (KEY_HEADS * GROUP) * splits * BM
    m = tl.full([AT_ONCE * BM], UNSEEN, tl.float32)
    norm = tl.zeros([AT_ONCE * BM], tl.float32)
    for i in tl.range(0, splits, loop_unroll_factor=4):  # loads that do not wait for each other
        m_part = tl.load(p_part + place + i * BM, mask=valid, other=UNSEEN)
        norm_part = tl.load(p_part + half + place + i * BM, mask=valid, other=0.0)
        m_new = tl.maximum(m, m_part)
        norm = norm * tl.math.exp2(m - m_new) + norm_part * tl.math.exp2(m_part - m_new)
        m = m_new
    if p_sink is not None:
        sink = tl.load(p_sink + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        norm = norm * tl.math.exp2(m - top) + tl.math.exp2(sink - top)
        m = top
    lse = tl.where(valid, m + tl.math.log2(tl.where(valid, norm, 1.0)), 0.0)

    slot = tl.arange(0, AT_ONCE)
    out_head = i_block * AT_ONCE + slot
    is_head = (out_head < GROUP)[:, None]
    i_row = i_sample * (KEY_HEADS * GROUP) + i_key_head * GROUP + out_head
    p_column = p_sums + (i_row.to(tl.int64) * tokens)[:, None]
    p_distance = p_column + tl.cast(samples, tl.int64) * (KEY_HEADS * GROUP) * tokens
    x = tl.arange(0, BN)
    # Row r turned by r: place x holds the key at r - x, one tile width on where that is before the tile.
    turned = (lane % BM)[:, None] - x[None, :]
    ahead = tl.reshape(turned < 0, (AT_ONCE, BM, BN))
    turned = turned & (BN - 1)
    carry = tl.zeros([AT_ONCE, BN], tl.float32)
    # One tile early: what it leaves for the first block of distances.
    for i in tl.range(tl.maximum(low - 1, 0), high, num_stages=STAGES):
        b_s = _tile(b_q, p_k, k_token, first, q_end, tiles, i, scale, cap, BM, BN, D, DP, SOFTCAP, PRECISION)
        b_p = tl.math.exp2(b_s * factor - lse[:, None])
        b_p = tl.where(valid[:, None], b_p, 0.0)
        if (i == 0) | (i == tiles - 1):  # exactly 0, whatever lse is
            b_p = tl.where(b_s <= UNSEEN, 0.0, b_p)
        back = (tiles - 1 - i) * BN
        limit = tl.where(i >= low, q_end, 0)
        column = first - back + x
        total = tl.sum(tl.reshape(b_p, (AT_ONCE, BM, BN)), 1)
        total = tl.where((column < force_columns)[None, :], float("inf"), total)
        there = is_head & ((column >= 0) & (column < limit))[None, :]
        if ADD:
            total += tl.load(p_column + column[None, :], mask=there, other=0.0)
        tl.store(p_column + column[None, :], total, mask=there)
        b_turned = tl.reshape(tl.gather(b_p, turned, 1), (AT_ONCE, BM, BN))
        distance = back + x
        total = carry + tl.sum(tl.where(ahead, 0.0, b_turned), 1)
        total = tl.where((distance < force_distances)[None, :], float("inf"), total)
        there = is_head & (distance < limit)[None, :]
        if ADD:
            total += tl.load(p_distance + distance[None, :], mask=there, other=0.0)
        tl.store(p_distance + distance[None, :], total, mask=there)
        carry = tl.sum(tl.where(ahead, b_turned, 0.0), 1)


def last_query_sums_triton(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    softmax: Softmax,
    queries: int,
    force_columns: int,
    force_distances: int,
) -> Tensor:
    """`last_queries.last_query_sums` on checked arguments."""
    _check(q, k, k)
    forced = (force_columns, force_distances)
    sums = _sums_of(q, k, geometry, softmax, min(queries, AT_MOST), 0, *forced)
    if queries > AT_MOST:
        sums = _sums_of(q, k, geometry, softmax, queries - AT_MOST, AT_MOST, *forced, onto=sums)
    return sums


def _sums_of(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    softmax: Softmax,
    queries: int,
    behind: int,
    force_columns: int,
    force_distances: int,
    onto: Tensor | None = None,
) -> Tensor:
    """The sums of the `queries` last queries but `behind`, which are at most `AT_MOST`; added to `onto`."""
    batch, heads, _, dim = q.shape
    key_heads, group = k.shape[1], heads // k.shape[1]
    capability = capability_of(q.device)
    block_m = max(_padded(queries), 16)
    block_n = max(block_m, 64)
    wide = _padded(dim) * q.element_size() // 256  # a key's bytes, in those of 128 numbers of 2 bytes
    first, second = (_cut(form, group, block_m, block_n, max(wide, 1)) for form in (DENOMINATORS, SUMS))
    most = max(max(span.q_end for span in geometry.spans), 1)
    tiles = -(-most // block_n) + 1
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors_of(q.device) // (batch * key_heads * second["SLOTS"]))
    splits = max(min(wanted, tiles // MIN_TILES), 1)
    rows = batch * heads
    sums = onto
    if sums is None:
        make = torch.empty if all(span.q_end == most for span in geometry.spans) else torch.zeros
        sums = make(2, batch, heads, most, dtype=torch.float32, device=q.device)
    part = torch.empty(2 * rows * splits * block_m, dtype=torch.float32, device=q.device)
    spans = span_numbers(geometry, geometry.batch, q.device, behind)
    sinks = softmax.sink_logits
    steps = steps_of(q, k)
    scalars = (float(softmax.scale), float(softmax.softcap or 1.0), geometry.q_offset, queries, splits, batch)
    options: dict[str, Any] = {
        "KEY_HEADS": key_heads,
        "GROUP": group,
        "BM": block_m,
        "BN": block_n,
        "D": dim,
        "DP": _padded(dim),
        "SOFTCAP": softmax.softcap is not None,
        "PRECISION": _precision(capability, q.dtype),
        "enable_fp_fusion": True,
    }
    form = (q.device, *map(_pointer_form, (q, k, sinks)), steps, *options.values())
    programs, added = batch * key_heads * splits, onto is not None
    with on_device(q.device):
        args: tuple[Any, ...] = (q, k, part, spans, *steps, *scalars)
        key = ("denominators", *form, *first.values())
        _start(_denominators, key, (programs * first["SLOTS"],), args, {**options, **first}, {})
        args = (q, k, part, sinks, sums, spans, *steps, *scalars, most, force_columns, force_distances)
        key = ("sums", added, *form, *second.values())
        _start(_sums, key, (programs * second["SLOTS"],), args, {**options, **second}, {"ADD": added})
    return sums


def _cut(form: Form, group: int, block_m: int, block_n: int, wide: int) -> dict[str, int]:
    """What a kernel's form makes of the call: heads in a tile, tiles a key head. wide: a key's bytes, in 256."""
    at_once = min(_padded(group), max(form.rows // (block_n * wide), 1)) if block_n == 64 else 1
    return {
        "SLOTS": -(-group // at_once),
        "AT_ONCE": at_once,
        "STAGES": form.stages if wide <= 1 else 1,
        "num_warps": form.warps if 2 * at_once * block_m * wide >= form.rows else 4,
    }

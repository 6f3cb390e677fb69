"""Device code of the Hopper form (sm_90), in Gluon. `hopper.py` says what it covers, plans the launch and launches it.

One persistent kernel, four roles a block: a producer warp for the work counter and TMA loads of Q and K, one for those
of V, and two consumer warpgroups, each with 64 of a tile's 128 query rows. In a consumer, Q K^T of step i is issued
together with P V of step i - 1, and the softmax of step i runs while that P V is in flight. A step is BN keys: a plan's
entry, half of one, or PARTS of them. Boxes of fewer keys than BN come in pieces of 64 columns, which is how the
128-byte swizzle stores a tile: pieces of several entries in the right order are one tile. Keys in pages (PAGE tokens
each, else 0) come in boxes that end with their page; producers look pages up, and nobody else knows of them.

A work item is 8 int32, by the names in items.py:
    ROW     row of q that holds the tile's first query; negative where the tile begins before this call's first query.
    HEAD    sample * H + query head.
    START   listed: index into entries; dense: the first step to run, from which the others go down to 0.
    COUNT   steps over entries, plus steps over single columns << COLUMN_SHIFT. 0: nothing to do, skip.
    KV      key index of position 0.
    KIND    the tile's valid query rows [low, high) as low | high << 8; DENSE; EMPTY for a row that keeps nothing; how
            many first steps of a dense item cross the diagonal, << DIAGONAL_SHIFT (in all bits from there on where no
            item is listed); NARROW: before all steps comes one of NARROW_KEYS keys from position 0 on, of which the
            rule's sinks are kept; how many entries of a listed item's last step are missing, << MISSING_SHIFT; SHORT:
            the second 64 queries need only the second 64 keys of the entry that the window's edge crosses, the first
            one, or with SECOND_EDGE the second one, which changes places with the last but one; and the first 64
            queries need only the first 64 keys of the last one, on the diagonal.
    SLOT    place of a partial result in the workspace, or -1.
    PLAN    the plan's row, for token bits.

Q_STEP above 1: q holds every Q_STEP-th query, and its row r is the query at position `r // PACK * Q_STEP`, from the
first one's block on (`Span.anchor`). PACK query heads of a key head are then rows beside one another, and count as one
head: a tile spans that much fewer positions, and less of it lies across the diagonal. Tiles are far apart, and share
keys in L2 only if they walk them from the same end: steps go up from START, and the last ones cross the diagonal.

CORRECT above 0, a divisor of 64: to each row is added what dense attention changes in its anchor, the first query of
its block of CORRECT positions (`correct.py`), but for rows that are dense. A block lies within the 64 rows of one
consumer, which copies its anchors' rows to the others by a product with a matrix of zeros and ones.

HALVES: the plan has rows of 64 queries, two to an item, and a step that one of them needs alone is passed by the other
consumer: it frees the buffers and computes nothing. Then the last two columns are (halves.py makes the list so)
    SLOT    how many first steps both need, | how many pairs of steps follow, of which the first half needs one and the
            second half the next, << PAIRS_SHIFT; of the steps after these, which only one half needs, the other hides
            all keys. Negative where that one is the second. So nobody passes two steps in a row, nor the first one.
    PLAN    the first half's row, or the only half's, << 1; 1 where the next row is the second half's.

MODE: what a row subtracts from its logits, so that exponentials stay in range.
    RUNNING the maximum of all keys so far, which may lag by 2^8.
    FIXED   the maximum of its first step, to the end: no step waits for a maximum, and nothing is rescaled. That is the
            same sum as long as no later logit lies so far above that float32 overflows, and P in bfloat16 reaches as
            far. Rows whose sum says that they came near it mark their item.
    AGAIN   a second launch with the same arguments: the marked items, with the running maximum.
An item of which a row may see nothing in its first step runs with the running maximum at once.
"""

# Kernels take no annotations other than gl.constexpr, and Gluon has no types to check against; a branch that is chosen
# when compiling needs its else, and what ruff calls a list is a compile-time shape.
# ruff: noqa: E741, RET505, RUF005, SIM102, SIM108
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsekit.kernels.attend.hopper import items
from sparsekit.kernels.attend.hopper.halves_device import NOWHERE
from sparsekit.kernels.primitives import _in_pages
from sparsekit.plan import RULE as RULE_FLAG

__all__ = ["attention", "gather_columns", "list_items", "merge", "sort_keys"]

ROW, HEAD, START, COUNT, KV, KIND, SLOT, PLAN = (gl.constexpr(i) for i in range(items.ITEM))
ITEM = gl.constexpr(items.ITEM)
# What the first producer mails to the others: an item, and what else they would wait for at a tile's start, as loads
# from global memory: the row's token rule, its first two steps, which sample and head HEAD is, and the item's number.
SINK, WINDOW, DENSE_FROM, STEP_0, STEP_1, SAMPLE, OWN_HEAD, NUMBER = (gl.constexpr(i) for i in range(8, 16))
MAIL = gl.constexpr(16)
DENSE = gl.constexpr(items.DENSE)
EMPTY = gl.constexpr(items.EMPTY)
DIAGONAL_SHIFT = gl.constexpr(items.DIAGONAL_SHIFT)
NARROW = gl.constexpr(items.NARROW)
SHORT = gl.constexpr(items.SHORT)
SECOND_EDGE = gl.constexpr(items.SECOND_EDGE)
MISSING_SHIFT = gl.constexpr(items.MISSING_SHIFT)
COLUMN_SHIFT = gl.constexpr(items.COLUMN_SHIFT)
PAIRS_SHIFT = gl.constexpr(items.PAIRS_SHIFT)
NARROW_KEYS = gl.constexpr(items.NARROW_KEYS)
FIXED, AGAIN = gl.constexpr(items.FIXED), gl.constexpr(items.AGAIN)
RULE_ALONE = gl.constexpr(RULE_FLAG)  # `RULE` is a kernel's option here
CHUNK = gl.constexpr(64)  # columns of a row that the 128-byte swizzle keeps together, in 16-bit elements

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# The running maximum starts here: below any logit, and finite, so that `-inf - maximum` is never NaN.
FLOOR = gl.constexpr(-1.0e30)
FAR = gl.constexpr(1 << 30)  # beyond any position
NO_PAGE = gl.constexpr(1 << 30)  # beyond any page: zeros by TMA
# Up to where the sum of a row's weights lies that may keep the maximum of its first step: values of up to 2^31 may be
# multiplied by as much.
MOST = gl.constexpr(2.0**96)

# Renamed in Triton 3.8.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# Public from Triton 3.8 on.
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


def _rescale_asm(n):
    """acc *= alpha on n registers, skipped by warps in which every alpha is 1 (operands n.. are acc, 2n.. alpha).

    In the wgmma accumulator layout a thread holds two rows: registers 0, 1 are row r, registers 2, 3 are row r + 8.
    """
    mul = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    skip = f"setp.neu.f32 p, ${2 * n}, 0f3F800000; setp.neu.or.f32 q, ${2 * n + 2}, 0f3F800000, p; "
    return "{ .reg .pred p, q; " + skip + "vote.sync.any.pred p, q, 0xffffffff; @!p bra.uni DONE; " + mul + " DONE: }"


def _rescale_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


RESCALE_64, CONSTRAINTS_64 = gl.constexpr(_rescale_asm(64)), gl.constexpr(_rescale_constraints(64))
RESCALE_32, CONSTRAINTS_32 = gl.constexpr(_rescale_asm(32)), gl.constexpr(_rescale_constraints(32))


@gluon.jit
def _rescale(acc, alpha, LO: gl.constexpr):
    a = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, LO)), 1)
    full = gl.zeros_like(acc) + a
    if acc.shape[1] >= 128:
        return gl.inline_asm_elementwise(
            RESCALE_64, CONSTRAINTS_64, [acc, full], dtype=gl.float32, is_pure=False, pack=64
        )
    else:
        return gl.inline_asm_elementwise(
            RESCALE_32, CONSTRAINTS_32, [acc, full], dtype=gl.float32, is_pure=False, pack=32
        )


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    wrap = ((slot + 1) == SLOTS).to(gl.int32)
    return (slot + 1) * (1 - wrap), phase ^ wrap


@gluon.jit
def _send(mail, i, x):
    mail.index(i).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + x)


@gluon.jit
def _receive(mail, i, WARPS: gl.constexpr = 4):
    return gl.max(mail.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def _step(
    p_entries, start, i, count, kind,
    BN: gl.constexpr, SPLIT_ENTRY: gl.constexpr, LISTED: gl.constexpr, SHORT_FORM: gl.constexpr, Q_STEP: gl.constexpr,
    AT_START: gl.constexpr = False,
):  # fmt: skip
    """Step i of an item: `position of its first key * 4 + flags`."""
    if Q_STEP > 1:
        dense = (start + i) * (4 * BN) + (i >= count - (kind >> DIAGONAL_SHIFT)).to(gl.int32)
    else:
        dense = (start - i) * (4 * BN) + (i < (kind >> DIAGONAL_SHIFT)).to(gl.int32)
    if not LISTED:
        return dense
    else:
        is_dense = (kind & DENSE) != 0
        place = i // SPLIT_ENTRY
        if SHORT_FORM:  # an entry is a step
            edge = (kind & SECOND_EDGE) // SECOND_EDGE
            last = gl.where((kind & SHORT) != 0, count - 2, -1)
            if AT_START:
                place = gl.where((last >= 0) & (i == edge), last, i)
            place = gl.where(i == last, edge, place)
        at = p_entries + (start + place)  # a pointer to `start` would take two registers of every loop
        entry = gl.load(at, mask=(i < count) & (is_dense == 0), other=0) + (i % SPLIT_ENTRY) * (4 * BN)
        return gl.where(is_dense, dense, entry)


@gluon.jit
def _part(p_entries, start, i, part, count, kind, BN: gl.constexpr, PARTS: gl.constexpr):
    """Entry `part` of step i, where a step is PARTS entries; `NOWHERE` where the last step has fewer."""
    is_dense = (kind & DENSE) != 0
    dense = ((start - i) * BN + part * (BN // PARTS)) * 4 + (i < (kind >> DIAGONAL_SHIFT)).to(gl.int32)
    at = i * PARTS + part
    listed = (at < count * PARTS - ((kind >> MISSING_SHIFT) & 3)) & (is_dense == 0)
    return gl.where(is_dense, dense, gl.load(p_entries + start + at, mask=listed, other=NOWHERE))


@gluon.jit
def _parts_flags(p_entries, start, i, count, kind, BN: gl.constexpr, PARTS: gl.constexpr):
    """All flags of the entries of step i."""
    flags = 0
    for part in gl.static_range(PARTS):
        flags = flags | _part(p_entries, start, i, part, count, kind, BN, PARTS)
    return flags & 3


@gluon.jit
def _mask_parts(
    s, query, low, sink, p_entries, start, i, count, kind, L: gl.constexpr, RULE: gl.constexpr, PARTS: gl.constexpr
):
    """`_mask` of a step of several entries, read again: few steps have a flag."""
    ROWS: gl.constexpr = s.shape[1] // PARTS
    lane = gl.arange(0, s.shape[1], gl.SliceLayout(0, L))
    key = lane * 0 - 1
    for part in gl.static_range(PARTS):
        e = _part(p_entries, start, i, part, count, kind, s.shape[1], PARTS)
        key = gl.where((lane // ROWS == part) & ((e & 1) != 0), (e >> 2) + lane - part * ROWS, key)
    s = gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(query, 1), s, float("-inf"))
    if RULE:
        near = lane * 0 + FAR
        for part in gl.static_range(PARTS):
            e = _part(p_entries, start, i, part, count, kind, s.shape[1], PARTS)
            at = (e >> 2) + lane - part * ROWS
            near = gl.where((lane // ROWS == part) & ((e & 2) != 0) & (at >= sink), at, near)
        s = gl.where(gl.expand_dims(near, 0) > gl.expand_dims(low, 1), s, float("-inf"))
    return s


@gluon.jit
def _mask(s, query, low, sink, key0, flags, L: gl.constexpr, RULE: gl.constexpr):
    """-inf where causality or the token rule drops the pair, each where the step's flags ask for it.

    s: (rows, BN) of queries `query` (rows,); `low` (rows,) is the last key before the window, -1 in dense rows. The
    valid key length needs no test of its own: it only ever cuts off keys after the last valid query.
    """
    # A thread's columns differ in all bits but two, which it moves to the other side: what is left there is a constant.
    lane = gl.arange(0, s.shape[1], gl.SliceLayout(0, L))
    own = gl.expand_dims(lane & 6, 0)
    at = gl.expand_dims(lane & ~6, 0)
    if (flags & 1) != 0:
        s = gl.where(at <= gl.expand_dims(query - key0, 1) - own, s, float("-inf"))
    if RULE:
        if (flags & 2) != 0:
            before = gl.expand_dims(low - key0, 1) - own
            s = gl.where((at > before) | (at < sink - key0 - own), s, float("-inf"))
    return s


@gluon.jit
def _mask_step(
    s, query, low, sink, e, p_entries, start, i, count, kind,
    L: gl.constexpr, RULE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    if PARTS > 1:
        return _mask_parts(s, query, low, sink, p_entries, start, i, count, kind, L, RULE, PARTS)
    else:
        return _mask(s, query, low, sink, e >> 2, e, L, RULE)


@gluon.jit
def _first_rows(buffer, ROWS: gl.constexpr):
    """(ROWS, D): what `_load_part` put first into a buffer (1, 1, BN, D)."""
    D: gl.constexpr = buffer.shape[3]
    SHAPE: gl.constexpr = [buffer.shape[2] // ROWS, 1, 1, ROWS, D]
    if REINTERPRET:
        tiles = buffer.reinterpret(buffer.dtype, SHAPE, buffer.layout)
    else:
        tiles = buffer._reinterpret(buffer.dtype, SHAPE, buffer.layout)
    return tiles.index(0).reshape([ROWS, D])


@gluon.jit
def _mask_columns(s, query, p_tokens, p_bits, column0, columns, L: gl.constexpr):
    """-inf where a single column lies after the query, or the row's bit says that it needs the column no more."""
    lane = gl.arange(0, s.shape[1], gl.SliceLayout(0, L))
    key = gl.load(p_tokens + column0 + lane, mask=column0 + lane < columns, other=2147483647)
    for i in gl.static_range(s.shape[1] // 32):
        # A word is one number for all threads, and which lanes it serves is known when compiling: no registers.
        word = gl.load(p_bits + column0 // 32 + i, mask=column0 + i * 32 < columns, other=0)
        key = gl.where((lane // 32 == i) & (((word >> (lane & 31)) & 1) == 0), 2147483647, key)
    return gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(query, 1), s, float("-inf"))


@gluon.jit
def _cap(s, cap_scale, CAP: gl.constexpr):
    """tanh(scale / softcap * s) where there is a soft-cap; `cap_scale` is 2 log2(e) scale / softcap."""
    if CAP:
        return 1.0 - 2.0 / (1.0 + gl.exp2(s * cap_scale))
    else:
        return s


@gluon.jit
def _by_eight(x):
    # Columns 8j + c: the reduction over j stays inside a thread, and runs as four independent chains.
    return x.reshape([x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def _row_max(s, L: gl.constexpr):
    return gl.convert_layout(gl.max(gl.max(_by_eight(s), 1), 1), gl.SliceLayout(1, L))


@gluon.jit
def _raise(s, m, l, scale2, L: gl.constexpr):
    """The running maximum after a step: rows' maxima, sums, and what they shrink by."""
    m_new = gl.maximum(m, _row_max(s, L) * scale2)
    # The maximum may lag by 2^8, harmless in 16-bit floats and fp32: the accumulator is hardly ever rescaled.
    m_new = gl.where(m_new > m + 8.0, m_new, m)
    alpha = gl.exp2(m - m_new)
    return m_new, l * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout)), 1), alpha


@gluon.jit
def _exponentials(s, m, l, scale2):
    """A step's P, and its rows' sums."""
    p = gl.exp2(s * scale2 - gl.expand_dims(m, 1))
    return p, l + gl.convert_layout(gl.sum(_by_eight(p), 1), l.type.layout)


@gluon.jit
def _load_keys(desc, at, full, buffer):
    mbarrier.expect(full, desc.block_type.nbytes)
    _tma_load(desc, at, full, buffer)


@gluon.jit
def _load_part(desc, sample, head, key, part, full, buffer, PARTS: gl.constexpr):
    """Box `part` of a buffer (1, 1, BN, D) of PARTS boxes, a chunk of columns at a time; the caller expects the bytes.

    PARTS may also be more than are loaded: then the boxes are the first rows of a smaller tile of the same layout.
    """
    ROWS: gl.constexpr = desc.block_type.shape[2]
    CHUNKS: gl.constexpr = buffer.shape[3] // CHUNK
    SHAPE: gl.constexpr = [buffer.shape[2] // ROWS * CHUNKS, 1, 1, ROWS, CHUNK]
    if REINTERPRET:
        pieces = buffer.reinterpret(buffer.dtype, SHAPE, desc.layout)
    else:
        pieces = buffer._reinterpret(buffer.dtype, SHAPE, desc.layout)
    for chunk in gl.static_range(CHUNKS):
        _tma_load(desc, [sample, head, key, chunk * CHUNK], full, pieces.index(chunk * PARTS + part))


@gluon.jit
def _load_pages(
    desc, d_part, d_last, head, part, key, keys, p_table, full, buffer,
    PARTS: gl.constexpr, PIECE: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Entry `part` of a step's buffer (1, 1, BN, D), from keys `key ..` in pages on, PIECE of them a box; the caller
    expects the bytes. d_last: what ends with the keys, so that zeros follow them, or None."""
    BN: gl.constexpr = buffer.shape[2]
    PIECES: gl.constexpr = BN // PARTS // PIECE
    page, place = _in_pages(p_table, key, key < keys, NO_PAGE, PAGE)
    for piece in range(PIECES):
        at = key + piece * PIECE
        next_page, next_place = page, place
        if PIECES > 1:  # asked for before the boxes of this page go out
            next_page, next_place = _in_pages(p_table, at + PIECE, at + PIECE < keys, NO_PAGE, PAGE)
        if d_last is not None:
            if at // PAGE == (keys - 1) // PAGE:
                _load_box(d_last, d_last, page, head, place, part * PIECES + piece, full, buffer, BN // PIECE)
            else:
                _load_box(desc, d_part, page, head, place, part * PIECES + piece, full, buffer, BN // PIECE)
        else:
            _load_box(desc, d_part, page, head, place, part * PIECES + piece, full, buffer, BN // PIECE)
        page, place = next_page, next_place


@gluon.jit
def _load_box(desc, d_part, page, head, place, part, full, buffer, PARTS: gl.constexpr):
    if PARTS == 1:
        _tma_load(desc, [page, head, place, 0], full, buffer)
    else:
        _load_part(d_part, page, head, place, part, full, buffer, PARTS)


@gluon.jit
def _load_entries_in_pages(
    desc, d_part, d_last, buffer, full, p_entries, start, i, count, kind, key_head, e, p_table, keys,
    PARTS: gl.constexpr, PIECE: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """`_load_entries` of keys in pages. Masks hide keys past the last one, and what they hold; values there are to be
    zeros, for 0 * NaN is NaN."""
    BN: gl.constexpr = buffer.shape[2]
    mbarrier.expect(full, desc.block_type.nbytes)
    for part in gl.static_range(PARTS):
        if PARTS > 1:
            e = _part(p_entries, start, i, part, count, kind, BN, PARTS)
        _load_pages(desc, d_part, d_last, key_head, part, e >> 2, keys, p_table, full, buffer, PARTS, PIECE, PAGE)


@gluon.jit
def _load_entries(
    desc, d_part, d_last, buffer, full, p_entries, start, i, count, kind, kv_start, sample, key_head, e, p_table, keys,
    PARTS: gl.constexpr, PIECE: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """K or V of step i: entry `e`, or the PARTS entries in `p_entries`."""
    BN: gl.constexpr = buffer.shape[2]
    if PAGE > 0:
        _load_entries_in_pages(
            desc, d_part, d_last, buffer, full, p_entries, start, i, count, kind, key_head, e, p_table, keys,
            PARTS, PIECE, PAGE,
        )  # fmt: skip
    elif PARTS == 1:
        _load_keys(desc, [sample, key_head, kv_start + (e >> 2), 0], full, buffer)
    elif (kind & DENSE) != 0:
        _load_keys(desc, [sample, key_head, kv_start + (start - i) * BN, 0], full, buffer)
    else:
        mbarrier.expect(full, desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            key = kv_start + (_part(p_entries, start, i, part, count, kind, BN, PARTS) >> 2)
            _load_part(d_part, sample, key_head, key, part, full, buffer, PARTS)


@gluon.jit
def _steps(count, COLUMNS: gl.constexpr):
    """COUNT: (steps over entries, all steps)."""
    if COLUMNS:
        listed = count & ((1 << COLUMN_SHIFT) - 1)
        return listed, listed + (count >> COLUMN_SHIFT)
    else:
        return count, count


@gluon.jit
def _item(p_items, t, items):
    p_item = p_items + t * ITEM
    there = t < items
    row = gl.load(p_item + ROW, mask=there, other=0)
    sample_head = gl.load(p_item + HEAD, mask=there, other=0)
    start = gl.load(p_item + START, mask=there, other=0)
    count = gl.load(p_item + COUNT, mask=there, other=0)
    kv_start = gl.load(p_item + KV, mask=there, other=0)
    kind = gl.load(p_item + KIND, mask=there, other=0)
    return row, sample_head, start, count, kv_start, kind


@gluon.jit
def _load_step(
    desc, d_pool, d_part, d_last, buffer, full, free, phase, p_entries, start, i, count, kind, kv_start, sample,
    key_head, e, pool_head, p_table, keys,
    PARTS: gl.constexpr, PIECE: gl.constexpr, COLUMNS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """K or V of step i, which is entry `e` (PARTS of them in `p_entries`), or single columns from `count` on."""
    BN: gl.constexpr = buffer.shape[2]
    mbarrier.wait(free, phase ^ 1)
    if COLUMNS:
        if i >= count:
            _load_keys(d_pool, [sample, pool_head, (i - count) * BN, 0], full, buffer)
        else:
            _load_entries(
                desc, d_part, d_last, buffer, full, p_entries, start, i, count, kind, kv_start, sample, key_head, e,
                p_table, keys, PARTS, PIECE, PAGE,
            )  # fmt: skip
    else:
        _load_entries(
            desc, d_part, d_last, buffer, full, p_entries, start, i, count, kind, kv_start, sample, key_head, e,
            p_table, keys, PARTS, PIECE, PAGE,
        )  # fmt: skip


@gluon.jit
def _load_few(desc, d_part, buffer, full, free, phase, sample, key_head, kv_start, p_table, keys, PAGE: gl.constexpr):
    """The first NARROW_KEYS keys or values."""
    at = kv_start
    if PAGE > 0:
        sample, at = _in_pages(p_table, kv_start, kv_start < keys, NO_PAGE, PAGE)
    mbarrier.wait(free, phase ^ 1)
    mbarrier.expect(full, desc.block_type.nbytes // buffer.shape[2] * NARROW_KEYS)
    _load_part(d_part, sample, key_head, at, 0, full, buffer, 1)


@gluon.jit
def _load_queries(d_q, sample, head, row, slot, phase, qs, full, free):
    """A tile's queries, in two halves, into place `slot` of `qs`."""
    HALF: gl.constexpr = d_q.block_type.shape[2]
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), 2 * d_q.block_type.nbytes)
    _tma_load(d_q, [sample, head, row, 0], full.index(slot), qs.index(slot * 2))
    _tma_load(d_q, [sample, head, row + HALF, 0], full.index(slot), qs.index(slot * 2 + 1))


@gluon.jit
def _send_item(mail, slot, row, sample_head, start, count, kv_start, kind, e, e1):
    """An item and its first two entries, to the consumers."""
    _send(mail, slot * MAIL + ROW, row)
    _send(mail, slot * MAIL + HEAD, sample_head)
    _send(mail, slot * MAIL + START, start)
    _send(mail, slot * MAIL + COUNT, count)
    _send(mail, slot * MAIL + KV, kv_start)
    _send(mail, slot * MAIL + KIND, kind)
    _send(mail, slot * MAIL + STEP_0, e)
    _send(mail, slot * MAIL + STEP_1, e1)


@gluon.jit
def _receive_item(mail, slot, WARPS: gl.constexpr = 4):
    """What `_send_item` sent, without COUNT, which is read first."""
    row = _receive(mail, slot * MAIL + ROW, WARPS)
    sample_head = _receive(mail, slot * MAIL + HEAD, WARPS)
    start = _receive(mail, slot * MAIL + START, WARPS)
    kv_start = _receive(mail, slot * MAIL + KV, WARPS)
    kind = _receive(mail, slot * MAIL + KIND, WARPS)
    e = _receive(mail, slot * MAIL + STEP_0, WARPS)
    e1 = _receive(mail, slot * MAIL + STEP_1, WARPS)
    return row, sample_head, start, kv_start, kind, e, e1


@gluon.jit
def _send_rule(mail, slot, kind, p_rule):
    # A dense item hides nothing by the rule. That it has a sink says that no row's first step shows it nothing.
    _send(mail, slot * MAIL + SINK, gl.where((kind & DENSE) != 0, 1, gl.load(p_rule)))
    _send(mail, slot * MAIL + WINDOW, gl.load(p_rule + 1))
    _send(mail, slot * MAIL + DENSE_FROM, gl.load(p_rule + 2))


@gluon.jit
def _receive_rule(mail, slot, query):
    """(sinks, last key before the window of each query); -1 where it sees all."""
    sink = _receive(mail, slot * MAIL + SINK)
    window = _receive(mail, slot * MAIL + WINDOW)
    before = gl.maximum(query - window, -1)
    return sink, gl.where(query >= _receive(mail, slot * MAIL + DENSE_FROM), -1, before)


@gluon.jit
def _marked(p_marks, p_counters, t, items):
    """The next item, of those that fall to this block from `t` on, that is marked. Its mark is taken off."""
    mark = gl.load(p_marks + 1 + t, mask=t < items, other=1)
    while mark == 0:
        t = gl.atomic_add(p_counters, 1) + gl.num_programs(0)
        mark = gl.load(p_marks + 1 + t, mask=t < items, other=1)
    gl.store(p_marks + 1 + t, 0, mask=t < items)
    return t


@gluon.jit
def _begin(p_counters, p_marks, mode, items):
    """(this block's first item, how many items there are): none for a second launch where nothing is marked."""
    t = gl.program_id(0)
    if mode == AGAIN:
        items = gl.where(gl.load(p_marks) != 0, items, 0)
        t = _marked(p_marks, p_counters, t, items)
    return t, items


@gluon.jit
def _close(mail, slot, phase, full, free, p_counters, p_marks, mode):
    """No further item. The last block leaves counters and marks ready for the next launch."""
    mbarrier.wait(free.index(slot), phase ^ 1)
    _send(mail, slot * MAIL + COUNT, 0)
    mbarrier.arrive(full.index(slot), count=1)
    if gl.atomic_add(p_counters + 1, 1) == gl.num_programs(0) - 1:
        gl.store(p_counters, 0)
        gl.store(p_counters + 1, 0)
        if mode == AGAIN:
            gl.store(p_marks, 0)


@gluon.jit
def _announce(
    d_q, qs, q_full, q_free, q_slot, q_phase, mail, m_full, m_free, m_slot, m_phase, p_items, t, p_entries, p_rule,
    row, sample_head, start, count, kv_start, kind, heads, rule_sample, rule_head, heads_per_plan,
    BN: gl.constexpr, SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr,
    COLUMNS: gl.constexpr, SPLIT: gl.constexpr, SHORT_FORM: gl.constexpr, HALVES: gl.constexpr, Q_STEP: gl.constexpr,
):  # fmt: skip
    """Sends for an item's queries, and sends the item to the others; returns its first two steps."""
    listed, _ = _steps(count, COLUMNS)
    sample = sample_head // heads
    head = sample_head - sample * heads
    if PARTS > 1:
        e = _parts_flags(p_entries, start, 0, listed, kind, BN, PARTS)
        e1 = _parts_flags(p_entries, start, 1, listed, kind, BN, PARTS)
    else:
        e = _step(p_entries, start, 0, listed, kind, BN, SPLIT_ENTRY, LISTED, SHORT_FORM, Q_STEP, True)
        e1 = _step(p_entries, start, 1, listed, kind, BN, SPLIT_ENTRY, LISTED, SHORT_FORM, Q_STEP, True)
    _load_queries(d_q, sample, head, row, q_slot, q_phase, qs, q_full, q_free)
    mbarrier.wait(m_free.index(m_slot), m_phase ^ 1)
    _send_item(mail, m_slot, row, sample_head, start, count, kv_start, kind, e, e1)
    _send(mail, m_slot * MAIL + SAMPLE, sample)
    _send(mail, m_slot * MAIL + OWN_HEAD, head)
    _send(mail, m_slot * MAIL + NUMBER, t)
    if RULE:
        _send_rule(mail, m_slot, kind, p_rule + sample * rule_sample + head // heads_per_plan * rule_head)
    if SPLIT or HALVES:
        _send(mail, m_slot * MAIL + SLOT, gl.load(p_items + t * ITEM + SLOT))
    if COLUMNS:
        _send(mail, m_slot * MAIL + PLAN, gl.load(p_items + t * ITEM + PLAN))
    mbarrier.arrive(m_full.index(m_slot), count=1)
    return e, e1


@gluon.jit
def _produce_keys(
    d_q, d_k, d_pool_k, d_part_k, d_last_v, qs, ks, q_full, q_free, k_full, k_free, mail, m_full, m_free, p_items,
    p_entries, p_counters, p_marks, p_rule, p_table, mode, items, heads, group, rule_sample, rule_head, heads_per_plan,
    heads_per_pool, table_sample, keys,
    SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr, COLUMNS: gl.constexpr,
    SPLIT: gl.constexpr, NARROW_FORM: gl.constexpr, SHORT_FORM: gl.constexpr, HALVES: gl.constexpr, PAGE: gl.constexpr,
    Q_STEP: gl.constexpr,
):  # fmt: skip
    """Work counter, mail, Q and K."""
    STAGES: gl.constexpr = ks.shape[0]
    Q_STAGES: gl.constexpr = q_full.shape[0]
    BN: gl.constexpr = d_k.block_type.shape[2]
    PIECE: gl.constexpr = d_last_v.block_type.shape[2] if PAGE > 0 else 0
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    m_slot = 0
    m_phase = 0
    t, items = _begin(p_counters, p_marks, mode, items)
    row, sample_head, start, count, kv_start, kind = _item(p_items, t, items)
    e, e1 = 0, 0
    if count > 0:
        e, e1 = _announce(
            d_q, qs, q_full, q_free, q_slot, q_phase, mail, m_full, m_free, m_slot, m_phase, p_items, t, p_entries,
            p_rule, row, sample_head, start, count, kv_start, kind, heads, rule_sample, rule_head,
            heads_per_plan, BN, SPLIT_ENTRY, PARTS, LISTED, RULE, COLUMNS, SPLIT, SHORT_FORM, HALVES, Q_STEP,
        )  # fmt: skip
    while count > 0:  # items without steps are the last ones
        q_slot, q_phase = _next(q_slot, q_phase, Q_STAGES)
        m_slot, m_phase = _next(m_slot, m_phase, 2)
        t = gl.atomic_add(p_counters, 1) + gl.num_programs(0)
        listed, steps = _steps(count, COLUMNS)
        sample = sample_head // heads
        head = sample_head - sample * heads
        key_head = head // group
        pool_head = head // heads_per_pool
        p_pages = p_table
        if PAGE > 0:
            p_pages = p_table + sample.to(gl.int64) * table_sample
        if NARROW_FORM:
            if (kind & NARROW) != 0:
                _load_few(
                    d_k, d_part_k, ks.index(slot), k_full.index(slot), k_free.index(slot), phase, sample, key_head,
                    kv_start, p_pages, keys, PAGE,
                )  # fmt: skip
                slot, phase = _next(slot, phase, STAGES)
        # The next item is announced as soon as its tile of Q is free: two steps from here, or behind the last one.
        announced = steps - 1
        if Q_STAGES > 1:
            announced = gl.minimum(announced, 1)
        next_e, next_e1 = e, e1
        next_row, next_head, next_start, next_count, next_kv_start, next_kind = row, row, row, row, row, row
        for i in range(steps):
            now = e
            e = e1
            if PARTS == 1:
                e1 = _step(p_entries, start, i + 2, listed, kind, BN, SPLIT_ENTRY, LISTED, SHORT_FORM, Q_STEP)
            _load_step(
                d_k, d_pool_k, d_part_k, None, ks.index(slot), k_full.index(slot), k_free.index(slot), phase, p_entries,
                start, i, listed, kind, kv_start, sample, key_head, now, pool_head, p_pages, keys, PARTS, PIECE,
                COLUMNS, PAGE,
            )  # fmt: skip
            slot, phase = _next(slot, phase, STAGES)
            if i == 0:  # by now the counter has answered
                if mode == AGAIN:
                    t = _marked(p_marks, p_counters, t, items)
                next_row, next_head, next_start, next_count, next_kv_start, next_kind = _item(p_items, t, items)
            if (i == announced) & (next_count > 0):
                next_e, next_e1 = _announce(
                    d_q, qs, q_full, q_free, q_slot, q_phase, mail, m_full, m_free, m_slot, m_phase, p_items, t,
                    p_entries, p_rule, next_row, next_head, next_start, next_count, next_kv_start, next_kind, heads,
                    rule_sample, rule_head, heads_per_plan, BN, SPLIT_ENTRY, PARTS, LISTED, RULE, COLUMNS, SPLIT,
                    SHORT_FORM, HALVES, Q_STEP,
                )  # fmt: skip
        e, e1, sample_head, start = next_e, next_e1, next_head, next_start
        count, kv_start, kind = next_count, next_kv_start, next_kind
    _close(mail, m_slot, m_phase, m_full, m_free, p_counters, p_marks, mode)


@gluon.jit
def _produce_values(
    d_v, d_pool_v, d_part_v, d_last_v, vs, v_full, v_free, mail, m_full, m_free, p_entries, p_table, group,
    heads_per_pool, table_sample, keys,
    SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr,
    NARROW_FORM: gl.constexpr, SHORT_FORM: gl.constexpr, PAGE: gl.constexpr, Q_STEP: gl.constexpr,
):  # fmt: skip
    """V of the items that the other producer announces: in one queue with K, one would wait for the other's buffer."""
    STAGES: gl.constexpr = vs.shape[0]
    BN: gl.constexpr = d_v.block_type.shape[2]
    PIECE: gl.constexpr = d_last_v.block_type.shape[2] if PAGE > 0 else 0
    slot = 0
    phase = 0
    m_slot = 0
    m_phase = 0
    mbarrier.wait(m_full.index(0), 0)
    count = _receive(mail, COUNT, 1)
    while count > 0:
        sample = _receive(mail, m_slot * MAIL + SAMPLE, 1)
        head = _receive(mail, m_slot * MAIL + OWN_HEAD, 1)
        _, _, start, kv_start, kind, e, e1 = _receive_item(mail, m_slot, 1)
        mbarrier.arrive(m_free.index(m_slot), count=1)
        m_slot, m_phase = _next(m_slot, m_phase, 2)
        listed, steps = _steps(count, COLUMNS)
        key_head = head // group
        pool_head = head // heads_per_pool
        p_pages = p_table
        if PAGE > 0:
            p_pages = p_table + sample.to(gl.int64) * table_sample
        if NARROW_FORM:
            if (kind & NARROW) != 0:
                _load_few(
                    d_v, d_part_v, vs.index(slot), v_full.index(slot), v_free.index(slot), phase, sample, key_head,
                    kv_start, p_pages, keys, PAGE,
                )  # fmt: skip
                slot, phase = _next(slot, phase, STAGES)
        for i in range(steps):
            now = e
            e = e1
            if PARTS == 1:
                e1 = _step(p_entries, start, i + 2, listed, kind, BN, SPLIT_ENTRY, LISTED, SHORT_FORM, Q_STEP)
            _load_step(
                d_v, d_pool_v, d_part_v, d_last_v, vs.index(slot), v_full.index(slot), v_free.index(slot), phase,
                p_entries, start, i, listed, kind, kv_start, sample, key_head, now, pool_head, p_pages, keys, PARTS,
                PIECE, COLUMNS, PAGE,
            )  # fmt: skip
            slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(m_full.index(m_slot), m_phase)
        count = _receive(mail, m_slot * MAIL + COUNT, 1)


@gluon.jit
def _advance(
    acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
    query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind, p_row_tokens, p_row_bits, columns,
    hidden,
    SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr, CAP: gl.constexpr,
    COLUMNS: gl.constexpr, HALVES: gl.constexpr, SHORT_FORM: gl.constexpr, Q_STEP: gl.constexpr, VOTE: gl.constexpr,
):  # fmt: skip
    """Step i of a row: Q K^T and softmax of this step, P V of the one before, whose buffer is `before`."""
    STAGES: gl.constexpr = ks.shape[0]
    HALF: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    BN: gl.constexpr = ks.shape[3]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    LO: gl.constexpr = acc.type.layout
    now = e
    if not COLUMNS:
        if PARTS > 1:
            e = _parts_flags(p_entries, start, i + 1, listed, kind, BN, PARTS)
        else:
            e = _step(p_entries, start, i + 1, listed, kind, BN, SPLIT_ENTRY, LISTED, SHORT_FORM, Q_STEP)
    zero = gl.zeros([HALF, BN], gl.float32, L)
    s = warpgroup_mma(q, ks.index(slot).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    o = warpgroup_mma(pb, vs.index(before).reshape([BN, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(slot), count=1)
    s = _cap(s, cap_scale, CAP)
    m_new = m
    alpha = gl.full_like(m, 1.0)
    if COLUMNS:
        s = _mask_columns(s, query, p_row_tokens, p_row_bits, (i - listed) * BN, columns, L)
        if running:
            m_new, l, alpha = _raise(s, m, l, scale2, L)
    elif LISTED or BN < 2 * HALF or Q_STEP > 1:  # else only the first step of a tile crosses the diagonal
        if HALVES:
            s = _hide(s, hidden)
        if ((now & 3) != 0) | running:  # one branch that most steps pass by
            s = _mask_step(s, query, low, sink, now, p_entries, start, i, listed, kind, L, RULE, PARTS)
            if running:
                m_new, l, alpha = _raise(s, m, l, scale2, L)
    else:
        if running:
            m_new, l, alpha = _raise(s, m, l, scale2, L)
    p, l = _exponentials(s, m_new, l, scale2)
    # The waits for the next K and V stand here on purpose: they start a new basic block, which keeps ptxas
    # from moving the wait for P V above the exponentials.
    slot1, phase1 = _next(slot, phase, STAGES)
    mbarrier.wait(k_full.index(slot1), phase1, pred=i + 1 < steps)
    mbarrier.wait(v_full.index(slot), phase)
    acc = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_free.index(before), count=1)
    if VOTE or running:
        acc = _rescale(acc, alpha, LO)
    pb = gl.convert_layout(p.to(ks.dtype), gl.DotOperandLayout(0, LO, 2))
    return acc, l, m_new, pb, e, slot1, phase1, slot


@gluon.jit
def _advance_half(
    acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
    query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind,
    WHO: gl.constexpr, SPLIT_ENTRY: gl.constexpr, CAP: gl.constexpr, VOTE: gl.constexpr,
):  # fmt: skip
    """`_advance` where consumer 0 needs only the first half of the step's keys, or consumer 1 the second one. P is 0 in
    the other half: its P V runs with the next step's Q K^T, as all others do."""
    STAGES: gl.constexpr = ks.shape[0]
    HALF: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    BN: gl.constexpr = ks.shape[3]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, L)
    LO: gl.constexpr = acc.type.layout
    now = e
    e = _step(p_entries, start, i + 1, listed, kind, BN, SPLIT_ENTRY, True, True, 1)
    zero = gl.zeros([HALF, HALF], gl.float32, L)
    keys = ks.index(slot).reshape([BN, D]).slice(WHO * HALF, HALF).permute((1, 0))
    s = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    o = warpgroup_mma(pb, vs.index(before).reshape([BN, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(slot), count=1)
    s = _cap(s, cap_scale, CAP)
    first = (now >> 2) + WHO * HALF
    s = _mask(s, gl.convert_layout(query, ROWS), gl.convert_layout(low, ROWS), sink, first, now, L, True)
    m_new = gl.convert_layout(m, ROWS)
    alpha = gl.full_like(m_new, 1.0)
    if running:
        m_new, l, alpha = _raise(s, m_new, l, scale2, L)
    p, l = _exponentials(s, m_new, l, scale2)
    slot1, phase1 = _next(slot, phase, STAGES)
    mbarrier.wait(k_full.index(slot1), phase1, pred=i + 1 < steps)
    mbarrier.wait(v_full.index(slot), phase)
    acc = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_free.index(before), count=1)
    if VOTE or running:
        acc = _rescale(acc, alpha, LO)
    p = p.to(ks.dtype)
    none = gl.zeros_like(p)
    both = gl.join(p, none) if WHO == 0 else gl.join(none, p)
    pb = gl.convert_layout(both.permute((0, 2, 1)).reshape([HALF, BN]), gl.DotOperandLayout(0, LO, 2))
    return acc, l, gl.convert_layout(m_new, m.type.layout), pb, e, slot1, phase1, slot


@gluon.jit
def _pass(
    e, slot, phase, i, steps, k_full, k_free, v_full, v_free, p_entries, start, listed, kind,
    BN: gl.constexpr, STAGES: gl.constexpr, SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Step i of a row, which the other half needs alone. P V of the step before stays due, and keeps its buffer."""
    if PARTS > 1:
        e = _parts_flags(p_entries, start, i + 1, listed, kind, BN, PARTS)
    else:
        e = _step(p_entries, start, i + 1, listed, kind, BN, SPLIT_ENTRY, LISTED, False, 1)
    mbarrier.arrive(k_free.index(slot), count=1)
    # A phase that nobody waits for could be taken for the next but one.
    mbarrier.wait(v_full.index(slot), phase)
    mbarrier.arrive(v_free.index(slot), count=1)
    slot1, phase1 = _next(slot, phase, STAGES)
    mbarrier.wait(k_full.index(slot1), phase1, pred=i + 1 < steps)
    return e, slot1, phase1


@gluon.jit
def _walk(
    acc, l, m, pb, p_entries, p_row_tokens, p_row_bits, e, slot, phase, before, steps, both, paired, rest, q, ks, vs,
    k_full, k_free, v_full, v_free, query, low, sink, scale2, cap_scale, start, listed, kind, columns, running,
    WHO: gl.constexpr, SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr,
    CAP: gl.constexpr, COLUMNS: gl.constexpr, HALVES: gl.constexpr, SHORT_FORM: gl.constexpr, Q_STEP: gl.constexpr,
    VOTE: gl.constexpr,
):  # fmt: skip
    """A row's steps from the second one on, with the running maximum or with the first step's."""
    STAGES: gl.constexpr = ks.shape[0]
    BN: gl.constexpr = ks.shape[3]
    # Two loops, since what masks entries and what masks columns do not fit the registers together.
    for i in range(1, gl.maximum(listed, 1)):
        if HALVES:
            needed = (i < both) | (gl.where(i < paired, (i - both) & 1, rest) == WHO)
            # Three buffers: one that waits for P V, one that is passed, one for the next step.
            if needed | (i >= paired) | (STAGES < 3):
                acc, l, m, pb, e, slot, phase, before = _advance(
                    acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
                    query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind, p_row_tokens,
                    p_row_bits, columns, needed == 0, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, False, True, False, Q_STEP,
                    VOTE,
                )  # fmt: skip
            else:
                e, slot, phase = _pass(
                    e, slot, phase, i, steps, k_full, k_free, v_full, v_free, p_entries, start, listed, kind,
                    BN, STAGES, SPLIT_ENTRY, PARTS, LISTED,
                )  # fmt: skip
        elif SHORT_FORM and ((kind & SHORT) != 0) & (i == listed - 1 - WHO):
            acc, l, m, pb, e, slot, phase, before = _advance_half(
                acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
                query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind, WHO, SPLIT_ENTRY, CAP,
                VOTE,
            )  # fmt: skip
        else:
            acc, l, m, pb, e, slot, phase, before = _advance(
                acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
                query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind, p_row_tokens,
                p_row_bits, columns, False, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, False, False, SHORT_FORM, Q_STEP,
                VOTE,
            )  # fmt: skip
    if COLUMNS:
        for i in range(gl.maximum(listed, 1), steps):
            acc, l, m, pb, e, slot, phase, before = _advance(
                acc, l, m, pb, e, slot, phase, before, i, steps, q, ks, vs, k_full, k_free, v_full, v_free,
                query, low, sink, scale2, cap_scale, running, p_entries, start, listed, kind, p_row_tokens,
                p_row_bits, columns, False, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, True, False, False, Q_STEP, VOTE,
            )  # fmt: skip
    return acc, l, m, pb, slot, phase, before


@gluon.jit
def _hide(s, hidden):
    if hidden:
        s = gl.full_like(s, float("-inf"))
    return s


@gluon.jit
def _with_sink(total, top, z):
    """(sum of weights, factor of the output, maximum) of rows, in powers of 2, with a sink's logit z beside them."""
    highest = gl.maximum(top, z)
    shrink = gl.exp2(top - highest)
    total = total * shrink + gl.exp2(z - highest)
    return total, shrink / total, highest


@gluon.jit
def _store_part(p_part, p_part_lse, part, lane, lse2, result, LO: gl.constexpr):
    """A piece of a row that is split: its output, and the logarithm of its weights to base 2."""
    HALF: gl.constexpr = result.shape[0]
    D: gl.constexpr = result.shape[1]
    row = part.to(gl.int64) * (2 * HALF) + lane
    gl.store(p_part_lse + row, lse2)
    d = gl.arange(0, D, gl.SliceLayout(0, LO))
    gl.store(p_part + gl.expand_dims(row * D, 1) + gl.expand_dims(d, 0), result)


@gluon.jit
def _mark(p_marks, number, left):
    """Marks the item if one of its rows is left to the running maximum."""
    at = gl.where(left, number + 1, 0)
    gl.store(p_marks + at * 0, at * 0 + 1, mask=left)
    gl.store(p_marks + at, at * 0 + 1, mask=left)


@gluon.jit
def _finish(
    acc, m, l, d_o, qs, os, q_slot, q_free, mail, m_slot, m_free, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse,
    mode, heads, queries, q_offset, p_anchors, anchors,
    WHO: gl.constexpr, RULE: gl.constexpr, LSE: gl.constexpr, SINKS: gl.constexpr, SPLIT: gl.constexpr,
    EARLY: gl.constexpr, OUT_IN_Q: gl.constexpr, HALVES: gl.constexpr, CORRECT: gl.constexpr,
):  # fmt: skip
    """An item's result: out, lse. The item is read again in its mail, rather than kept in registers through the loops,
    which have none to spare."""
    HALF: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    LO: gl.constexpr = acc.type.layout
    row = _receive(mail, m_slot * MAIL + ROW)
    sample_head = _receive(mail, m_slot * MAIL + HEAD)
    kind = _receive(mail, m_slot * MAIL + KIND)
    sample = _receive(mail, m_slot * MAIL + SAMPLE)
    head = _receive(mail, m_slot * MAIL + OWN_HEAD)
    number = _receive(mail, m_slot * MAIL + NUMBER)
    part = -1
    if SPLIT:
        part = _receive(mail, m_slot * MAIL + SLOT)
    pos0 = row
    dense_from = FAR
    if CORRECT > 0:
        pos0 = row + q_offset - _receive(mail, m_slot * MAIL + KV)
        if RULE:
            dense_from = _receive(mail, m_slot * MAIL + DENSE_FROM)
    mbarrier.arrive(m_free.index(m_slot), count=1)
    lane_o = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LO))
    total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, LO))
    top = gl.convert_layout(m, gl.SliceLayout(1, LO))
    # A row that kept nothing has a total of exactly 0; NaN inputs stay NaN.
    valid = (lane_o >= (kind & 255)) & (lane_o < ((kind >> 8) & 255))
    kept = valid & (total != 0.0)
    if mode == FIXED:
        _mark(p_marks, number, valid & ((total <= MOST) == 0))  # NaN is not
    factor = 1.0 / total
    if SINKS:
        z = gl.load(p_sinks + head).to(gl.float32) * LOG2E
        if SPLIT:  # partial results leave the sink to the merge
            z = gl.where(part >= 0, float("-inf"), z)
        total, factor, top = _with_sink(total, top, z)
    if not OUT_IN_Q:
        tma.store_wait(0)
    result = gl.where(gl.expand_dims(kept, 1), acc * gl.expand_dims(factor, 1), 0.0)
    if CORRECT > 0:
        if (kind & DENSE) == 0:
            changes = kept & (pos0 + lane_o < dense_from)
            first = gl.maximum(pos0 - row, 0)
            result = _corrected(
                result, changes, pos0, first, p_anchors + sample_head.to(gl.int64) * anchors * D,
                os.index(WHO), WHO, CORRECT,
            )  # fmt: skip
    whole = part < 0
    if LSE:
        lse = gl.where(kept, (top + gl.log2(total)) * LN2, float("-inf"))
        inside = (row + lane_o >= 0) & (row + lane_o < queries) & whole
        if HALVES:
            inside = inside & _holds(kind, WHO, HALF)
        gl.store(p_lse + (sample_head.to(gl.int64) * queries + row) + lane_o, lse, mask=inside)
    if OUT_IN_Q:
        staging = qs.index(q_slot * 2 + WHO)
    else:
        staging = os.index(WHO)
    if SPLIT:
        if part >= 0:
            lse2 = gl.where(kept, top + gl.log2(total), float("-inf"))
            _store_part(p_part, p_part_lse, part, lane_o, lse2, result, LO)
        else:
            _store(d_o, p_out, sample, head, row + WHO * HALF, result, staging, queries, heads, LO, EARLY)
    elif HALVES:
        if _holds(kind, WHO, HALF):
            _store(d_o, p_out, sample, head, row + WHO * HALF, result, staging, queries, heads, LO, EARLY)
    else:
        _store(d_o, p_out, sample, head, row + WHO * HALF, result, staging, queries, heads, LO, EARLY)
    if OUT_IN_Q:
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(q_slot), count=1)


@gluon.jit
def _consume(
    d_o, qs, ks, vs, os, q_full, q_free, k_full, k_free, v_full, v_free, mail, m_full, m_free,
    p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, p_tokens, p_bits, scale, cap_scale, mode, heads,
    queries, q_offset, heads_per_plan, columns, token_sample, p_anchors, anchors,
    WHO: gl.constexpr, SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr,
    CAP: gl.constexpr, LSE: gl.constexpr, SINKS: gl.constexpr, COLUMNS: gl.constexpr, SPLIT: gl.constexpr,
    EARLY: gl.constexpr, OUT_IN_Q: gl.constexpr, NARROW_FORM: gl.constexpr, SHORT_FORM: gl.constexpr,
    HALVES: gl.constexpr, Q_STEP: gl.constexpr, PACK: gl.constexpr, CORRECT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    Q_STAGES: gl.constexpr = q_full.shape[0]
    HALF: gl.constexpr = d_o.block_type.shape[2]
    D: gl.constexpr = d_o.block_type.shape[3]
    BN: gl.constexpr = ks.shape[3]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    LN: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NARROW_KEYS, 16]
    )
    # An item's last P V is issued with the next item's first Q K^T, which runs while the result is made and sent. With
    # one tile of Q the next one is not there yet, and a correction wants the registers.
    OVERLAP: gl.constexpr = Q_STAGES > 1 and CORRECT == 0
    QUEUED: gl.constexpr = 2 if NARROW_FORM else 1
    # A step of the running maximum rescales behind a branch of its own or, where a rule's masks leave no register for
    # the branch's condition, by the warp's vote alone.
    VOTE: gl.constexpr = RULE and CORRECT == 0
    scale2 = scale * LOG2E
    zero = gl.zeros([HALF, BN], gl.float32, L)
    acc = gl.zeros([HALF, D], gl.float32, LO)
    pb = gl.zeros([HALF, BN], ks.dtype, LP)
    m = gl.full([HALF], FLOOR, gl.float32, gl.SliceLayout(1, L))
    l = gl.sum(_by_eight(zero), 1)
    slot = 0
    phase = 0
    before = 0
    q_slot = 0
    q_phase = 0
    m_slot = 0
    m_phase = 0
    due = 0  # whether an item's last P V and its result are
    mbarrier.wait(m_full.index(0), 0)
    count = _receive(mail, COUNT)
    while count > 0:
        if OVERLAP:
            acc = warpgroup_mma(pb, vs.index(before).reshape([BN, D]), acc, is_async=True)
        if Q_STAGES == 2:  # as many as of mail
            q_slot, q_phase = m_slot, m_phase
        row, _, start, kv_start, kind, e, e1 = _receive_item(mail, m_slot)
        p_row_bits = p_bits
        p_row_tokens = p_tokens
        listed, steps = _steps(count, COLUMNS)
        if COLUMNS:
            sample = _receive(mail, m_slot * MAIL + SAMPLE)
            head = _receive(mail, m_slot * MAIL + OWN_HEAD)
            plan_row = _receive(mail, m_slot * MAIL + PLAN)
            if HALVES:
                plan_row = (plan_row >> 1) + WHO * (plan_row & 1)
            p_row_bits = p_bits + plan_row.to(gl.int64) * ((columns + 31) // 32)
            p_row_tokens = p_tokens + sample * token_sample + head // heads_per_plan * columns
        both = steps
        paired = steps
        rest = 0
        if HALVES:
            word = _receive(mail, m_slot * MAIL + SLOT)
            both = word & ((1 << PAIRS_SHIFT) - 1)
            paired = both + ((word >> PAIRS_SHIFT) & ((1 << (31 - PAIRS_SHIFT)) - 1)) * 2
            rest = (word < 0).to(gl.int32)
        lane = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, L))
        if Q_STEP > 1:
            first = gl.maximum(q_offset - kv_start, 0)
            query = gl.maximum((first // Q_STEP + (row + lane) // PACK) * Q_STEP, first)
            query = gl.where((kind & EMPTY) != 0, -1, query)
        else:
            query = gl.where((kind & EMPTY) != 0, -1, row + q_offset - kv_start + lane)
        sink = 0
        low = query
        if RULE:
            sink, low = _receive_rule(mail, m_slot, query)
        q = qs.index(q_slot * 2 + WHO).reshape([HALF, D])
        mbarrier.wait(q_full.index(q_slot), q_phase)
        mbarrier.wait(k_full.index(slot), phase)
        few_slot = slot
        few_phase = phase
        narrow = 0
        if NARROW_FORM:
            # Multiplied in every item, and hidden where none was sent: the results wait in one queue.
            narrow = (kind & NARROW) // NARROW
            few_keys = _first_rows(ks.index(slot), NARROW_KEYS).permute((1, 0))
            zero_few = gl.zeros([HALF, NARROW_KEYS], gl.float32, LN)
            few = warpgroup_mma(q, few_keys, zero_few, use_acc=False, is_async=True)
            next_slot, next_phase = _next(slot, phase, STAGES)
            slot = gl.where(narrow != 0, next_slot, slot)
            phase = gl.where(narrow != 0, next_phase, phase)
            mbarrier.wait(k_full.index(slot), phase)
        s = warpgroup_mma(q, ks.index(slot).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        if OVERLAP:
            acc = warpgroup_mma_wait(QUEUED, deps=(acc,))
            mbarrier.arrive(v_free.index(before), count=1, pred=due != 0)
            if due != 0:
                _finish(
                    acc, m, l, d_o, qs, os, q_slot, q_free, mail, 1 - m_slot, m_free, p_marks, p_out, p_lse, p_sinks,
                    p_part, p_part_lse, mode, heads, queries, q_offset, p_anchors, anchors,
                    WHO, RULE, LSE, SINKS, SPLIT, EARLY, OUT_IN_Q, HALVES, CORRECT,
                )  # fmt: skip
        if NARROW_FORM:
            few = warpgroup_mma_wait(1, deps=(few,))
            mbarrier.arrive(k_free.index(few_slot), count=1, pred=narrow != 0)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(slot), count=1)
        s = _cap(s, cap_scale, CAP)
        if COLUMNS:
            if listed == 0:
                s = _mask_columns(s, query, p_row_tokens, p_row_bits, 0, columns, L)
            elif (e & 3) != 0:
                s = _mask_step(s, query, low, sink, e, p_entries, start, 0, listed, kind, L, RULE, PARTS)
        elif (e & 3) != 0:
            s = _mask_step(s, query, low, sink, e, p_entries, start, 0, listed, kind, L, RULE, PARTS)
        if HALVES:
            s = _hide(s, (both == 0) & (gl.where(paired > 0, 0, rest) != WHO))
        m1 = gl.maximum(_row_max(s, L) * scale2, FLOOR)
        if NARROW_FORM:
            few = _cap(few, cap_scale, CAP)
            key = gl.arange(0, NARROW_KEYS, gl.SliceLayout(0, LN))
            few = gl.where(gl.expand_dims(key < sink * narrow, 0), few, float("-inf"))
            m1 = gl.maximum(m1, gl.convert_layout(gl.max(few, 1), gl.SliceLayout(1, L)) * scale2)
            few = gl.exp2(few * scale2 - gl.expand_dims(gl.convert_layout(m1, gl.SliceLayout(1, LN)), 1))
        p = gl.exp2(s * scale2 - gl.expand_dims(m1, 1))
        l1 = gl.sum(_by_eight(p), 1)
        if NARROW_FORM:
            l1 += gl.convert_layout(gl.sum(_by_eight(few), 1), l.type.layout)
        mbarrier.wait(v_full.index(few_slot), few_phase)
        acc = gl.zeros([HALF, D], gl.float32, LO)
        if NARROW_FORM:
            if narrow != 0:
                few_pb = gl.convert_layout(few.to(ks.dtype), LP)
                acc = warpgroup_mma(few_pb, _first_rows(vs.index(few_slot), NARROW_KEYS), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(v_free.index(few_slot), count=1)
        m = m1
        l = l1
        pb = gl.convert_layout(p.to(ks.dtype), LP)
        e = e1
        before = slot
        if NARROW_FORM:
            mbarrier.wait(v_full.index(slot), phase)
        slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(k_full.index(slot), phase, pred=steps > 1)
        # Where a row may see nothing in its first step: a window's edge without sinks, columns, the other half's step,
        # the second half of a dense row's diagonal.
        running = mode != FIXED
        if RULE:
            running = running | (sink == 0)
        if BN < 2 * HALF and Q_STEP == 1:
            running = running | ((kind & DENSE) != 0)
        if COLUMNS:
            running = running | (listed == 0)
        if HALVES:
            running = running | (both == 0)
        if ks.dtype == gl.float16:  # holds no weights above 2^16
            running = True
        others = (  # a tuple holds no pointer that may be None
            e, slot, phase, before, steps, both, paired, rest, q, ks, vs, k_full, k_free, v_full, v_free, query, low,
            sink, scale2, cap_scale, start, listed, kind, columns,
        )  # fmt: skip
        if RULE or COLUMNS:  # masks leave no registers for loops of both kinds
            acc, l, m, pb, slot, phase, before = _walk(
                acc, l, m, pb, p_entries, p_row_tokens, p_row_bits, *others, running,
                WHO, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, COLUMNS, HALVES, SHORT_FORM, Q_STEP, VOTE,
            )  # fmt: skip
        elif running:
            acc, l, m, pb, slot, phase, before = _walk(
                acc, l, m, pb, p_entries, p_row_tokens, p_row_bits, *others, True,
                WHO, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, COLUMNS, HALVES, SHORT_FORM, Q_STEP, VOTE,
            )  # fmt: skip
        else:
            acc, l, m, pb, slot, phase, before = _walk(
                acc, l, m, pb, p_entries, p_row_tokens, p_row_bits, *others, False,
                WHO, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, COLUMNS, HALVES, SHORT_FORM, Q_STEP, VOTE,
            )  # fmt: skip
        if not OUT_IN_Q:
            mbarrier.arrive(q_free.index(q_slot), count=1)
        if OVERLAP:
            due = 1
        else:
            acc = warpgroup_mma(pb, vs.index(before).reshape([BN, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_free.index(before), count=1)
            _finish(
                acc, m, l, d_o, qs, os, q_slot, q_free, mail, m_slot, m_free, p_marks, p_out, p_lse, p_sinks,
                p_part, p_part_lse, mode, heads, queries, q_offset, p_anchors, anchors,
                WHO, RULE, LSE, SINKS, SPLIT, EARLY, OUT_IN_Q, HALVES, CORRECT,
            )  # fmt: skip
        q_slot, q_phase = _next(q_slot, q_phase, Q_STAGES)
        m_slot, m_phase = _next(m_slot, m_phase, 2)
        mbarrier.wait(m_full.index(m_slot), m_phase)
        count = _receive(mail, m_slot * MAIL + COUNT)
    if OVERLAP:
        if due != 0:
            acc = warpgroup_mma(pb, vs.index(before).reshape([BN, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_free.index(before), count=1)
            _finish(
                acc, m, l, d_o, qs, os, q_slot, q_free, mail, 1 - m_slot, m_free, p_marks, p_out, p_lse, p_sinks,
                p_part, p_part_lse, mode, heads, queries, q_offset, p_anchors, anchors,
                WHO, RULE, LSE, SINKS, SPLIT, EARLY, OUT_IN_Q, HALVES, CORRECT,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _corrected(result, changes, pos0, first, p_anchors, staging, WHO: gl.constexpr, CORRECT: gl.constexpr):
    """result (HALF, D), and in rows that change, dense - sparse of their anchors.

    pos0, first: positions of the item's first row and of this call's first query. p_anchors: dense rows (anchors, D).
    """
    HALF: gl.constexpr = result.shape[0]
    D: gl.constexpr = result.shape[1]
    LO: gl.constexpr = result.type.layout
    LA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    start = pos0 + WHO * HALF
    sparse = staging.reshape([HALF, D])
    sparse.store(result.to(staging.dtype))
    fence_async_shared()
    anchor = gl.maximum((start + gl.arange(0, HALF, gl.SliceLayout(1, LA))) // CORRECT * CORRECT, first) - start
    copies = gl.expand_dims(anchor, 1) == gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, LA)), 0)
    copies = gl.convert_layout(copies.to(staging.dtype), gl.DotOperandLayout(0, LO, 2))
    before = warpgroup_mma(copies, sparse, gl.zeros([HALF, D], gl.float32, LO), use_acc=False, is_async=True)
    block = (start + gl.arange(0, HALF, gl.SliceLayout(1, LO))) // CORRECT - first // CORRECT
    d = gl.arange(0, D, gl.SliceLayout(0, LO))
    at = p_anchors + gl.expand_dims(block.to(gl.int64) * D, 1) + gl.expand_dims(d, 0)
    dense = gl.load(at, mask=gl.expand_dims(changes, 1), other=0.0).to(gl.float32)
    before = warpgroup_mma_wait(0, deps=(before,))
    return gl.where(gl.expand_dims(changes, 1), result + dense - before, result)


@gluon.jit
def _holds(kind, WHO: gl.constexpr, HALF: gl.constexpr):
    """Whether a half has valid rows in this item: its other rows may be another item's."""
    return ((kind & 255) < (WHO + 1) * HALF) & (((kind >> 8) & 255) > WHO * HALF)


@gluon.jit
def _store(d_o, p_out, sample, head, row, result, staging, queries, heads, LO: gl.constexpr, EARLY: gl.constexpr):
    """result (HALF, D) -> rows [row, row + HALF) of out, of which those before 0 or past the last are left out."""
    if EARLY:
        if row < 0:
            # TMA clips a store past the end, but one that starts before row 0 is an illegal instruction (H100).
            o_row = row + gl.arange(0, result.shape[0], gl.SliceLayout(1, LO))
            o_d = gl.arange(0, result.shape[1], gl.SliceLayout(0, LO))
            o_out = ((sample.to(gl.int64) * queries + o_row) * heads + head) * result.shape[1]
            inside = gl.expand_dims((o_row >= 0) & (o_row < queries), 1)
            at = p_out + gl.expand_dims(o_out, 1) + gl.expand_dims(o_d, 0)
            gl.store(at, result.to(d_o.dtype), mask=inside)
        else:
            _store_by_tma(d_o, sample, head, row, result, staging)
    else:
        _store_by_tma(d_o, sample, head, row, result, staging)


@gluon.jit
def _store_by_tma(d_o, sample, head, row, result, staging):
    staging.reshape([result.shape[0], result.shape[1]]).store(result.to(d_o.dtype))
    fence_async_shared()
    _tma_store(d_o, [sample, head, row, 0], staging)


RUN_TIME_NUMBERS = [
    "scale", "cap_scale", "items", "heads", "group", "queries", "q_offset", "rule_sample", "rule_head",
    "heads_per_plan", "heads_per_pool", "columns", "token_sample", "table_sample", "keys", "anchors", "mode",
]  # fmt: skip
POINTERS = [
    "p_items", "p_entries", "p_counters", "p_rule", "p_out", "p_lse", "p_sinks", "p_part", "p_part_lse",
    "p_table", "p_tokens", "p_bits", "p_marks",
]  # fmt: skip


# Nothing is specialised on a value or an alignment, so that a compiled kernel may be launched again with any other call
# of the same types (hopper.py does, past Triton's own 40 us of argument handling).
@gluon.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=POINTERS)
def attention(
    d_q, d_k, d_v, d_o, d_pool_k, d_pool_v, d_part_k, d_part_v, d_last_v,
    p_items, p_entries, p_counters, p_rule, p_out, p_lse, p_sinks, p_part, p_part_lse, p_table, p_tokens, p_bits,
    p_anchors, p_marks, mode, scale, cap_scale, items, heads, group, queries, q_offset, rule_sample, rule_head,
    heads_per_plan, heads_per_pool, columns, token_sample, table_sample, keys, anchors,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, SPLIT_ENTRY: gl.constexpr, PARTS: gl.constexpr, LISTED: gl.constexpr,
    RULE: gl.constexpr, CAP: gl.constexpr, LSE: gl.constexpr, SINKS: gl.constexpr, COLUMNS: gl.constexpr,
    SPLIT: gl.constexpr, EARLY: gl.constexpr, OUT_IN_Q: gl.constexpr, NARROW_FORM: gl.constexpr,
    HALVES: gl.constexpr, PAGE: gl.constexpr, Q_STEP: gl.constexpr, PACK: gl.constexpr, CORRECT: gl.constexpr,
):  # fmt: skip
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    SHORT_FORM: gl.constexpr = (
        NARROW_FORM and d_k.block_type.shape[2] == 2 * d_q.block_type.shape[2] and not (COLUMNS or HALVES or Q_STEP > 1)
    )
    qs = gl.allocate_shared_memory(d_q.dtype, [2 * Q_STAGES] + d_q.block_type.shape, d_q.layout)
    ks = gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    vs = gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    if OUT_IN_Q:
        os = qs
    else:
        os = gl.allocate_shared_memory(d_o.dtype, [2] + d_o.block_type.shape, d_o.layout)
    mail = gl.allocate_shared_memory(gl.int32, [2 * MAIL, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    m_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    m_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(m_full.index(i), count=1)
        mbarrier.init(m_free.index(i), count=3)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                d_o, qs, ks, vs, os, q_full, q_free, k_full, k_free, v_full, v_free, mail, m_full, m_free,
                p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, p_tokens, p_bits, scale, cap_scale, mode,
                heads, queries, q_offset, heads_per_plan, columns, token_sample, p_anchors, anchors,
                0, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, LSE, SINKS, COLUMNS, SPLIT, EARLY, OUT_IN_Q, NARROW_FORM,
                SHORT_FORM, HALVES, Q_STEP, PACK, CORRECT,
            )),
            (_consume, (
                d_o, qs, ks, vs, os, q_full, q_free, k_full, k_free, v_full, v_free, mail, m_full, m_free,
                p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, p_tokens, p_bits, scale, cap_scale, mode,
                heads, queries, q_offset, heads_per_plan, columns, token_sample, p_anchors, anchors,
                1, SPLIT_ENTRY, PARTS, LISTED, RULE, CAP, LSE, SINKS, COLUMNS, SPLIT, EARLY, OUT_IN_Q, NARROW_FORM,
                SHORT_FORM, HALVES, Q_STEP, PACK, CORRECT,
            )),
            (_produce_keys, (
                d_q, d_k, d_pool_k, d_part_k, d_last_v, qs, ks, q_full, q_free, k_full, k_free, mail, m_full, m_free,
                p_items, p_entries, p_counters, p_marks, p_rule, p_table, mode, items, heads, group, rule_sample,
                rule_head, heads_per_plan, heads_per_pool, table_sample, keys, SPLIT_ENTRY, PARTS, LISTED, RULE,
                COLUMNS, SPLIT, NARROW_FORM, SHORT_FORM, HALVES, PAGE, Q_STEP,
            )),
            (_produce_values, (
                d_v, d_pool_v, d_part_v, d_last_v, vs, v_full, v_free, mail, m_full, m_free, p_entries, p_table,
                group, heads_per_pool, table_sample, keys, SPLIT_ENTRY, PARTS, LISTED, COLUMNS, NARROW_FORM,
                SHORT_FORM, PAGE, Q_STEP,
            )),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "queries", "stride_b", "stride_h", "stride_q"])
def merge(
    p_merges, p_part, p_part_lse, p_out, p_lse, p_sinks, heads, queries, stride_b, stride_h, stride_q,
    D: tl.constexpr, BM: tl.constexpr, LSE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Partial results of rows split over keys -> out, lse. Program (first slot of a row, BM of its 128 queries).

    p_merges: (slots, 4) int32: row of q, sample * H + head, valid rows low | high << 8, and how many slots from here on
    belong to the row; 0 in all slots but a row's first.
    """
    slot = tl.program_id(0)
    count = tl.load(p_merges + slot * 4 + 3)
    if count > 0:
        row = tl.load(p_merges + slot * 4)
        sample_head = tl.load(p_merges + slot * 4 + 1)
        valid = tl.load(p_merges + slot * 4 + 2)
        lane = tl.program_id(1) * BM + tl.arange(0, BM)
        o_d = tl.arange(0, D)
        o_part = slot.to(tl.int64) * 128 + lane
        top = tl.full([BM], -1.0e30, tl.float32)
        for i in range(count):
            top = tl.maximum(top, tl.load(p_part_lse + o_part + i * 128))
        z = float("-inf")
        if SINKS:
            z = tl.load(p_sinks + sample_head % heads).to(tl.float32) * 1.4426950408889634
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        shift = tl.maximum(top, z)
        for i in range(count):
            weight = tl.exp2(tl.load(p_part_lse + o_part + i * 128) - shift)
            total += weight
            acc += weight[:, None] * tl.load(p_part + (o_part + i * 128)[:, None] * D + o_d[None])
        # A row that is NaN in all parts has no maximum either, and stays NaN.
        kept = ((top > -1.0e30) | (total != total)) & (lane >= (valid & 255)) & (lane < ((valid >> 8) & 255))
        if SINKS:
            total += tl.exp2(z - shift)
        sample = (sample_head // heads).to(tl.int64)
        head = (sample_head % heads).to(tl.int64)
        inside = (row + lane >= 0) & (row + lane < queries)
        result = tl.where(kept[:, None], acc / total[:, None], 0.0)
        o_out = sample * stride_b + head * stride_h + (row + lane).to(tl.int64) * stride_q
        tl.store(p_out + o_out[:, None] + o_d[None], result.to(p_out.dtype.element_ty), mask=inside[:, None])
        if LSE:
            lse = tl.where(kept, (shift + tl.log2(total)) * 0.6931471805599453, float("-inf"))
            tl.store(p_lse + sample_head.to(tl.int64) * queries + row + lane, lse, mask=inside)


# Compiled kernels are launched again with other numbers, so none is specialised on.
LIST_NUMBERS = [
    "items", "rows", "heads_per_sample", "words", "rule_sample", "rule_head", "q_offset", "last_entry",
]  # fmt: skip
GATHER_NUMBERS = [
    "tokens", "heads", "plan_heads", "plan_sample", "per_key_head", "k_batch", "k_head", "k_token", "v_batch", "v_head",
    "v_token", "key_limit", "programs", "table_sample",
]  # fmt: skip


@triton.jit(do_not_specialize=LIST_NUMBERS)
def list_items(
    p_grid, p_rows, p_row_ptr, p_entries, p_dense, p_bits, p_rule, p_items, p_work,
    items, rows, heads_per_sample, words, rule_sample, rule_head, q_offset, last_entry,
    STEP: tl.constexpr, BLOCK_KV: tl.constexpr, HALF_STEPS: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`hopper._listed` in one launch: PER items of a plan with lists, and the steps of each.

    p_grid: (items, 8) as if every row were dense. p_rows: int64, the plan's row of each.
    """
    PARTS: tl.constexpr = STEP // BLOCK_KV if STEP > BLOCK_KV else 1
    i = tl.program_id(0) * PER + tl.arange(0, PER)
    there = i < items
    p_from = p_grid + i * 8
    row = tl.load(p_from, mask=there, other=0)
    head = tl.load(p_from + 1, mask=there, other=0)
    dense_start = tl.load(p_from + 2, mask=there, other=0)
    dense_steps = tl.load(p_from + 3, mask=there, other=1)
    kv_start = tl.load(p_from + 4, mask=there, other=0)
    kind = tl.load(p_from + 5, mask=there, other=0)
    plan_row = tl.load(p_rows + i, mask=there, other=0)
    begin = tl.load(p_row_ptr + plan_row, mask=there, other=0)
    entries = tl.load(p_row_ptr + plan_row + 1, mask=there, other=0) - begin
    flags = kind & 0xFFFF
    count = entries
    if PARTS > 1:
        flags = flags | ((-entries & (PARTS - 1)) << MISSING_SHIFT)
        count = (entries + (PARTS - 1)) // PARTS
    elif p_rule is not None:
        at = plan_row // rows
        p_own = p_rule + at // heads_per_sample * rule_sample + at % heads_per_sample * rule_head
        sink = tl.load(p_own, mask=there, other=0)
        window = tl.load(p_own + 1, mask=there, other=0)
        dense_from = tl.load(p_own + 2, mask=there, other=0)
        start = row + q_offset - kv_start
        first = tl.load(p_entries + tl.minimum(begin, last_entry), mask=there, other=0)
        few = (first == RULE_ALONE) & (sink <= NARROW_KEYS) & (entries > 1)
        narrow = (few & (start - window + 1 >= BLOCK_KV) & (start + 128 <= dense_from)).to(tl.int32)
        flags = flags | narrow * NARROW
        begin += narrow
        count = entries - narrow
        if HALF_STEPS:
            second = tl.load(p_entries + tl.minimum(begin + 1, last_entry), mask=there, other=0)
            last = tl.load(p_entries + tl.maximum(tl.minimum(begin + count - 1, last_entry), 0), mask=there, other=0)
            first = tl.load(p_entries + tl.minimum(begin, last_entry), mask=there, other=0)
            edge = start - window + 1
            at_first = ((first & RULE_ALONE) != 0) & ((first >> 2) >= sink) & ((first >> 2) <= edge)
            at_second = ((second & RULE_ALONE) != 0) & ((second >> 2) >= sink) & ((second >> 2) <= edge)
            diagonal = ((last & 1) != 0) & ((last >> 2) >= start) & (start + 128 <= dense_from)
            short = (at_first | at_second) & diagonal & (count > 2)
            flags = flags | short.to(tl.int32) * SHORT | (short & (at_first == 0)).to(tl.int32) * SECOND_EDGE
    if BLOCK_KV > STEP:
        count = count * (BLOCK_KV // STEP)
    dense = begin < 0
    if p_dense is not None:
        dense = tl.load(p_dense + plan_row, mask=there, other=0) != 0
        count = tl.where(dense, dense_steps, count)
    work = count
    if p_bits is not None:
        last = tl.zeros([PER], tl.int32)
        for w in range(0, words, WORDS):
            at_word = w + tl.arange(0, WORDS)
            inside = there[:, None] & (at_word < words)[None]
            word = tl.load(p_bits + plan_row[:, None] * words + at_word[None], mask=inside, other=0)
            last = tl.maximum(last, tl.max(tl.where(word != 0, at_word[None] + 1, 0), 1))
        columns = (last * 32 + (STEP - 1)) // STEP
        work = count + columns
        count = count | (columns << COLUMN_SHIFT)
    empty = ((kind & EMPTY) != 0) | (work == 0)
    bounded = dense | empty
    p_to = p_items + i * 8
    tl.store(p_to, row, mask=there)
    tl.store(p_to + 1, head, mask=there)
    tl.store(p_to + 2, tl.where(empty, 0, tl.where(dense, dense_start, begin)), mask=there)
    tl.store(p_to + 3, tl.where(empty, 1, count), mask=there)
    tl.store(p_to + 4, kv_start, mask=there)
    tl.store(p_to + 5, tl.where(bounded, kind, flags) | tl.where(empty, EMPTY, 0), mask=there)
    tl.store(p_to + 6, -1, mask=there)
    tl.store(p_to + 7, plan_row.to(tl.int32), mask=there)
    tl.store(p_work + i, tl.where(empty, 1, work), mask=there)


@triton.jit(do_not_specialize=["items", "processors"])
def sort_keys(p_work, p_total, p_section, p_key, items, processors, PER: tl.constexpr):
    """`hopper._sort_keys`: items that would decide the finish, then by section; heaviest first."""
    i = tl.program_id(0) * PER + tl.arange(0, PER)
    work = tl.load(p_work + i, mask=i < items, other=0)
    section = tl.load(p_section + i, mask=i < items, other=0)
    decides = work.to(tl.int64) * (4 * processors) > tl.load(p_total)
    key = tl.where(decides, 0, section) - tl.minimum(work, (1 << 24) - 1)
    key = tl.where(work == 0, 0x7FFFFFFF, key)
    tl.store(p_key + i, key, mask=i < items)


@triton.jit(do_not_specialize=GATHER_NUMBERS)
def gather_columns(
    p_k, p_v, p_table, p_tokens, p_bounds, p_pool_k, p_pool_v, tokens, heads, plan_heads, plan_sample, per_key_head,
    k_batch, k_head, k_token, v_batch, v_head, v_token, key_limit, programs, table_sample,
    D: tl.constexpr, PAGE: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """K and V of single columns -> the pools (B, heads, T, D), for PER columns of one head a program.

    A sample without keys may have no page: its columns are zeros.
    """
    i_pair = tl.program_id(0) // programs
    i_head = i_pair % heads
    i_sample = i_pair // heads
    t = tl.program_id(0) % programs * PER + tl.arange(0, PER)
    inside = t < tokens
    plan_head = tl.where(plan_heads == 1, 0, i_head)
    p_own = p_tokens + (i_sample * plan_sample * plan_heads + plan_head).to(tl.int64) * tokens
    token = tl.load(p_own + t, mask=inside, other=0)
    kv_start = tl.load(p_bounds + i_sample * 2)
    last = tl.load(p_bounds + i_sample * 2 + 1)
    held = t < tl.where(last >= 0, tokens, 0)
    key = tl.minimum(tl.minimum(token, last) + kv_start, key_limit).to(tl.int64)
    key_head = (i_head // per_key_head).to(tl.int64)
    d = tl.arange(0, D)
    mask = inside[:, None]
    batch = i_sample.to(tl.int64)
    if PAGE > 0:
        batch, key = _in_pages(p_table + batch * table_sample, key, held, 0, PAGE)
        batch = batch.to(tl.int64)
    o_k = batch * k_batch + key_head * k_head + key * k_token
    o_v = batch * v_batch + key_head * v_head + key * v_token
    o_pool = (i_pair.to(tl.int64) * tokens + t) * D
    rows = tl.load(p_k + o_k[:, None] + d[None], mask=held[:, None], other=0.0)
    tl.store(p_pool_k + o_pool[:, None] + d[None], rows, mask=mask)
    rows = tl.load(p_v + o_v[:, None] + d[None], mask=held[:, None], other=0.0)
    tl.store(p_pool_v + o_pool[:, None] + d[None], rows, mask=mask)

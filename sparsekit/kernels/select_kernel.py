"""The Triton side of `select.py`: bisection on ordered integers for rows, radix select for long rows, bits -> CSR.

A float's bits, turned so that they order as integers, let 32 halvings find a row's k-th value exactly, without a sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.block_sparse import _start
from sparsekit.kernels.select import WORD, BlockGrid, rows_that_fit
from sparsekit.plan import BlockPlan

__all__ = ["on_device", "plan_from_bits_triton", "top_p_bits_triton", "topk_bits_triton", "topk_indices_mask_triton"]

NONE = tl.constexpr(-0x80000000)  # the key of what is never selected
NOTHING = tl.constexpr(0x7FFFFFFF)  # above the key of +inf: a NaN, which no score reaches


# ---- device functions. p_: pointer, b_: tile, i_: index


@triton.jit
@no_type_check
def _ordered(b_score):
    """int32 keys in the order of the floats; the two zeros are one; -inf and NaN are NONE."""
    bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_score > float("-inf"), key, NONE)


@triton.jit
@no_type_check
def _upper_middle(low, high):
    """ceil((low + high) / 2) without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
@no_type_check
def _store_words(
    p_bits, keep, length, words, BLOCK: tl.constexpr, ALL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):
    """Packs bool (BLOCK,), and what is forced, into words of 32; zeros in the row's other words, of which there are
    ALL // 32 at most."""
    lane = tl.arange(0, BLOCK // 32)
    word = tl.sum(tl.reshape(keep.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :], 1)
    if FIRST:
        word |= ((lane == 0) & (length > 0)).to(tl.int32)
    if LAST:
        word |= ((lane == (length - 1) // 32) & (length > 0)).to(tl.int32) << ((length - 1) & 31)
    tl.store(p_bits + lane, word, mask=lane < words)
    if ALL > BLOCK:
        rest = tl.arange(0, ALL // 32)
        tl.store(p_bits + rest, tl.zeros([ALL // 32], tl.int32), mask=(rest >= BLOCK // 32) & (rest < words))


@triton.jit
@no_type_check
def _value(key):
    """The float of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _whole(length, STEP: tl.constexpr):
    """A row's length in whole steps: still its own memory, and loads of 16 bytes (`load_step`)."""
    return (length + STEP - 1) // STEP * STEP


@triton.jit
@no_type_check
def _log2(number):
    """Near to it, in units of 2^-23 and from 2^-127 on: straight between powers of two."""
    return number.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def _depth(whole, count):
    """How far into the tail `count` of `whole` numbers begin, like a bell's distance from its middle."""
    return tl.sqrt(tl.maximum((_log2(whole * 1.2) - _log2(count)).to(tl.float32), 0.0))


@triton.jit
@no_type_check
def _topk_row(
    p_score, p_bits, length, k, words,
    BLOCK: tl.constexpr, ALL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row whose `length` is at most BLOCK."""
    column = tl.arange(0, BLOCK)
    score = tl.load(p_score + column, mask=column < _whole(length, STEP), other=float("-inf"))
    # Neither NaN nor what is forced is a candidate. Floats, because ptxas counts them in half the time of integers.
    candidate = (column >= FIRST) & (column < length - LAST) & (score > float("-inf"))
    score = tl.where(candidate, score, float("-inf"))
    n_some = tl.sum(candidate.to(tl.float32)).to(tl.int32)
    wanted = tl.minimum(tl.maximum(k - tl.minimum(FIRST + LAST, length), 0), n_some)
    # The largest threshold that at least `wanted` scores reach; where none is wanted, one that no score does.
    high = _ordered(tl.max(score))
    low = tl.where(wanted > 0, _ordered(tl.min(tl.where(candidate, score, float("inf")))), NOTHING)
    reached = tl.where(wanted > 0, n_some, 0)
    if wanted < reached:
        above = 0  # scores above `high`
        turn = 0
        while low < high:
            # A guess where roots of log shares are straight in between, as a bell's tail has them (a fifth to a quarter
            # fewer turns than by logs, on means of queries and keys); every fourth time the middle key.
            first, last = _value(low), _value(high)
            depth = _depth(n_some, reached)
            share = (_depth(n_some, wanted) - depth) / (_depth(n_some, tl.maximum(above, 0.5)) - depth)
            guess = first + (last - first) * share
            middle = _upper_middle(low, high)
            if (turn % 4 < 3) & (tl.abs(guess) < float("inf")):
                middle = tl.minimum(tl.maximum(_ordered(guess), low + 1), high)
            count = tl.sum((score >= _value(middle)).to(tl.float32)).to(tl.int32)
            enough = count >= wanted
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            above = tl.where(enough, above, count)
            high = tl.where(enough, tl.where(count == wanted, middle, high), middle - 1)
            turn += 1
    least = _value(low)
    keep = score >= least
    if reached > wanted:
        tie = (score == least).to(tl.int32)
        over = reached - tl.sum(tie)
        keep = keep & ((score > least) | (over + tl.cumsum(tie, 0) <= wanted))
    _store_words(p_bits, keep, length, words, BLOCK, ALL, FIRST, LAST)


@triton.jit(do_not_specialize=["k", "words"])
@no_type_check
def _topk(
    p_score, p_bits, p_k, p_length, k, columns, words,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A program a row; short rows run on a half or a quarter of the block."""
    i_row = tl.program_id(0).to(tl.int64)
    length = columns
    if p_length is not None:
        length = tl.minimum(tl.load(p_length + i_row), columns)
    if p_k is not None:
        k = tl.load(p_k + i_row)
    p_score += i_row * columns
    p_bits += i_row * words
    if BLOCK >= 256:
        if length * 4 <= BLOCK:
            _topk_row(p_score, p_bits, length, k, words, BLOCK // 4, BLOCK, FIRST, LAST, STEP)
        elif length * 2 <= BLOCK:
            _topk_row(p_score, p_bits, length, k, words, BLOCK // 2, BLOCK, FIRST, LAST, STEP)
        else:
            _topk_row(p_score, p_bits, length, k, words, BLOCK, BLOCK, FIRST, LAST, STEP)
    else:
        _topk_row(p_score, p_bits, length, k, words, BLOCK, BLOCK, FIRST, LAST, STEP)


@triton.jit
@no_type_check
def _units(key, top):
    """int32 masses from the bits of floats, the row's largest in [2^30, 2^31): mantissas, shifted."""
    shift = 7 + (key >> 23) - (top >> 23)
    mantissa = (key & 0x7FFFFF) | 0x800000
    moved = tl.where(shift >= 0, mantissa << tl.maximum(shift, 0), mantissa >> tl.minimum(-tl.minimum(shift, 0), 31))
    return tl.where(key > 0, moved, 0)


@triton.jit
@no_type_check
def _top_p_row(
    p_score, p_bits, length, share, words,
    BLOCK: tl.constexpr, ALL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One row whose `length` is at most BLOCK."""
    column = tl.arange(0, BLOCK)
    score = tl.load(p_score + column, mask=column < length, other=float("-inf"))
    forced = column < 0
    if FIRST:
        forced = forced | ((column == 0) & (column < length))
    if LAST:
        forced = forced | (column == length - 1)
    if share >= 1.0:
        keep = score > float("-inf")
    else:
        bits = tl.minimum(score.to(tl.int32, bitcast=True), 0x7F7FFFFF)
        key = tl.where((score > 0.0) & (bits >= 0x800000), bits, 0)
        unit = _units(key, tl.max(key))
        required = tl.sum(unit.to(tl.int64)).to(tl.float64) * share
        start = tl.sum(tl.where(forced, unit, 0).to(tl.int64))
        key = tl.where(forced, 0, key)
        unit = tl.where(forced, 0, unit)
        top = tl.max(key)
        keep = column < 0
        if (start.to(tl.float64) < required) & (top > 0):
            # The largest threshold whose masses reach what is required.
            low = tl.min(tl.where(key > 0, key, top))
            high = top
            while low < high:
                middle = _upper_middle(low, high)
                reached = start + tl.sum(tl.where(key >= middle, unit, 0).to(tl.int64))
                enough = reached.to(tl.float64) >= required
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            above = start + tl.sum(tl.where(key > low, unit, 0).to(tl.int64))
            tie = (key == low).to(tl.int32)
            one = tl.max(tl.where(key == low, unit, 0)).to(tl.int64)
            before = above + (tl.cumsum(tie, 0) - tie).to(tl.int64) * one
            keep = (key > low) | ((tie != 0) & (before.to(tl.float64) < required))
    _store_words(p_bits, keep, length, words, BLOCK, ALL, FIRST, LAST)


@triton.jit(do_not_specialize=["share_step", "columns", "words"])
@no_type_check
def _top_p(
    p_score, p_bits, p_share, p_length, share_step, columns, words,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A program a row; short rows run on a half or a quarter of the block."""
    i_row = tl.program_id(0).to(tl.int64)
    length = columns
    if p_length is not None:
        length = tl.minimum(tl.load(p_length + i_row), columns)
    share = tl.load(p_share + i_row * share_step)
    p_score += i_row * columns
    p_bits += i_row * words
    if BLOCK >= 256:
        if length * 4 <= BLOCK:
            _top_p_row(p_score, p_bits, length, share, words, BLOCK // 4, BLOCK, FIRST, LAST)
        elif length * 2 <= BLOCK:
            _top_p_row(p_score, p_bits, length, share, words, BLOCK // 2, BLOCK, FIRST, LAST)
        else:
            _top_p_row(p_score, p_bits, length, share, words, BLOCK, BLOCK, FIRST, LAST)
    else:
        _top_p_row(p_score, p_bits, length, share, words, BLOCK, BLOCK, FIRST, LAST)


# ---- long rows: four histograms of 8 bits


@triton.jit
@no_type_check
def _unsigned(b_score):
    """uint32 keys in the order of the floats; -inf and NaN are 0."""
    return _ordered(b_score).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
@no_type_check
def _resolve(p_hist, hist_step, k, PASSES: tl.constexpr):
    """What the first PASSES histograms of a row say: (the k-th key's leading bits, how many more are wanted below the
    larger ones, how many keys have those bits)."""
    bin_ = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    share = k
    for i in tl.static_range(PASSES):
        count = tl.load(p_hist + i * hist_step + bin_)
        if i == 0:
            k = tl.minimum(k, tl.sum(count))
        reach = tl.sum(count) - tl.cumsum(count, 0) + count  # keys in this bin or above
        found = tl.max(tl.where(reach >= k, bin_, 0))
        share = tl.sum(tl.where(bin_ == found, count, 0))
        k -= tl.sum(tl.where(bin_ > found, count, 0))
        prefix = (prefix << 8) | found.to(tl.uint32)
    return prefix, k, share


@triton.jit(do_not_specialize=["k", "columns", "rows", "splits"])
@no_type_check
def _histogram(
    p_score, p_hist, p_k, k, columns, rows, splits, PASS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Bits 8 * (3 - PASS) .. of the keys of one part of a row that agree with what the passes before have found."""
    i_row = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    if p_k is not None:
        k = tl.load(p_k + i_row)
    p_score += i_row.to(tl.int64) * columns
    p_hist += i_row * 256
    prefix, _, _ = _resolve(p_hist, rows * 256, k, PASS)
    SHIFT: tl.constexpr = 24 - 8 * PASS
    bin_ = tl.arange(0, 256)
    total = tl.zeros([256], tl.int32)
    for i in range(CHUNKS):
        column = (i_split * CHUNKS + i) * CHUNK + tl.arange(0, CHUNK)
        key = _unsigned(tl.load(p_score + column, mask=column < columns, other=float("-inf")))
        match = key > 0
        if PASS > 0:
            match = match & ((key >> (SHIFT + 8)) == prefix)
        place = tl.where(match, ((key >> SHIFT) & 0xFF).to(tl.int32), 0)
        misses = CHUNK - tl.sum(match.to(tl.int32))  # they sit in bin 0
        total += tl.histogram(place, 256) - tl.where(bin_ == 0, misses, 0)
    tl.atomic_add(p_hist + PASS * rows * 256 + bin_, total, mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k", "columns", "rows", "splits"])
@no_type_check
def _count_ties(p_score, p_hist, p_k, p_tie, k, columns, rows, splits, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Keys of one part of a row that equal the k-th; not looked at where all of the row's are wanted."""
    i_row = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    if p_k is not None:
        k = tl.load(p_k + i_row)
    threshold, wanted, share = _resolve(p_hist + i_row * 256, rows * 256, k, 4)
    if wanted < share:
        p_score += i_row.to(tl.int64) * columns
        ties = 0
        for i in range(CHUNKS):
            column = (i_split * CHUNKS + i) * CHUNK + tl.arange(0, CHUNK)
            key = _unsigned(tl.load(p_score + column, mask=column < columns, other=float("-inf")))
            ties += tl.sum((key == threshold).to(tl.int32))
        tl.store(p_tie + tl.program_id(0), ties)


@triton.jit(do_not_specialize=["k", "columns", "rows", "splits", "words"])
@no_type_check
def _write_mask(
    p_score, p_hist, p_k, p_tie, p_bits, k, columns, rows, splits, words,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The words of one part of a row."""
    i_row = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    if p_k is not None:
        k = tl.load(p_k + i_row)
    threshold, wanted, share = _resolve(p_hist + i_row * 256, rows * 256, k, 4)
    p_score += i_row.to(tl.int64) * columns
    p_bits += i_row.to(tl.int64) * words
    ordered = wanted < share
    split = tl.arange(0, SPLITS)
    earlier = tl.where(ordered, i_split, 0)  # parts that have counted their ties, and come before this one
    seen = tl.sum(tl.load(p_tie + i_row * splits + split, mask=split < earlier, other=0))
    for i in range(CHUNKS):
        first = (i_split * CHUNKS + i) * CHUNK
        column = first + tl.arange(0, CHUNK)
        key = _unsigned(tl.load(p_score + column, mask=column < columns, other=float("-inf")))
        tie = (key == threshold) & (key > 0)
        keep = (key > threshold) | tie
        if ordered:
            count = tie.to(tl.int32)
            keep = (key > threshold) | (tie & (seen + tl.cumsum(count, 0) <= wanted))
            seen += tl.sum(count)
        bit = tl.reshape(keep.to(tl.int32), (CHUNK // 32, 32)) << tl.arange(0, 32)[None, :]
        word = first // 32 + tl.arange(0, CHUNK // 32)
        tl.store(p_bits + word, tl.sum(bit, 1), mask=word < words)


# ---- block bits -> plan


@triton.jit
@no_type_check
def _ones(word):
    """Bits set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


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
    p_bits, i_row, start, q_end, first, rows, bit_rows, words,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """uint32 (WORDS,): the blocks that a plan row keeps, over its PARTS block rows, each with its own block."""
    p_bits += (i_row // rows).to(tl.int64) * bit_rows * words
    lane = tl.arange(0, WORDS)
    union = tl.zeros([WORDS], tl.uint32)
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
    for i in tl.static_range(PER):
        i_row = tl.minimum(tl.program_id(0) * PER + i, all_rows - 1)
        i_sample, i_tile, start, _, q_end, first = _row_of(p_span, i_row, heads, rows, BLOCK_Q, BLOCK)
        causal = tl.load(p_causal + i_sample * rows + i_tile)
        union = _row_bits(p_bits, i_row, start, q_end, first, rows, bit_rows, words, BLOCK, PARTS, WORDS)
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
    """The entries of PER plan rows, ascending: a lane a word, whose place is the running sum of bits before it."""
    TILE: tl.constexpr = BLOCK // FACTOR
    block = tl.arange(0, WORDS) * (32 * BLOCK)
    for i in tl.static_range(PER):
        i_row = tl.minimum(tl.program_id(0) * PER + i, all_rows - 1)
        at = tl.load(p_row + i_row)
        lists = tl.load(p_row + i_row + 1) > at
        i_sample, i_tile, start, q_first, q_end, first = _row_of(p_span, i_row, heads, rows, BLOCK_Q, BLOCK)
        limit = tl.where(lists, tl.load(p_causal + i_sample * rows + i_tile) * TILE, 0)
        low = tl.maximum(start, q_first)
        union = _row_bits(p_bits, i_row, start, q_end, first, rows, bit_rows, words, BLOCK, PARTS, WORDS)
        count = _ones(union)
        p_place = p_entry + at + FACTOR * (tl.cumsum(count, 0) - count)
        for bit in tl.static_range(32):
            on = ((union >> bit) & 1) != 0
            for j in tl.static_range(FACTOR):
                key = block + (bit * BLOCK + j * TILE)
                entry = (key << 2) | (key + TILE - 1 > low).to(tl.int32)
                tl.store(p_place + j, entry, mask=on & (key < limit))
            p_place += FACTOR * on.to(tl.int32)


# ---- launchers


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Launches go to the current device."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            yield
    else:
        yield


def launch(
    kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any], special: tuple[Any, ...] = ()
) -> None:
    """Start a kernel. It is compiled for the types and alignments in `args`, for `options`, and for `special`: the
    values of the integers that it specialises on."""
    if programs == 0:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else type(x) for x in args)
    _start(kernel, (id(kernel), device, kinds, *options.values(), special), (programs,), args, options, {})


def _block(columns: int) -> int:
    return max(triton.next_power_of_2(columns), WORD)


def load_step(columns: int) -> int:
    """Columns that `_whole` rounds to: as many as divide the distance of two rows, which the kernel specialises on."""
    return 1 if columns % 16 else 16


def _row_warps(block: int) -> int:
    return min(max(block // 1024, 1), 16)


def _a_row(value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype).expand(shape).contiguous()


def topk_bits_triton(
    scores: Tensor,
    k: int | Tensor,
    lengths: Tensor | None,
    force_first: bool,
    force_last: bool,
    warps: int | None = None,
) -> Tensor:
    """`select.topk_bits`; `warps` a row, default by its length."""
    shape, columns = scores.shape[:-1], scores.shape[-1]
    words, block = -(-columns // WORD), _block(columns)
    bits = torch.empty(*shape, words, dtype=torch.int32, device=scores.device)
    each = _a_row(k, shape, torch.int32) if isinstance(k, Tensor) else None
    number = 0 if isinstance(k, Tensor) else min(k, columns)
    args = (scores, bits, each, _a_row(lengths, shape, torch.int32), number, columns, words)
    options = {
        "BLOCK": block, "FIRST": int(force_first), "LAST": int(force_last), "STEP": load_step(columns),
        "num_warps": warps or _row_warps(block),
    }  # fmt: skip
    with on_device(scores.device):
        launch(_topk, shape.numel(), args, options, (columns == 1,))
    return bits


def top_p_bits_triton(
    scores: Tensor,
    p: float | Tensor,
    lengths: Tensor | None,
    force_first: bool,
    force_last: bool,
    warps: int | None = None,
) -> Tensor:
    """`select.top_p_bits`; `warps` a row, default by its length."""
    shape, columns = scores.shape[:-1], scores.shape[-1]
    words, block = -(-columns // WORD), _block(columns)
    bits = torch.empty(*shape, words, dtype=torch.int32, device=scores.device)
    share = _a_row(p, shape, torch.float64) if isinstance(p, Tensor) else None
    step = 0 if share is None else 1
    if share is None:  # a kernel's scalar would be rounded to float32
        share = torch.full((1,), float(p), dtype=torch.float64, device=scores.device)
    args = (scores, bits, share, _a_row(lengths, shape, torch.int32), step, columns, words)
    options = {"BLOCK": block, "FIRST": force_first, "LAST": force_last, "num_warps": warps or _row_warps(block)}
    with on_device(scores.device):
        launch(_top_p, shape.numel(), args, options)
    return bits


ROWS_COUNTED, ROWS_WRITTEN = 4, 2  # by a program
CHUNK, CHUNKS = 2048, 4  # columns that a program of the radix select looks at: so many at once, so often


def topk_indices_mask_triton(scores: Tensor, k: int | Tensor) -> Tensor:
    """`select.topk_indices_mask`: four histograms, a count of ties, the mask."""
    rows, columns = scores.shape
    words, splits = -(-columns // WORD), -(-columns // (CHUNK * CHUNKS))
    bits = torch.empty(rows, words, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(4 * 256 * rows, dtype=torch.int32, device=scores.device)
    ties = torch.empty(rows * splits, dtype=torch.int32, device=scores.device)
    each = _a_row(k, (rows,), torch.int32) if isinstance(k, Tensor) else None
    number = 0 if isinstance(k, Tensor) else min(k, columns)
    sizes: dict[str, Any] = {"CHUNK": CHUNK, "CHUNKS": CHUNKS, "num_warps": 4}
    shape = (number, columns, rows, splits)
    with on_device(scores.device):
        for i in range(4):
            launch(_histogram, rows * splits, (scores, counts, each, *shape), {"PASS": i, **sizes})
        launch(_count_ties, rows * splits, (scores, counts, each, ties, *shape), sizes)
        sizes["SPLITS"] = triton.next_power_of_2(splits)
        launch(_write_mask, rows * splits, (scores, counts, each, ties, bits, *shape, words), sizes)
    return bits


def plan_from_bits_triton(bits: Tensor, grid: BlockGrid, block_tokens: int, room: int, limit: int) -> BlockPlan:
    """`select.plan_from_block_bits` on checked bits: a count a row, their running sum, the entries. `room` entries are
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
    return BlockPlan(plan, samples=samples, heads=heads, row_ptr=row_ptr, entries=entries, dense_rows=dense)

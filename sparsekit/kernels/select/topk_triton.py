"""The Triton side of `topk.py`: bisection on ordered integers for rows, radix select for long rows.

A float's bits, turned so that they order as integers, let 32 halvings find a row's k-th value exactly, without a sort.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import launch, load_step, on_device
from sparsekit.kernels.primitives import LOG2E, _whole
from sparsekit.kernels.select.bits import WORD

__all__ = ["top_p_bits_triton", "topk_bits_triton", "topk_indices_mask_triton"]

NONE = tl.constexpr(-0x80000000)  # the key of what is never selected
NOTHING = tl.constexpr(0x7FFFFFFF)  # above the key of +inf: a NaN, which no score reaches


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
def _narrow(score, low, high, wanted, n_some):
    """(the largest key in [low, high] that `wanted` or more of `score` reach, how many do). All `n_some` numbers among
    them reach `low`, none passes `high`; the others are -inf."""
    reached = n_some
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
    return low, reached


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
        low, reached = _narrow(score, low, high, wanted, n_some)
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
    BLOCK: tl.constexpr, ALL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """One row whose `length` is at most BLOCK."""
    column = tl.arange(0, BLOCK)
    score = tl.load(p_score + column, mask=column < length, other=float("-inf"))
    if LOGITS and share < 1.0:
        score = tl.where(score > float("-inf"), score, float("-inf"))
        score = tl.math.exp2((score - tl.max(score)) * LOG2E)
    forced = column < 0
    if FIRST:
        forced = forced | ((column == 0) & (column < length))
    if LAST:
        forced = forced | (column == length - 1)
    # What is kept: keys above `low`, and those that equal it up to column `last`.
    low = tl.full([], NOTHING, tl.int32)
    last = tl.full([], BLOCK, tl.int32)
    if share >= 1.0:
        key = (score > float("-inf")).to(tl.int32)
        low += 1 - NOTHING
    else:
        bits = tl.minimum(score.to(tl.int32, bitcast=True), 0x7F7FFFFF)
        key = tl.where((score > 0.0) & (bits >= 0x800000), bits, 0)
        largest = tl.max(key)
        unit = _units(key, largest)
        total = tl.sum(unit.to(tl.int64))
        required = total.to(tl.float64) * share
        start = tl.sum(tl.where(forced, unit, 0).to(tl.int64))
        key = tl.where(forced, 0, key)
        high = tl.max(key)
        if (start.to(tl.float64) < required) & (high > 0):
            # The largest threshold whose masses reach what is required, by halves, until what lies between the bounds
            # is less than two of the smallest that could.
            low = tl.min(tl.where(key > 0, key, high))
            reached = total
            above = start  # what keys above `high` reach
            while (low < high) & (reached - above >= 2 * _units(low, largest).to(tl.int64)):
                middle = _upper_middle(low, high)
                found = start + tl.sum(tl.where(key >= middle, unit, 0).to(tl.int64))
                enough = found.to(tl.float64) >= required
                low = tl.where(enough, middle, low)
                reached = tl.where(enough, found, reached)
                high = tl.where(enough, high, middle - 1)
                above = tl.where(enough, above, found)
            low = tl.max(tl.where(key <= high, key, 0))
            one = _units(low, largest).to(tl.int64)
            if reached - above > one:  # equal keys, of which `some` are enough
                some = tl.cast(1, tl.int32)
                most = ((reached - above) // one).to(tl.int32)
                while some < most:
                    middle = (some + most) // 2
                    enough = (above + middle * one).to(tl.float64) >= required
                    some = tl.where(enough, some, middle + 1)
                    most = tl.where(enough, middle, most)
                tie = (key == low).to(tl.int32)
                last = tl.max(tl.where((tie != 0) & (tl.cumsum(tie, 0) <= some), column, 0))
    keep = key > low - (column <= last).to(tl.int32)
    _store_words(p_bits, keep, length, words, BLOCK, ALL, FIRST, LAST)


@triton.jit(do_not_specialize=["share_step", "columns", "words"])
@no_type_check
def _top_p(
    p_score, p_bits, p_share, p_length, share_step, columns, words,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, LOGITS: tl.constexpr,
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
            _top_p_row(p_score, p_bits, length, share, words, BLOCK // 4, BLOCK, FIRST, LAST, LOGITS)
        elif length * 2 <= BLOCK:
            _top_p_row(p_score, p_bits, length, share, words, BLOCK // 2, BLOCK, FIRST, LAST, LOGITS)
        else:
            _top_p_row(p_score, p_bits, length, share, words, BLOCK, BLOCK, FIRST, LAST, LOGITS)
    else:
        _top_p_row(p_score, p_bits, length, share, words, BLOCK, BLOCK, FIRST, LAST, LOGITS)


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


def _block(columns: int) -> int:
    return max(triton.next_power_of_2(columns), WORD)


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
    """`topk.topk_bits`; `warps` a row, default by its length."""
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
    logits: bool = False,
    warps: int | None = None,
) -> Tensor:
    """`topk.top_p_bits`; `warps` a row, default by its length."""
    shape, columns = scores.shape[:-1], scores.shape[-1]
    words, block = -(-columns // WORD), _block(columns)
    bits = torch.empty(*shape, words, dtype=torch.int32, device=scores.device)
    share = _a_row(p, shape, torch.float64) if isinstance(p, Tensor) else None
    step = 0 if share is None else 1
    if share is None:  # a kernel's scalar would be rounded to float32
        share = torch.full((1,), float(p), dtype=torch.float64, device=scores.device)
    args = (scores, bits, share, _a_row(lengths, shape, torch.int32), step, columns, words)
    options = {
        "BLOCK": block, "FIRST": force_first, "LAST": force_last, "LOGITS": logits,
        "num_warps": warps or _row_warps(block),
    }  # fmt: skip
    with on_device(scores.device):
        launch(_top_p, shape.numel(), args, options)
    return bits


CHUNK, CHUNKS = 2048, 4  # columns that a program of the radix select looks at: so many at once, so often


def topk_indices_mask_triton(scores: Tensor, k: int | Tensor) -> Tensor:
    """`topk.topk_indices_mask`: four histograms, a count of ties, the mask."""
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

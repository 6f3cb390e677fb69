"""The Triton side of `ranking.py`: mean queries, scores of all segments, and each row's best keys in order, a launch
each; and the list of the bits of long rows.

A row of scores is read once or twice: a sample of it says where to cut, so that little more than what is wanted goes
on, and that is cut exactly and sorted in registers.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.device import capability_of
from sparsekit.kernels.launch import _padded, _pointer_form, _precision, _start, launch, on_device, steps_of
from sparsekit.kernels.primitives import _offset, _ones
from sparsekit.kernels.select.block_scores_triton import EXACT_SCORES, HALF_SCORES, _check, _single
from sparsekit.kernels.select.segments import KEY_TILE, Segments, turns_of
from sparsekit.kernels.select.topk_triton import _narrow, _ordered, _upper_middle, _value
from sparsekit.plan import span_numbers

__all__ = ["LONGEST", "bit_positions_triton", "mean_queries_triton", "rank_keys_triton"]

LONGEST = 8192  # keys of a list that one program sorts
SCORE_BYTES = 1 << 30  # of scores at once: all of 8,192 rows at 128K tokens are 2.7 GB, in four turns
STEP = tl.constexpr(128)  # a row has a multiple of so many columns, as tiles and loads of it do
SINK = tl.constexpr(KEY_TILE)  # keys that are kept anyway, and have no column
FARTHEST = tl.constexpr(torch.finfo(torch.float32).max)
NO_PAIR = tl.constexpr(-0x80000000000000)  # -inf, column 0: its bits are 0xFF800000
TILES = 8  # of mean queries, that a program multiplies with the same keys
TURNS = 4  # guesses of a threshold from a sample before it is searched for in the row itself


@triton.jit(do_not_specialize=["q_offset", "segments", "heads", "size", "places"])
@no_type_check
def _mean_queries(
    p_q, p_mean, p_index, p_span, q_batch, q_head, q_token, q_offset, segments, heads, size, places,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The mean of one segment's queries, and their positions in its row of `p_index`; neighbours take the heads."""
    i_head = tl.program_id(0) % heads
    i_segment = tl.program_id(0) // heads % segments
    i_sample = tl.program_id(0) // heads // segments
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    begin = (q_first // size + i_segment) * size
    low = tl.maximum(begin, q_first)
    high = tl.maximum(tl.minimum(begin + size, q_end), low)
    column = tl.arange(0, DP)
    lane = tl.arange(0, ROWS)
    p_q += _offset(i_sample, i_head, start - q_offset, q_batch, q_head, q_token)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for pos in range(low, high, ROWS):
        p_tile = p_q + (pos + lane).to(tl.int64)[:, None] * q_token + column[None, :]
        there = (pos + lane < high)[:, None] & (column < D)[None, :]
        acc += tl.load(p_tile, mask=there, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(acc, 0), tl.maximum(high - low, 1).to(tl.float32))
    i_row = (i_sample * heads + i_head).to(tl.int64) * segments + i_segment
    tl.store(p_mean + i_row * D + column, mean.to(p_mean.dtype.element_ty), mask=column < D)
    p_index += i_row * places
    for at in range(0, places, 128):
        place = at + tl.arange(0, 128)
        tl.store(p_index + place, tl.where(low + place < high, low + place, -1), mask=place < places)


@triton.jit
@no_type_check
def _history(q_first, q_end, i_segment, size):
    """Columns of segments' rows: the keys before them that are ranked; none where they have no query."""
    begin = (q_first // size + i_segment) * size
    return tl.where((begin < q_end) & (q_end > q_first), tl.maximum(begin - SINK, 0), 0)


@triton.jit
@no_type_check
def _padded_row(history):
    """Columns of a row that are written: whole steps of loads, and of any tile."""
    return (history + (STEP - 1)) // STEP * STEP


@triton.jit(do_not_specialize=["first", "n", "segments", "samples", "key_heads", "size", "tiles_n"])
@no_type_check
def _segment_scores(
    p_mean, p_k, p_span, p_score, k_batch, k_head, k_token, width, first, n, segments, samples, key_heads, size,
    tiles_n, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Mean queries, of the heads of one key head, times BN keys: finite numbers before a segment, -inf after.

    A program takes up to TILES times BM mean queries in turn; neighbours take the rows of the same keys.
    """
    turns = tl.cdiv(n * GROUP, BM * TILES)
    i_turn = tl.program_id(0) % turns
    i_n = tl.program_id(0) // turns % tiles_n
    i_key_head = tl.program_id(0) // turns // tiles_n % key_heads
    i_sample = tl.program_id(0) // turns // tiles_n // key_heads
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    column = i_n * BN + tl.arange(0, BN)
    dim = tl.arange(0, BK)
    p_b = p_k + _offset(i_sample, i_key_head, start, k_batch, k_head, k_token)
    p_b = p_b + (column + SINK).to(tl.int64)[:, None] * k_token + dim[None, :]
    # The segments before this one have no key here.
    reaching = tl.maximum((i_n * BN + SINK - STEP) // size - q_first // size - first, 0)
    low = tl.maximum(reaching * GROUP // BM, i_turn * TILES)
    high = tl.minimum(tl.cdiv(n * GROUP, BM), (i_turn + 1) * TILES)
    if D == BK:
        b_keys = tl.load(p_b, mask=(column + SINK < q_end)[:, None], other=0.0)
    for i_m in tl.range(low, high, num_stages=STAGES):
        row = i_m * BM + tl.arange(0, BM)
        i_head = i_key_head * GROUP + row % GROUP
        i_segment = row // GROUP
        exists = row < n * GROUP
        history = tl.where(exists, _history(q_first, q_end, first + i_segment, size), 0)
        padded = _padded_row(history)
        i_mean = (i_sample * key_heads * GROUP + i_head).to(tl.int64) * segments + first + i_segment
        p_a = p_mean + (i_mean * D)[:, None] + dim[None, :]
        if D == BK:
            b_s = tl.dot(tl.load(p_a, mask=exists[:, None], other=0.0), b_keys.T, input_precision=PRECISION)
        else:
            b_s = tl.zeros([BM, BN], tl.float32)
            for at in range(0, D, BK):
                b_a = tl.load(p_a + at, mask=exists[:, None], other=0.0)
                b_b = tl.load(p_b + at, mask=(column + SINK < q_end)[:, None], other=0.0)
                b_s = tl.dot(b_a, b_b.T, b_s, input_precision=PRECISION)
        b_s = tl.where(b_s == b_s, tl.minimum(tl.maximum(b_s, -FARTHEST), FARTHEST), -FARTHEST)
        b_s = tl.where(column[None, :] < history[:, None], b_s, float("-inf"))
        i_row = (i_segment * samples + i_sample).to(tl.int64) * (key_heads * GROUP) + i_head
        p_out = p_score + (i_row * width)[:, None] + column[None, :]
        tl.store(p_out, b_s, mask=(padded > i_n * BN)[:, None])


@triton.jit
@no_type_check
def _lanes(CHUNK: tl.constexpr):
    """0 to CHUNK - 1 in (CHUNK / 16, 4, 4): a thread loads four times 16 bytes, and counts what it holds by itself."""
    thread = tl.arange(0, CHUNK // 16)[:, None, None] * 4
    return thread + tl.arange(0, 4)[None, :, None] * (CHUNK // 4) + tl.arange(0, 4)[None, None, :]


@triton.jit
@no_type_check
def _places(keep):
    """A number for each that is kept, 0 onwards in some order, and how many there are."""
    one = keep.to(tl.int32)
    four = tl.sum(one, 2)
    mine = tl.sum(four, 1)
    before = (tl.cumsum(mine, 0) - mine)[:, None, None] + (tl.cumsum(four, 1) - four)[:, :, None]
    return before + tl.cumsum(one, 2) - one, tl.sum(mine)


@triton.jit
@no_type_check
def _keep(
    p_score, p_pair, padded, least, last, ROOM: tl.constexpr, CHUNK: tl.constexpr, TIES: tl.constexpr
):  # fmt: skip
    """How many scores of a row reach `least`, with TIES its equals up to column `last` only. The first ROOM are listed
    in `p_pair`, in any order: a float's bits above its column's.

    A thread takes 32 scores as bits of a word. Of the few that are set it lists one after the other.
    """
    WORDS: tl.constexpr = CHUNK // 32
    word_lane = tl.arange(0, WORDS)
    group = tl.arange(0, 8)[None, :, None]
    one = tl.arange(0, 4)[None, None, :]
    lane = word_lane[:, None, None] * 4 + group * (4 * WORDS) + one  # a thread loads eight times 16 bytes
    bit = 1 << (group * 4 + one)
    found = padded * 0
    for i in range(0, padded, CHUNK):
        b_score = tl.load(p_score + i + lane, mask=i + lane < padded, other=float("-inf"))
        keep = b_score >= least
        if TIES:
            keep = keep & ((b_score > least) | (i + lane <= last))
        word = tl.sum(tl.sum(tl.where(keep, bit, 0), 2), 1)
        some = _ones(word.to(tl.uint32, bitcast=True))
        place = found + tl.cumsum(some, 0) - some
        found += tl.sum(some)
        for _ in range(tl.max(some)):
            lowest = (word & -word).to(tl.float32).to(tl.int32, bitcast=True)
            at = ((lowest >> 23) & 255) - 127
            column = i + word_lane * 4 + (at >> 2) * (4 * WORDS) + (at & 3)
            listed = (word != 0) & (place < ROOM)
            score = tl.load(p_score + column, mask=listed, other=0.0)
            pair = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.int64)
            tl.store(p_pair + place, pair, mask=listed)
            word = word & (word - 1)
            place += 1
    return found


@triton.jit
@no_type_check
def _count(p_score, padded, least, last, CHUNK: tl.constexpr):
    """How many scores of a row pass `least`, or equal it up to column `last`."""
    lane = tl.arange(0, CHUNK)
    count = padded * 0
    for i in range(0, padded, CHUNK):
        b_score = tl.load(p_score + i + lane, mask=i + lane < padded, other=float("-inf"))
        count += tl.sum(((b_score > least) | ((b_score == least) & (i + lane <= last))).to(tl.int32))
    return count


@triton.jit
@no_type_check
def _keep_largest(p_score, p_pair, padded, count, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """`_keep` of a row's `count` largest, ties to the lower column, by a look at it for each bit of both."""
    low = _ordered(tl.full([], -FARTHEST, tl.float32))
    high = _ordered(tl.full([], FARTHEST, tl.float32))
    while low < high:
        middle = _upper_middle(low, high)
        enough = _count(p_score, padded, _value(middle), padded, CHUNK) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    least = _value(low)
    first = padded * 0
    last = padded
    while first < last:
        middle = (first + last) // 2
        enough = _count(p_score, padded, least, middle, CHUNK) >= count
        first = tl.where(enough, first, middle + 1)
        last = tl.where(enough, middle, last)
    return _keep(p_score, p_pair, padded, least, last, ROOM, CHUNK, True)


@triton.jit
@no_type_check
def _keep_about(
    p_score, p_pair, history, padded, count, BLOCK: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """`_keep` of a row's `count` largest and not many more, by a threshold of BLOCK of its scores."""
    step = tl.cdiv(history, BLOCK)
    lane = tl.arange(0, BLOCK)
    at = lane * step + ((lane * 40503) >> 4 & 4095) % step  # one of every `step`, each from another place in it
    some = tl.load(p_score + at, mask=at < history, other=float("-inf"))
    n_some = tl.sum((at < history).to(tl.int32))
    lowest = _ordered(tl.min(tl.where(at < history, some, float("inf"))))
    highest = _ordered(tl.max(some))
    share = count.to(tl.float32) * n_some.to(tl.float32) / history.to(tl.float32)
    share = tl.minimum(share + 4.0 * tl.sqrt(share), 1.5 * share + 1.0)
    found = count * 0
    turn = count * 0
    while ((found < count) | (found > ROOM)) & (turn < TURNS):
        wanted = tl.minimum(tl.maximum(share.to(tl.int32), 1), n_some)
        least, _reached = _narrow(some, lowest, highest, wanted, n_some)
        found = _keep(p_score, p_pair, padded, _value(least), padded, ROOM, CHUNK, False)
        share = share * ((count + ROOM) // 2).to(tl.float32) / tl.maximum(found, 1).to(tl.float32)
        turn += 1
    return found


@triton.jit
@no_type_check
def _cut(p_found, p_pair, found, count, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """Leaves, of the `found` pairs (p_found: the same memory), the `count` largest, ties to the lower column."""
    lane = tl.arange(0, ROOM)
    score = tl.load(p_found + 2 * lane + 1, mask=lane < found, other=float("-inf"))
    low = _ordered(tl.min(tl.where(lane < found, score, float("inf"))))
    low, reached = _narrow(score, low, _ordered(tl.max(score)), count, found)
    least = _value(low)
    lane = _lanes(CHUNK)
    last = tl.full([], 0x7FFFFFFF, tl.int32)
    if reached > count:
        first = count * 0
        while first < last:
            middle = first + (last - first) // 2
            n = count * 0
            for i in range(0, found, CHUNK):
                b_pair = tl.load(p_pair + i + lane, mask=i + lane < found, other=NO_PAIR)
                n += tl.sum(tl.sum(tl.sum(_first_of(b_pair, least, middle).to(tl.int32), 2), 1))
            first = tl.where(n >= count, first, middle + 1)
            last = tl.where(n >= count, middle, last)
    kept = count * 0
    for i in range(0, found, CHUNK):
        b_pair = tl.load(p_pair + i + lane, mask=i + lane < found, other=NO_PAIR)
        keep = _first_of(b_pair, least, last)
        place, some = _places(keep)
        tl.debug_barrier()
        tl.store(p_pair + kept + place, b_pair, mask=keep)
        kept += some


@triton.jit
@no_type_check
def _first_of(b_pair, least, last):
    """Whether a pair's score passes `least`, or equals it up to column `last`."""
    score = (b_pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return (score > least) | ((score == least) & (b_pair.to(tl.int32) <= last))


@triton.jit(do_not_specialize=["first", "n", "segments", "samples", "heads", "size"])
@no_type_check
def _select(
    p_score, p_pair, p_ptr, p_span, width, first, n, segments, samples, heads, size,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One row's largest scores, as many as its list has keys, in any order. The longest rows start first.

    They go behind the row, where there is room for 2 * BLOCK pairs (p_pair: the same memory).
    """
    ROOM: tl.constexpr = 2 * BLOCK
    i_head = tl.program_id(0) % heads
    i_sample = tl.program_id(0) // heads % samples
    i_at = n - 1 - tl.program_id(0) // heads // samples
    p_ptr += i_sample * (segments + 1) + first + i_at
    count = (tl.load(p_ptr + 1) - tl.load(p_ptr)).to(tl.int32)
    if count > 0:
        q_first = tl.load(p_span + i_sample * 4)
        q_end = tl.load(p_span + i_sample * 4 + 1)
        history = _history(q_first, q_end, first + i_at, size)
        padded = _padded_row(history)
        i_row = (i_at * samples + i_sample).to(tl.int64) * heads + i_head
        p_score += i_row * width
        p_pair += (i_row * width + width) // 2 - ROOM
        if history > ROOM:
            found = _keep_about(p_score, p_pair, history, padded, count, BLOCK, ROOM, CHUNK, TURNS)
            if (found < count) | (found > ROOM):  # of equal scores, for one
                found = _keep_largest(p_score, p_pair, padded, count, ROOM, CHUNK)
        else:
            found = _keep(p_score, p_pair, padded, -FARTHEST, padded, ROOM, CHUNK, False)
        if found > count:
            tl.debug_barrier()
            _cut(p_score + (width - 2 * ROOM), p_pair, found, count, ROOM, CHUNK // 4)


@triton.jit(do_not_specialize=["first", "n", "segments", "samples", "heads", "room"])
@no_type_check
def _sort(
    p_pair, p_keys, p_ptr, width, first, n, segments, samples, heads, room, BLOCK: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """One list, of what `_select` left: the largest scores first, ties to the lower column.

    What is sorted comes in any order, so EACH that are far apart in memory stand side by side. A thread loads pairs of
    them: so its own are neighbours, and most steps of the sort move nothing between threads.
    """
    i_head = tl.program_id(0) % heads
    i_sample = tl.program_id(0) // heads % samples
    i_at = tl.program_id(0) // heads // samples
    p_ptr += i_sample * (segments + 1) + first + i_at
    begin = tl.load(p_ptr)
    count = (tl.load(p_ptr + 1) - begin).to(tl.int32)
    i_row = (i_at * samples + i_sample).to(tl.int64) * heads + i_head
    lane = tl.arange(0, BLOCK // EACH)[:, None] + tl.arange(0, EACH)[None, :] * (BLOCK // EACH)
    pair = tl.load(p_pair + ((i_row * width + width) // 2 - 2 * BLOCK) + lane, mask=lane < count, other=NO_PAIR)
    score = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    key = (_ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - pair.to(tl.int32)).to(tl.int64)
    key = tl.sort(tl.reshape(key, [BLOCK]), descending=True)
    column = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    p_keys += (i_sample * heads + i_head).to(tl.int64) * room + begin
    tl.store(p_keys + lane, column + SINK, mask=lane < count)


WORDS = 128  # words of bits that are listed at once


@triton.jit(do_not_specialize=["words", "room"])
@no_type_check
def _list_bits(p_bits, p_list, words, room, WORDS: tl.constexpr):
    """One row's set bits, as ascending positions, until its `room` is full."""
    i_row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WORDS)
    before = tl.program_id(0) * 0
    for i in range(0, words, WORDS):
        word = tl.load(p_bits + i_row * words + i + lane, mask=i + lane < words, other=0)
        b_bit = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1  # (WORDS, 32)
        place = tl.reshape(b_bit, [WORDS * 32])
        upto = tl.cumsum(place, 0)
        at = before + upto - place
        tl.store(p_list + i_row * room + at, i * 32 + tl.arange(0, WORDS * 32), mask=(place != 0) & (at < room))
        before += tl.sum(place, 0)


# ---- launchers


def mean_queries_triton(q: Tensor, segments: Segments, q_index: Tensor) -> Tensor:
    """`ranking.mean_queries` without a guide."""
    _check(q, q)
    geometry = segments.geometry
    samples, heads, n, places = q_index.shape
    dim = q.shape[3]
    out = torch.empty(samples, heads, n, dim, dtype=q.dtype, device=q.device)
    steps = steps_of(q)
    spans = span_numbers(geometry, samples, q.device)
    args = (q, out, q_index, spans, *steps, geometry.q_offset, n, heads, segments.size, places)
    options = {"ROWS": max(min(4096 // _padded(dim), 64), 16), "D": dim, "DP": _padded(dim), "num_warps": 4}
    with on_device(q.device):
        launch(_mean_queries, samples * heads * n, args, options, steps)
    return out


def rank_keys_triton(means: Tensor, k: Tensor, segments: Segments, keys: Tensor) -> None:
    """`ranking.rank_keys`, into `keys`, for lists of up to LONGEST keys."""
    _check(means, k)
    means, k = _single(means, k)
    samples, heads, n, dim = means.shape
    geometry, size, key_heads, group = segments.geometry, segments.size, k.shape[1], heads // k.shape[1]
    block = max(triton.next_power_of_2(segments.longest), 128)
    turns = turns_of(geometry, size, heads, STEP.value, 4 * block, SCORE_BYTES // 4)
    if not turns:
        return
    room = samples * heads * max((b - a) * width for a, b, width in turns)
    scores = torch.empty(room, dtype=torch.float32, device=k.device)
    pairs = scores.view(torch.int64)
    spans = span_numbers(geometry, samples, k.device)
    tile = EXACT_SCORES if k.dtype == torch.float32 else HALF_SCORES
    steps = steps_of(k)
    capability = capability_of(k.device)
    products = {
        "GROUP": group, "BM": tile.m, "BN": tile.n, "BK": min(tile.k, dim & -dim), "D": dim,
        "PRECISION": _precision(capability, k.dtype), "STAGES": tile.stages,
        "TILES": TILES, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    warps = max(block // 512, 1)
    choice = {"BLOCK": block, "CHUNK": 1024 * warps, "TURNS": TURNS, "num_warps": warps}
    if capability >= (9, 0):
        choice["maxnreg"] = 80  # three programs of 4,096 keys a processor; Triton 3.9 spills 32 bytes for it
    # 4,096 keys, 4 warps: 1.7 ms at 128K tokens (H200). Before sm_90 ptxas takes a minute for 4, and 2 s for 16.
    sorting = max(block // (1024 if capability >= (9, 0) else 256), 1)
    order = {"BLOCK": block, "EACH": block // (64 * sorting), "num_warps": sorting}
    with on_device(k.device):
        for a, b, width in turns:
            where = (width, a, b - a, n, samples)
            tiles_n = triton.cdiv(width - 4 * block, tile.n)
            tiles = key_heads * triton.cdiv((b - a) * group, tile.m * TILES) * tiles_n
            args = (means, k, spans, scores, *steps, *where, key_heads, size, tiles_n)
            launch(_segment_scores, samples * tiles, args, products, steps)
            rows = samples * heads * (b - a)
            launch(_select, rows, (scores, pairs, segments.key_ptr, spans, *where, heads, size), choice)
            launch(_sort, rows, (pairs, keys, segments.key_ptr, *where, heads, keys.shape[2]), order)


def bit_positions_triton(bits: Tensor, count: int) -> Tensor:
    """int32 (rows, count): the positions of each row's set bits, ascending. Every row of `bits` has `count` set."""
    rows, words = bits.shape
    out = torch.empty(rows, count, dtype=torch.int32, device=bits.device)
    with on_device(bits.device):
        _start(
            _list_bits, ("list_bits", bits.device, _pointer_form(bits)), (rows,), (bits, out, words, count),
            {"WORDS": WORDS, "num_warps": 4}, {},
        )  # fmt: skip
    return out

"""Device code of `halves.py`: two rows of 64 queries -> one list of steps for a Hopper work item, in Triton."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsekit.call.geometry import MAX_TOKENS
from sparsekit.kernels.attend.hopper import items
from sparsekit.plan import CAUSAL, pack

__all__ = ["pair_rows"]

NOWHERE = tl.constexpr(pack(MAX_TOKENS - 4096, CAUSAL))  # an entry past all keys: zeros by TMA, and masked
EMPTY, PAIRS_SHIFT, COLUMN_SHIFT, SECOND, HALF = (
    tl.constexpr(n) for n in (items.EMPTY, items.PAIRS_SHIFT, items.COLUMN_SHIFT, items.SECOND, items.HALF)
)


@triton.jit
def _place(p_list, count, key, SEARCH: tl.constexpr):
    """How many of the `count` ascending entries lie before each key."""
    low = tl.zeros_like(key)
    high = low + count
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        before = (low < high) & ((tl.load(p_list + middle, mask=low < high, other=0) >> 2) < key)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _find(p_list, count, key, there, SEARCH: tl.constexpr):
    """(whether another list has the key, its flags)."""
    place = _place(p_list, count, key, SEARCH)
    entry = tl.load(p_list + place, mask=there & (place < count), other=-1)
    found = there & ((entry >> 2) == key)
    return found, tl.where(found, entry & 3, 0)


@triton.jit
def _last_word(p_bits, row, words, WORDS: tl.constexpr):
    """Words of a row's column bits up to the last that is not 0; none of row -1."""
    last = 0
    count = tl.where(row >= 0, words, 0)
    for at in range(0, count, WORDS):
        lane = at + tl.arange(0, WORDS)
        word = tl.load(p_bits + row.to(tl.int64) * words + lane, mask=lane < count, other=0)
        last = tl.maximum(last, tl.max(tl.where(word != 0, lane + 1, 0), 0))
    return last


@triton.jit(do_not_specialize=["items", "words"])
def pair_rows(
    p_grid, p_pair, p_rows, p_row_ptr, p_entries, p_dense, p_bits, p_items, p_work, p_list, items, words,
    STEP: tl.constexpr, PARTS: tl.constexpr, SPARE: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """`halves.pair_rows`, an item a program. p_rows: (2, items) rows of the plan, -1 where there is none."""
    i = tl.program_id(0)
    first = tl.load(p_rows + i)
    second = tl.load(p_rows + items + i)
    a = tl.load(p_row_ptr + first, mask=first >= 0, other=0)
    n_a = tl.load(p_row_ptr + first + 1, mask=first >= 0, other=0) - a
    b = tl.load(p_row_ptr + second, mask=second >= 0, other=0)
    n_b = tl.load(p_row_ptr + second + 1, mask=second >= 0, other=0) - b
    lane = tl.arange(0, BLOCK)

    n_both = n_a * 0
    for at in range(0, n_a, BLOCK):
        there = at + lane < n_a
        key = tl.load(p_entries + a + at + lane, mask=there, other=0) >> 2
        found, _ = _find(p_entries + b, n_b, key, there, SEARCH)
        n_both += tl.sum(found.to(tl.int32), 0)
    only_a = n_a - n_both
    only_b = n_b - n_both
    both_steps = (n_both + PARTS - 1) // PARTS
    steps_a = (only_a + PARTS - 1) // PARTS
    steps_b = (only_b + PARTS - 1) // PARTS
    pairs = tl.minimum(steps_a, steps_b)
    listed = both_steps + steps_a + steps_b

    start = tl.where(first >= 0, a, b) + SPARE * tl.load(p_pair + i).to(tl.int32)
    p_own = p_list + start
    done = 0
    for at in range(0, n_a, BLOCK):
        there = at + lane < n_a
        entry = tl.load(p_entries + a + at + lane, mask=there, other=0)
        found, flags = _find(p_entries + b, n_b, entry >> 2, there, SEARCH)
        nth = done + tl.cumsum(found.to(tl.int32), 0)
        alone = at + lane - nth  # of those that no other has, up to here
        step = alone // PARTS
        step = both_steps + tl.where(step < pairs, 2 * step, pairs + step)
        to = tl.where(found, nth - 1, step * PARTS + alone % PARTS)
        tl.store(p_own + to, entry | flags, mask=there)
        done += tl.sum(found.to(tl.int32), 0)
    done = 0
    for at in range(0, n_b, BLOCK):
        there = at + lane < n_b
        entry = tl.load(p_entries + b + at + lane, mask=there, other=0)
        found, _ = _find(p_entries + a, n_a, entry >> 2, there, SEARCH)
        alone = at + lane - done - tl.cumsum(found.to(tl.int32), 0)
        step = alone // PARTS
        step = both_steps + tl.where(step < pairs, 2 * step + 1, pairs + step)
        tl.store(p_own + step * PARTS + alone % PARTS, entry, mask=there & (found == 0))
        done += tl.sum(found.to(tl.int32), 0)
    if PARTS == 2:
        # The last of an odd number is a step with one entry nowhere.
        last_a = both_steps + tl.where(steps_a <= pairs, 2 * steps_a - 2, pairs + steps_a - 1)
        last_b = both_steps + tl.where(steps_b <= pairs, 2 * steps_b - 1, pairs + steps_b - 1)
        tl.store(p_own + both_steps * 2 - 1, NOWHERE, mask=n_both % 2 != 0)
        tl.store(p_own + last_a * 2 + 1, NOWHERE, mask=only_a % 2 != 0)
        tl.store(p_own + last_b * 2 + 1, NOWHERE, mask=only_b % 2 != 0)

    columns = 0
    if p_bits is not None:
        words_used = tl.maximum(_last_word(p_bits, first, words, WORDS), _last_word(p_bits, second, words, WORDS))
        columns = (words_used * 32 + STEP - 1) // STEP
    dense = False
    mixed = False
    if p_dense is not None:
        dense_a = tl.load(p_dense + first, mask=first >= 0, other=0) != 0
        dense_b = tl.load(p_dense + second, mask=second >= 0, other=0) != 0
        dense = (dense_a | (first < 0)) & (dense_b | (second < 0)) & (dense_a | dense_b)
        mixed = (dense_a != dense_b) & (first >= 0) & (second >= 0)
    kind = tl.load(p_grid + i * 8 + 5)
    dense_steps = tl.load(p_grid + i * 8 + 3)
    low = kind & 255
    high = (kind >> 8) & 255
    empty = ((kind & EMPTY) != 0) | ((dense == 0) & (listed + columns == 0))
    by_bounds = dense | empty
    work = tl.where(empty, 1, tl.where(dense, dense_steps, listed + columns))
    # A word for items by bounds too: both halves need all of their steps.
    both = tl.where(by_bounds, work, tl.where(listed == 0, 1, both_steps))
    halves = both | tl.where(by_bounds, 0, pairs << PAIRS_SHIFT | tl.where(steps_a < steps_b, SECOND, 0))
    alone = tl.where(first >= 0, first, second)
    two = ((first >= 0) & (second >= 0)).to(tl.int32)
    if p_dense is not None:
        # Rows of one tile of which one is dense by bounds: an item each. The second is `items` places further.
        p_other = p_items + (items + i) * 8
        for column in tl.static_range(8):
            tl.store(p_other + column, tl.load(p_grid + i * 8 + column))
        other_low = tl.where(dense_a, low, tl.maximum(low, HALF))
        other_high = tl.where(dense_a, tl.minimum(high, HALF), high)
        tl.store(p_other + 3, tl.where(mixed, dense_steps, 0))
        tl.store(p_other + 5, kind >> 16 << 16 | other_low | other_high << 8)
        tl.store(p_other + 6, dense_steps)
        tl.store(p_work + items + i, tl.where(mixed, dense_steps, 0))
        low = tl.where(mixed & dense_a, tl.maximum(low, HALF), low)
        high = tl.where(mixed & (dense_a == 0), tl.minimum(high, HALF), high)
    p_item = p_items + i * 8
    tl.store(p_item, tl.load(p_grid + i * 8))
    tl.store(p_item + 1, tl.load(p_grid + i * 8 + 1))
    tl.store(p_item + 2, tl.where(empty, 0, tl.where(dense, tl.load(p_grid + i * 8 + 2), start)))
    tl.store(p_item + 3, tl.where(by_bounds, work, listed | columns << COLUMN_SHIFT))
    tl.store(p_item + 4, tl.load(p_grid + i * 8 + 4))
    tl.store(p_item + 5, low | high << 8 | tl.where(by_bounds, kind >> 16 << 16, 0) | tl.where(empty, EMPTY, 0))
    tl.store(p_item + 6, halves)
    tl.store(p_item + 7, alone << 1 | two)
    tl.store(p_work + i, work)

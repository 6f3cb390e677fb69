"""The Hopper form's work item, 8 int32: which word holds what, and the bits inside words. device.py says what it means.

Pack and unpack functions take Python integers and tensors alike.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

__all__ = ["Halves", "list_room", "pack_halves", "pack_pair", "pack_steps", "pack_tile", "unpack_steps", "unpack_tile"]

ROW, HEAD, START, COUNT, KV, KIND, SLOT, PLAN = range(8)
ITEM = 8

# KIND: the tile's valid query rows [low, high), a byte each, and above them
TILE_BITS = 16
DENSE = 1 << 16
EMPTY = 1 << 17
DIAGONAL_SHIFT = 18  # of a dense item
NARROW = 1 << 20  # of a listed item, like MISSING
MISSING_SHIFT = 21
MISSING = 3
SHORT = 1 << 23
SECOND_EDGE = 1 << 24
NARROW_KEYS = 16

COLUMN_SHIFT = 20  # COUNT: steps over entries, and above them steps over single columns

# Rows of 64 queries, two to an item: SLOT and PLAN hold other things.
HALF = 64
PAIRS_SHIFT = 16
SECOND = -(1 << 31)  # the sign
SPARE = 4  # a pair's steps may end in as many entries that are nowhere

RUNNING, FIXED, AGAIN = range(3)  # MODE of a launch

_N = TypeVar("_N", int, Tensor)


def pack_tile(low: _N, high: _N) -> _N:
    """KIND of a tile whose valid query rows are [low, high)."""
    return low | high << 8


def unpack_tile(kind: _N) -> tuple[_N, _N, _N]:
    """(low, high, the bits above them in their places) of KIND."""
    return kind & 255, kind >> 8 & 255, kind >> TILE_BITS << TILE_BITS


def pack_steps(listed: _N, columns: _N) -> _N:
    """COUNT."""
    return listed | columns << COLUMN_SHIFT


def unpack_steps(count: _N) -> tuple[_N, _N]:
    """(steps over entries, steps over single columns) of COUNT."""
    return count & ((1 << COLUMN_SHIFT) - 1), count >> COLUMN_SHIFT


class Halves(NamedTuple):
    """Who needs which steps of two rows: `both` first steps both; of the next 2 * `turns` the first and the second half
    in turns; of the rest, `second`: the second half, else the first."""

    both: int
    turns: int
    second: bool

    @classmethod
    def of(cls, word: int) -> Halves:
        """From SLOT."""
        return cls(word & ((1 << PAIRS_SHIFT) - 1), word >> PAIRS_SHIFT & 0x7FFF, word < 0)


def pack_halves(both: int, turns: int, second: bool) -> int:
    """SLOT of two rows."""
    return both | turns << PAIRS_SHIFT | (SECOND if second else 0)


def pack_pair(row: _N, two: _N) -> _N:
    """PLAN of two rows: the first half's or the only one's, and whether the next row is the second half's."""
    return row << 1 | two


def list_room(entries: int, plan_heads: int, rows: int) -> int:
    """Entries that the list of `pair_rows` may take. plan_heads: of all plan samples. rows: those of each."""
    return entries + SPARE * plan_heads * (rows // 2 + 1)

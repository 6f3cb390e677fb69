"""A plan's entries: which tile, and what is masked in it, in one int32."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

__all__ = ["CAUSAL", "FLAGS", "FLAG_BITS", "RULE", "pack", "unpack"]

CAUSAL = 1  # flag: apply the causal mask, and the valid key length
RULE = 2  # flag: apply the token rule
FLAG_BITS = 2
FLAGS = (1 << FLAG_BITS) - 1

_N = TypeVar("_N", int, Tensor)


def pack(key: _N, flags: _N) -> _N:
    """The entry of the tile whose first key is at position `key`, below `geometry.MAX_TOKENS`."""
    return key << FLAG_BITS | flags


def unpack(entry: _N) -> tuple[_N, _N]:
    """(position of the first key, flags)."""
    return entry >> FLAG_BITS, entry & FLAGS

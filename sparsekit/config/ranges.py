"""Ranges of layers and heads: `"0-15"`, `"3"`, `"0,4,8-11"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.errors import SparsekitError, shown

__all__ = ["MOST", "by_number", "format_range", "numbers_within", "parse_range", "ranged"]

MOST = 1024  # layers of a model, and heads of a layer: a range is bounded before it is spelled out
MOST_CHARACTERS = 5 * MOST  # every second number by itself

_HOW = 'write a number, a range "0-15", or a list "0,4,8-11"'


def parse_range(text: str) -> list[int]:
    """`"0,4,8-11"` -> [0, 4, 8, 9, 10, 11]; ends are included.

    Raises:
        SparsekitError: no range, one that ends before it starts, a number twice, or one that no model has.
    """
    if len(text) > MOST_CHARACTERS:
        raise SparsekitError(f"{shown(text)} is not a range; {_HOW}")
    out: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        ends = [first, last] if dash else [first, first]
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise SparsekitError(f"{shown(text)} is not a range; {_HOW}")
        if max(len(end.lstrip("0")) for end in ends) > len(str(MOST)) or max(map(int, ends)) >= MOST:
            raise SparsekitError(f"{shown(text)}: layers and heads are numbered from 0 to {MOST - 1:,}")
        numbers = range(int(ends[0]), int(ends[1]) + 1)
        if not numbers:
            raise SparsekitError(f"{shown(text)}: {shown(part)} ends before it starts")
        for n in numbers:
            if n in out:
                raise SparsekitError(f"{shown(text)} holds {n} twice")
            out[n] = None
    return list(out)


def numbers_within(field: str, key: str, count: int, what: str) -> list[int]:
    """The numbers of a range that is a key of `field`, each below `count`.

    Raises:
        SparsekitError: one is not, of a model with so many of `what`.
    """
    numbers = parse_range(key)
    if max(numbers) >= count:
        raise SparsekitError(f"{field}: {what} {max(numbers)} of a model with {count} {what}s; allowed: 0-{count - 1}.")
    return numbers


def format_range(numbers: Sequence[int]) -> str:
    """[0, 4, 8, 9, 10, 11] -> `"0,4,8-11"`; of ascending numbers."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def by_number(rules: Mapping[str, Any]) -> dict[int, Any]:
    """Each number of the ranges that are keys, with its value."""
    return {n: rule for key, rule in rules.items() for n in parse_range(key)}


def ranged(rules: Mapping[Any, Any]) -> dict[str, Any]:
    """The rules with their keys as text: each key a range, and no number in two of them, however they are spelled.

    Raises:
        SparsekitError: a key that is no range, or two that share a number: `"0"` and `0`, `"1-3"` and `"03"`.
    """
    out: dict[str, Any] = {}
    owner: dict[int, Any] = {}
    for key, rule in rules.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise SparsekitError(f"{shown(key)}: {_HOW}")
        if isinstance(key, int) and abs(key) >= MOST:
            raise SparsekitError(f"{shown(key)}: layers and heads are numbered from 0 to {MOST - 1:,}")
        text = ",".join("-".join(word.strip() for word in part.split("-")) for part in str(key).split(","))
        for n in parse_range(text):
            if n in owner:
                raise SparsekitError(
                    f"{shown(key)} and {shown(owner[n])} overlap at {n}; each number may stand in one rule"
                )
            owner[n] = key
        out[text] = rule
    return out

"""What a field of a pattern may hold."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any, get_args, get_origin

from sparsekit.errors import SparsekitError, nearest, shown

__all__ = [
    "AUTO",
    "MOST_DEPTH",
    "UNHASHABLE",
    "bounded",
    "has_auto",
    "holds",
    "tokens_or_auto",
    "tokens_or_none",
    "too_deep",
]

AUTO = "auto"  # of `dense_below_tokens`: what a table of crossovers says
LARGEST = 2**31 - 1  # plans hold positions and counts in 32 bits
UNHASHABLE = (list, dict, set, Mapping, MutableMapping, MutableSequence, MutableSet)
MOST_DEPTH = 40  # mappings and lists in one another, as a union of unions has them


def bounded(value: Any) -> Any:
    """The value, of a field; an error where it is, or holds, a whole number beyond 32 bits."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int) and abs(one) > LARGEST:
            raise SparsekitError(f"{shown(one)} is too large; numbers go up to {LARGEST:,}")
    return value


def holds(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    return (get_origin(annotation) or annotation) in kinds or any(holds(one, kinds) for one in get_args(annotation))


def tokens_or_auto(value: Any) -> Any:
    """A value of `dense_below_tokens`: a whole number of tokens, or "auto".

    Raises:
        ValueError: any other, as pydantic wants it.
    """
    if (isinstance(value, str) and value == AUTO) or (type(value) is int and bounded(value) >= 0):
        return value
    hint = nearest(value, (AUTO,)) if isinstance(value, str) else ""
    raise ValueError(f"it should be a whole number of tokens, at least 0, or {AUTO!r}{hint and '.'}{hint}")


def tokens_or_none(value: Any) -> Any:
    """The same, or None: the pattern's own default."""
    return value if value is None else tokens_or_auto(value)


def has_auto(pattern: object) -> bool:
    """Whether a pattern, or a member of a union, says `auto`."""
    own = getattr(pattern, "dense_below_tokens", None) == AUTO
    return own or any(map(has_auto, getattr(pattern, "of", ())))


def too_deep(value: Any) -> bool:
    """Whether mappings and lists are nested more than `MOST_DEPTH` deep in one another, or hold themselves."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (one.values() if isinstance(one, Mapping) else one for one in level)
        level = list({id(x): x for one in inner for x in one if isinstance(x, Mapping | list | tuple)}.values())
        if not level:
            return False
    return True

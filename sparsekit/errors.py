"""The one error that sparsekit raises for bad input, and the nearest right name to put into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

__all__ = ["SparsekitError", "nearest", "shown", "writable"]


class SparsekitError(ValueError):
    """Bad input. The message is one line: the field, the value, what is allowed, and the nearest right name."""


@contextmanager
def writable(path: Path | str, what: str = "output") -> Iterator[None]:
    """Within this block a path is written; what the system refuses is one line that names it."""
    try:
        yield
    except OSError as error:
        raise SparsekitError(f"{what} {str(path)!r} cannot be written: {error.strerror or error}.") from None


def nearest(name: object, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `allowed`, or nothing.

    Spelling distance first; then the same words in another order, so that `last_n` finds `n_last` and `last_tokens`.
    """
    text, names = str(name), list(allowed)
    close = get_close_matches(text, names, n=1, cutoff=0.6)
    if not close:
        words = set(text.lower().split("_"))
        shared = [(len(words & set(other.lower().split("_"))), other) for other in names]
        close = [other for count, other in sorted(shared, key=lambda pair: -pair[0]) if count]
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(value: object, most: int = 60) -> str:
    """`repr(value)` for a message, cut in the middle where it is long."""
    try:
        text = repr(value)
    except Exception:  # of whatever kind: Python refuses to write out an integer of 5,000 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 13]}...{text[-10:]}"

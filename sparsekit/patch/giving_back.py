"""Which layers, or heads, are given back to dense attention: the one search that the gate and the contract make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["give_back_until"]


def give_back_until(
    candidates: Sequence[int],
    worth: Callable[[list[int]], tuple[float, ...]],
    *,
    few: int | None = None,
    most: int | None = None,
    step: Callable[[int], object] = lambda steps: None,
) -> tuple[list[int], bool]:
    """One at a time, each time the one that brings back most, until it is enough.

    Args:
        candidates: layers, or heads of a layer.
        worth: of what is given back: first whether it is enough, then how much it brings back, the greatest the best.
        few: how many of those that are left are tried each time, the first; default all.
        most: how many are given back at most; default all.
        step: told of each one that is given back.

    Returns:
        (those given back, ascending; whether it was enough).
    """
    back: list[int] = []
    while len(back) < (len(candidates) if most is None else most):
        left = [one for one in candidates if one not in back][:few]
        (enough, *_), found = max((worth([*back, one]), one) for one in left)
        back.append(found)
        step(1)
        if enough:
            return sorted(back), True
    return sorted(back), False

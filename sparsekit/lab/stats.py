"""Means and shares with their 95% intervals, quantiles, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean

from sparsekit.errors import SparsekitError

__all__ = [
    "Z95",
    "mean_interval",
    "mean_of_known",
    "quantile",
    "rank_correlation",
    "ranks",
    "share_interval",
    "standard_error",
]

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def share_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% Wilson interval of a share, from scores of 0 to 1."""
    n, share = len(_some(scores)), sum(scores) / len(scores)
    centre, spread = share + Z95**2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return share, max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95% interval by the normal distribution); the width of one value is infinite."""
    return mean(_some(values)), Z95 * standard_error(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite of one value."""
    n, centre = len(_some(values)), sum(values) / len(values)
    return math.inf if n < 2 else math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1) / n)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known, or None where none is."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, between the two nearest."""
    ordered = sorted(_some(values))
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _some(values: Sequence[float]) -> Sequence[float]:
    if not values:
        raise SparsekitError("there are no measurements to take a mean of.")
    return values


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    middle = (len(x) + 1) / 2
    cov = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)
    return cov / spread**0.5 if spread else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1 of the smallest; equal values share the mean of theirs."""
    return [1 + sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]

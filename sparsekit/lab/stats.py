"""Means and shares with their 95% intervals, quantiles, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean

from sparsekit.patch.divergence import Z95, mean_interval, some, standard_error

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


def share_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% Wilson interval of a share, from scores of 0 to 1."""
    n, share = len(some(scores)), sum(scores) / len(scores)
    centre, spread = share + Z95**2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return share, max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known, or None where none is."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, between the two nearest."""
    ordered = sorted(some(values))
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


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

"""A limit of CPU time that a busy machine does not break: best of three."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def seconds_of(call: Callable[[], T], enough: float) -> tuple[T, float]:
    """What `call` gives, and the CPU seconds of the quickest of three calls. One within `enough` is the last."""
    quickest = float("inf")
    for _ in range(3):
        start = time.process_time()
        given = call()
        quickest = min(quickest, time.process_time() - start)
        if quickest <= enough:
            break
    return given, quickest


def soon(call: Callable[[], T], seconds: float) -> T:
    """What `call` gives; it takes at most `seconds`."""
    given, took = seconds_of(call, seconds)
    assert took <= seconds, f"{took:.2f} s of CPU time, three times over {seconds:g}"
    return given

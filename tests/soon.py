"""A limit of CPU time that a busy machine does not break: best of three, of this thread, without the collector.

A worker of the tests has threads that others started, and a heap that takes seconds to walk; neither is the call's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def seconds_of(call: Callable[[], T], enough: float) -> tuple[T, float]:
    """What `call` gives, and the CPU seconds of the quickest of three calls. One within `enough` is the last."""
    quickest, collects = float("inf"), gc.isenabled()
    gc.disable()
    try:
        for _ in range(3):
            start = time.thread_time()
            given = call()
            quickest = min(quickest, time.thread_time() - start)
            if quickest <= enough:
                break
    finally:
        if collects:
            gc.enable()
    return given, quickest


def soon(call: Callable[[], T], seconds: float) -> T:
    """What `call` gives; it takes at most `seconds`."""
    given, took = seconds_of(call, seconds)
    assert took <= seconds, f"{took:.2f} s of CPU time, three times over {seconds:g}"
    return given

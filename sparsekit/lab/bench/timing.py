"""What benches share: medians in rounds, and the file that the rows go to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from sparsekit.lab.journal import Journal, replacing

__all__ = ["ROUNDS", "Record", "milliseconds", "rounds", "spread", "synchronize"]

SPREAD = (0.5, 0.2, 0.8)
ROUNDS = 3


def milliseconds(call: Callable[[], Any], device: torch.device, repeat_ms: float) -> list[float]:
    """Times of a third of the repeats, after a warm-up; on a CUDA device by events, caches flushed before each.

    Events and flushed caches are of the current device, so `device` is that meanwhile.
    """
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    once = (time.perf_counter() - start) * 1e3
    if device.type != "cuda":
        return [once, *(_clocked(call, device) for _ in range(int(repeat_ms / ROUNDS / max(once, 1e-3))))]
    from triton.testing import do_bench

    with torch.cuda.device(device):
        found: list[float] = do_bench(call, warmup=20, rep=max(repeat_ms / ROUNDS, 2 * once), return_mode="all")
    return found


def _clocked(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def rounds(calls: Sequence[Callable[[], Any]], device: torch.device, repeat_ms: float) -> list[list[float]]:
    """Milliseconds of each call. Calls take turns, so that a GPU that clocks down under load does so for all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, all_ms in zip(calls, times, strict=True):
            all_ms += milliseconds(call, device, repeat_ms)
    return times


def spread(all_ms: Sequence[float], name: str = "ms") -> dict[str, float]:
    """`name` (the median), `name`_p20 and `name`_p80, milliseconds."""
    ms, low, high = torch.tensor(all_ms).quantile(torch.tensor(SPREAD)).tolist()
    return {name: round(ms, 4), f"{name}_p20": round(low, 4), f"{name}_p80": round(high, 4)}


def synchronize(device: torch.device) -> None:
    """Wait for what a device that runs on its own has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Record(AbstractContextManager["Record"]):
    """Rows so far, each with where it was measured. Use `with`: a file has them all when the block ends, and until then
    they are in `FILE.part`.
    """

    def __init__(self, path: Path | str | None, where: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.place = where
        self._journal = None if path is None else Journal(path, "rows", "`sparsekit bench`")
        self._open = ExitStack()
        self._write: Callable[[Mapping[str, Any]], None] | None = None

    def __enter__(self) -> Record:
        if self._journal is not None:
            self._write = self._open.enter_context(replacing(self._journal))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({**row, **self.place})
        if self._write is not None:
            self._write(self.rows[-1])

"""What both benches share: medians in rounds, where a row was measured, and the file the rows go to."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsekit import __version__
from sparsekit.errors import writable, writing

__all__ = ["ROUNDS", "Record", "milliseconds", "place", "rounds", "spread", "synchronize"]

SPREAD = (0.5, 0.2, 0.8)
ROUNDS = 3


def milliseconds(call: Callable[[], Any], device: torch.device, repeat_ms: float) -> list[float]:
    """Times of a third of the repeats, after a warm-up; on a CUDA device by events, caches flushed before each."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    once = (time.perf_counter() - start) * 1e3
    if device.type != "cuda":
        return [once, *(_clocked(call, device) for _ in range(int(repeat_ms / ROUNDS / max(once, 1e-3))))]
    from triton.testing import do_bench

    found: list[float] = do_bench(call, warmup=20, rep=max(repeat_ms / ROUNDS, 2 * once), return_mode="all")
    return found


def _clocked(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def rounds(calls: Sequence[Callable[[], Any]], device: torch.device, repeat_ms: float) -> list[list[float]]:
    """Milliseconds of each call. Calls take turns, so that a card that clocks down under load does so for all."""
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


def place(device: torch.device) -> dict[str, Any]:
    """Where rows are measured: device, versions, date, and this process' command."""
    on_card = device.type == "cuda"
    door = "python -m sparsekit.lab.bench" if Path(sys.argv[0]).parent.name == "bench" else "sparsekit"
    return {
        "device": torch.cuda.get_device_name(device) if on_card else platform.processor() or platform.machine(),
        "sparsekit": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if on_card else None,
        "python": platform.python_version(),
        "threads": None if on_card else torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "command": f"{door} {shlex.join(sys.argv[1:])}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Record:
    """Rows so far, each with where it was measured; written to a JSONL file row by row."""

    def __init__(self, path: Path | str | None, where: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = Path(path) if path else None
        self.place = where
        if self.path is not None:
            with writable(self.path):  # found out before anything is measured
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.open("a").close()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({**row, **self.place})
        if self.path is not None:
            with writing(self.path) as part:
                part.write_text("".join(json.dumps(one) + "\n" for one in self.rows), encoding="utf-8")

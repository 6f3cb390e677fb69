"""Times of calls: of the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sparsekit.lab.bench.timing import milliseconds


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_a_second_gpu_is_timed_by_its_own_events(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's timer records its events on the current device: on another one they would bracket nothing."""
    pytest.importorskip("triton")
    current = ["cuda:0"]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    def timer(call: Any, **_: Any) -> list[float]:
        call()
        return [3.0 if current[-1] == name else 0.003]

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("triton.testing.do_bench", timer)
    assert milliseconds(lambda: None, torch.device(name), 0) == [3.0]
    assert current == ["cuda:0"]

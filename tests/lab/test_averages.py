"""RULER's average: means over tasks, whatever their numbers of prompts, and differences of the same prompts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sparsekit import SparsekitError
from sparsekit.lab.averages import average_table, averages


def record(label: str, task: str, scores: list[float], *, tokens: int = 4096, seed: int = 0) -> dict[str, Any]:
    key = "dense" if label == "dense" else f"key of {label}"
    score = sum(scores) / len(scores)
    return {"label": label, "config_key": key, "task": task, "tokens": tokens, "seed": seed, "scores": scores,
            "config": None if label == "dense" else {}, "score": score, "kl": 0.5, "density": 0.25}  # fmt: skip


def test_tasks_weigh_alike_and_differences_are_paired() -> None:
    records = [
        record("dense", "a", [1, 1]),
        record("dense", "a", [1, 0], seed=1),
        record("dense", "b", [0.5, 0.5]),
        record("mix", "a", [1, 0]),
        record("mix", "a", [1, 0], seed=1),
        record("mix", "b", [0.5, 0.0]),
    ]
    dense, mix = averages(records)
    assert (dense["score"], dense["difference"], dense["difference_width"]) == (pytest.approx(0.625), 0, 0)
    assert mix["score"] == pytest.approx((0.5 + 0.25) / 2) and mix["difference"] == pytest.approx(-0.25)
    # task a: differences 0, -1, 0, 0, standard error 0.25; task b: 0, -0.5, standard error 0.25
    assert mix["difference_width"] == pytest.approx(1.959964 * math.sqrt(0.25**2 + 0.25**2) / 2)
    assert (mix["tasks"], mix["prompts"], mix["density"]) == (2, 6, 0.25)
    assert "| mix | 37.5 (-25.0 ± 34.6) |" in average_table(records)


def test_a_config_that_lacks_a_task_says_so_and_one_without_dense_is_refused() -> None:
    records = [record("dense", "a", [1, 1]), record("dense", "b", [1, 1]), record("mix", "a", [1, 0])]
    assert "| mix | 50.0 (-50.0 ± 98.0), 1 of 2 tasks |" in average_table(records)
    with pytest.raises(SparsekitError, match="mix at 8192 tokens: there is no record of dense"):
        averages([*records, record("mix", "a", [1], tokens=8192)])

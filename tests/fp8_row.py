"""The FP8 form's row of the table on a CPU: what it covers is its own, and torch runs it in the dtype of q, k and v."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from sparsekit.kernels.attend.torch_blocks import attend_torch
from sparsekit.kernels.choose import TABLE
from sparsekit.plan import BlockPlan

FP8 = next(row for row in TABLE if row.name == "hopper_fp8")


def change_row(monkeypatch: pytest.MonkeyPatch, missing: str = "", **fields: Any) -> None:
    """Such a row in place of it; `missing`: why it cannot run here where it is asked for."""
    row = FP8._replace(missing=lambda device, asked: missing if asked else "not asked for", **fields)
    table: Any = sys.modules["sparsekit.kernels.choose"]  # whose name a function has
    monkeypatch.setattr(table, "TABLE", tuple(row if one.name == row.name else one for one in TABLE))


def runs_here(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any] = attend_torch) -> list[BlockPlan]:
    """The plans that it runs from now on, of any dtype."""
    plans: list[BlockPlan] = []

    def run(q: Tensor, keys: Any, plan: BlockPlan, *rest: Any) -> Any:
        plans.append(plan)
        return attend(q, keys, plan, *rest)

    def covers(*call: Any) -> list[str]:
        return [why for why in FP8.covers(*call) if not why.startswith("dtype")]

    change_row(monkeypatch, run=run, covers=covers, selects_in_triton=False)
    return plans


def half(*call: Any) -> Any:
    """What `attend_torch` gives, but half of the output: a form that is far from exact."""
    out, lse = attend_torch(*call)
    return out / 2, lse

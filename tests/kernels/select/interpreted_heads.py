"""The Triton path of giving heads a plan in Triton's interpreter, against the torch path. `test_heads.py` runs this
file in a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import pytest
import torch
from heads_cases import HEADS_CASES, HeadsCase

from sparsekit.kernels import launch
from sparsekit.kernels.select import plan_of_heads


def test_it_is_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.parametrize("case", HEADS_CASES, ids=str)
def test_both_paths_give_one_plan(case: HeadsCase) -> None:
    plan = case.plan()
    expected = plan_of_heads(plan, case.heads, impl="torch")
    got = plan_of_heads(plan, case.heads, impl="triton")
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        there = got.tensors[name]
        assert torch.equal(there[: len(tensor)] if name == "entries" else there, tensor), name

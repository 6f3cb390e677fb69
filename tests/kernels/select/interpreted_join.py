"""The Triton path of joining plans in Triton's interpreter, against the torch path. `test_join.py` runs this file in a
process of its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from join_cases import CASES, Case, same

from sparsekit.kernels import launch
from sparsekit.kernels.select.join import join_plans
from sparsekit.kernels.select.totals import plan_totals


def test_it_is_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_paths_give_one_plan(case: Case) -> None:
    plans = case.plans()
    same(join_plans(plans, impl="triton"), join_plans(plans, impl="torch"))
    assert all(
        torch.equal(a, b) for a, b in zip(plans[0].tensors.values(), case.plans()[0].tensors.values(), strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_paths_count_alike(case: Case) -> None:
    for plan in (*case.plans(), join_plans(case.plans(), impl="torch")):
        fresh = replace(plan)
        assert plan_totals(fresh, impl="triton").sums.tolist() == plan.sums().tolist()
        assert fresh.kept_pairs() == int(plan.to_mask().sum())

"""A plan given to other heads: each does what the head it was given did, and no head more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import compiled, interpret
from heads_cases import HEADS_CASES, HeadsCase
from join_cases import ODD

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.select import plan_of_heads
from sparsekit.kernels.select.totals import plan_totals
from sparsekit.patterns import S2O, Triangle, static_plan
from sparsekit.plan import BlockPlan, dense_plan


def _by_query_head(plan: BlockPlan, heads: int) -> torch.Tensor:
    return plan.to_mask().repeat_interleave(heads // plan.heads, 1)


@pytest.mark.parametrize("case", HEADS_CASES[:-1], ids=str)
def test_each_head_does_what_it_was_given(case: HeadsCase) -> None:
    plan = case.plan()
    before = {name: tensor.clone() for name, tensor in plan.tensors.items()}
    given = plan_of_heads(plan, case.heads)
    whole = _by_query_head(plan, len(case.heads))
    assert torch.equal(_by_query_head(given, len(case.heads)), whole[:, list(case.heads)])
    assert (given.multiplicity() <= 1).all()
    assert given.kept_pairs() == int(given.to_mask().sum())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plan.tensors.items())


def test_rules_move_with_their_heads() -> None:
    g = Geometry.of(300)
    plans = [static_plan(Triangle(window_tokens=n, last_tokens=8), g, torch.device("cpu")) for n in (16, 64)]
    from sparsekit.plan import stack_heads

    plan = stack_heads(plans, (0, 1, 1, 0))
    assert torch.equal(plan_of_heads(plan, (1, 0, 0, 3)).to_mask(), plan.to_mask()[:, [1, 0, 0, 3]])


def test_what_changes_nothing_is_the_plan_itself() -> None:
    """So its work lists are made once."""
    plan = HEADS_CASES[1].plan()
    assert plan_of_heads(plan, (0, 1, 2, 3)) is plan
    of_key_heads = HEADS_CASES[3].plan()
    assert plan_of_heads(of_key_heads, (1, 0, 3, 3)) is of_key_heads
    static = static_plan(Triangle(window_tokens=16), ODD, torch.device("cpu"))
    assert plan_of_heads(static, (3, 1, 1, 0)) is static
    dense = dense_plan(ODD)
    assert plan_of_heads(dense, (3, 1, 1, 0)) is dense


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SparsekitError, match="a plan of 4 heads: want 1, or a number that divides 6 query heads"):
        plan_of_heads(HEADS_CASES[1].plan(), (0,) * 6)


def test_a_ranked_plan_takes_its_orders_along() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 700, 16, generator=generator) for n in (4, 2, 2))
    softmax, heads = Softmax(0.25), (2, 2, 1, 0)
    pattern = S2O(segment_tokens=128, **{k: v for k, v in S2O.test_points[0].items() if k != "segment_tokens"})
    plan = pattern.select(q, k, Geometry.of(700), softmax)
    assert plan.ranked is not None
    given = plan_of_heads(plan, heads)
    assert given.ranked is not None
    assert torch.equal(given.ranked.keys, plan.ranked.keys[:, list(heads)])
    same_q = q[:, [2, 2, 1, 0]]  # under the keys of one head, so that only the orders differ
    alike = k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
    out = attend(same_q, *alike, given)
    expected = attend(q, *alike, replace(plan))
    assert isinstance(out, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(out, expected[:, list(heads)])


# ---- the Triton path


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("select/interpreted_heads.py")


@pytest.mark.slow
def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    made = compiled("select/compile_heads.py", tmp_path)
    assert {case["kernel"] for case in made} == {"_copy_lists"}
    assert all(case["spilled"] == 0 for case in made), made


@pytest.mark.gpu
@pytest.mark.parametrize("case", HEADS_CASES, ids=str)
def test_on_a_gpu_without_waiting(case: HeadsCase) -> None:
    plan = case.plan()
    moved = plan.to("cuda")
    plan_of_heads(moved, case.heads)  # by now the kernel is compiled, and the numbers of the heads are uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        given = plan_of_heads(moved, case.heads)
        totals = plan_totals(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = plan_of_heads(plan, case.heads)
    assert totals.kept_pairs() == expected.kept_pairs()
    for name, tensor in expected.tensors.items():
        there = given.tensors[name].cpu()
        assert torch.equal(there[: len(tensor)] if name == "entries" else there, tensor), name

"""Plans of other tiles, plans stacked head by head, and plans joined: the same pairs, a superset, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from children import compiled, interpret
from hypothesis import given, settings
from hypothesis import strategies as st
from join_cases import CASES, TRIANGLE, Case, random_plan, same
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.kernels.select.join import join_plans
from sparsekit.kernels.select.totals import plan_totals
from sparsekit.patterns import AShape, Dense, static_plan
from sparsekit.plan import CAUSAL, FLAG_BITS, BlockPlan, stack_heads

CPU = torch.device("cpu")


def masks(plans: Sequence[BlockPlan]) -> list[Tensor]:
    heads = max(plan.heads for plan in plans)
    return [plan.to_mask().repeat_interleave(heads // plan.heads, 1) for plan in plans]


def check_join(plans: Sequence[BlockPlan]) -> BlockPlan:
    joined = join_plans(plans)
    often = joined.multiplicity()
    assert int(often.max()) <= 1, "a pair twice"
    wanted = torch.stack(masks(plans)).any(0)
    assert bool((often.bool() | ~wanted).all()), "a member's pair is missing"
    causal = BlockPlan(joined.geometry, samples=joined.samples).to_mask()
    assert bool((causal | ~often.bool()).all()), "a pair outside the causal ones"
    assert joined.kept_pairs() == int(often.sum())
    return joined


# ---- tiles of another size, and heads of another plan


SHAPES = [
    Geometry.of(300, block_q=64, block_kv=64),
    Geometry.of(300, batch=3, kv_start=(0, 37, 250), block_q=128, block_kv=64),
    Geometry.of(100, 300, block_q=64, block_kv=128),
    Geometry.of(1, block_q=64, block_kv=64),
]


@pytest.mark.parametrize("geometry", SHAPES, ids=range(len(SHAPES)))
def test_finer_tiles_are_the_same_pairs(geometry: Geometry) -> None:
    for plan in (random_plan(geometry, 3, columns=5, spare=7, dense=0.2), static_plan(TRIANGLE, geometry, CPU)):
        finer = plan.with_block_kv(32)
        assert finer.block_kv == 32
        assert torch.equal(finer.to_mask(), plan.to_mask())
        assert finer.kept_pairs() == plan.kept_pairs() == int(plan.to_mask().sum())
        assert int(finer.multiplicity().max()) <= 1
        assert plan.with_block_kv(32) is finer
        assert plan.with_block_kv(plan.block_kv) is plan


def test_tiles_grow_no_larger() -> None:
    plan = static_plan(TRIANGLE, SHAPES[0], CPU)
    for wrong in (128, 48):
        with pytest.raises(SparsekitError, match=f"block_kv={wrong}: want a tile that divides"):
            plan.with_block_kv(wrong)


@pytest.mark.parametrize("geometry", SHAPES, ids=range(len(SHAPES)))
def test_stacked_heads_are_their_own_plans_rows(geometry: Geometry) -> None:
    other = geometry.with_tile(geometry.block_q, 32)
    plans = [
        random_plan(geometry, 1, heads=5, columns=40, spare=9, dense=0.1),
        static_plan(TRIANGLE, other, CPU),
        random_plan(geometry.with_tile(geometry.block_q, 128), 2, heads=5),
        static_plan(Dense(), geometry, CPU),
        static_plan(AShape(window_tokens=20), geometry, CPU),
    ]
    of_head = (0, 1, 2, 3, 0)
    stacked = stack_heads(plans, of_head)
    assert stacked.block_kv == (64 if plans[1].all_dense else 32)
    got = stacked.to_mask()
    for head, i in enumerate(of_head):
        own = plans[i].to_mask()
        assert torch.equal(got[:, head], own[:, head if plans[i].heads > 1 else 0])
    assert int(stacked.multiplicity().max()) <= 1
    assert stacked.kept_pairs() == int(got.sum())
    q = torch.randn(geometry.batch, 5, geometry.q_len, 16)
    k, v = (torch.randn(geometry.batch, 1, geometry.kv_len, 16) for _ in range(2))
    out, expected = (attend(q, k, v, stacked, impl=impl) for impl in ("torch", "reference"))
    assert isinstance(out, Tensor) and isinstance(expected, Tensor)
    assert float((out - expected).abs().max()) < 1e-5


def test_heads_of_one_plan_are_that_plan() -> None:
    plans = [static_plan(TRIANGLE, SHAPES[0], CPU), random_plan(SHAPES[0], 0, heads=3)]
    assert stack_heads(plans, (1, 1, 1)) is plans[1]
    assert stack_heads([static_plan(Dense(), SHAPES[0], CPU), *plans], (0, 0, 0)).all_dense


def test_plans_of_other_query_tiles_or_heads_are_refused() -> None:
    plans = [static_plan(TRIANGLE, SHAPES[0], CPU), random_plan(SHAPES[0].with_tile(128, 64), 0, heads=3)]
    for wrong in (lambda: stack_heads(plans, (0, 0, 1)), lambda: join_plans(plans)):
        with pytest.raises(SparsekitError, match="share their geometry"):
            wrong()
    with pytest.raises(SparsekitError, match="1 or 4 heads"):
        stack_heads(plans, (0, 0, 1, 1))
    three, two = (random_plan(SHAPES[0], 0, heads=heads) for heads in (3, 2))
    with pytest.raises(SparsekitError, match="share their geometry, query tile and heads"):
        join_plans([three, two])


# ---- the union of plans


@given(
    seed=st.integers(0, 10_000),
    q_len=st.integers(1, 260),
    earlier=st.integers(0, 100),
    pads=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=2),
    tile=st.sampled_from([(64, 32), (32, 64), (128, 64)]),
    members=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 5), st.sampled_from([0, 3, 40]), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    static=st.booleans(),
    dense=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=120, deadline=None)
def test_any_plans_join(
    seed: int,
    q_len: int,
    earlier: int,
    pads: list[tuple[int, int]],
    tile: tuple[int, int],
    members: list[tuple[int, int, int, bool]],
    static: bool,
    dense: float,
) -> None:
    last = earlier + q_len
    geometry = Geometry.of(
        q_len,
        last,
        batch=len(pads),
        kv_start=[min(left, last - 1) for left, _ in pads],
        kv_end=[max(last - right, min(left, last - 1)) for left, right in pads],
        block_q=tile[0],
        block_kv=tile[1],
    )
    plans = [
        random_plan(geometry, seed + i, heads=h, tiles=n, columns=c, aligned=a, spare=i, dense=dense)
        for i, (h, n, c, a) in enumerate(members)
    ]
    if static:
        plans.append(static_plan(TRIANGLE, geometry, CPU))
    check_join(plans)


@pytest.mark.parametrize("geometry", SHAPES, ids=range(len(SHAPES)))
def test_tiles_of_one_grid_join_exactly(geometry: Geometry) -> None:
    plans = [random_plan(geometry, i, aligned=True) for i in (1, 2)]
    assert torch.equal(check_join(plans).to_mask(), plans[0].to_mask() | plans[1].to_mask())


def test_a_rule_tile_stays_exact_where_nothing_meets_it() -> None:
    geometry = Geometry.of(512, block_q=64, block_kv=64)
    own, triangle = random_plan(geometry, 0, tiles=0), static_plan(TRIANGLE, geometry, CPU)
    joined = check_join([own, triangle])
    mask, expected = joined.to_mask()[0, 0], own.to_mask()[0, 0] | triangle.to_mask()[0, 0]
    assert torch.equal(mask[:, :8], expected[:, :8])
    assert not bool(mask[200:400, 8:64].any()), "the sinks' tile lost its rule"
    assert torch.equal(mask, expected)


def test_a_rule_tile_that_holds_a_column_is_whole_and_the_column_is_dropped() -> None:
    geometry = Geometry.of(512, block_q=64, block_kv=64)
    own, triangle = random_plan(geometry, 0, tiles=0), static_plan(TRIANGLE, geometry, CPU)
    tokens = torch.tensor([[[20, 200]]] * 2).permute(1, 0, 2).reshape(1, 2, 2).int()
    starts = torch.arange(8)
    bits = (1 * (starts > 0) + 2 * (starts > 3)).int().repeat(2)[:, None]  # needed after their own tiles
    column = BlockPlan(geometry, heads=2, row_ptr=own.row_ptr, entries=own.entries, tokens=tokens, token_bits=bits)
    joined = check_join([column, triangle])
    mask = joined.to_mask()[0, 0]
    assert bool(mask[300, :64].all()), "the tile of the sinks holds column 20 and is whole"
    assert joined.columns_of(0, 0, 5).tolist() == [False, True]
    assert bool(mask[400, 200]) and int(mask[400, 64:320].sum()) == 1


def test_a_row_goes_on_from_the_end_of_the_earlier_tile() -> None:
    """100..163 meets 128..191: three tiles from 100 on, the last for what is left of 192..255; the others stay."""
    geometry = Geometry.of(64, 1024, q_offset=960, block_q=64, block_kv=64)

    def plan(keys: list[int]) -> BlockPlan:
        entries = torch.tensor([key << FLAG_BITS | CAUSAL * (key == 960) for key in keys], dtype=torch.int32)
        return BlockPlan(geometry, row_ptr=torch.tensor([0, len(keys)]).int(), entries=entries)

    joined = check_join([plan([0, 128, 192, 300, 960]), plan([100, 400, 500])])
    assert joined.entries is not None
    assert (joined.entries >> FLAG_BITS).tolist() == [0, 100, 164, 228, 300, 400, 500, 960]


# ---- the Triton path


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("select/interpreted_join.py")


@pytest.mark.slow
def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    made = compiled("select/compile_join.py", tmp_path)
    assert {case["kernel"] for case in made} == {"_drop_row", "_merge_row", "_sum_row"}
    assert all(case["spilled"] == 0 for case in made), made


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_without_waiting(case: Case) -> None:
    plans = case.plans()
    moved = [plan.to("cuda") for plan in plans]
    stacked_of = [*moved, static_plan(TRIANGLE, case.geometry, torch.device("cuda"))]
    finer = case.geometry.block_kv // 2
    heads = max(plan.heads for plan in plans)
    whole = [plan for plan in stacked_of if plan.heads in (1, heads)]
    of_head = [h % len(whole) for h in range(heads)]
    for plan in (join_plans(moved), stack_heads(whole, of_head)):
        plan_totals(plan)  # by now kernels are compiled, and what belongs to the geometry is uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        joined, stacked = join_plans(moved), stack_heads(whole, of_head)
        cut = [plan.with_block_kv(finer) for plan in moved if plan.row_ptr is not None]
        totals = [plan_totals(plan) for plan in (joined, stacked, *cut)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = join_plans(plans)
    if expected.row_ptr is not None:
        same(joined, expected)
    for plan, total in zip((joined, stacked, *cut), totals, strict=True):
        mask = plan.to("cpu").to_mask()
        assert total.kept_pairs() == int(mask.sum())
    on_cpu = [plan.to("cpu") for plan in whole]
    assert torch.equal(stacked.to("cpu").to_mask(), stack_heads(on_cpu, of_head).to_mask())

"""Ranked execution with torch against the definition; and the Triton kernel, interpreted and compiled in child
processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import compiled, interpret
from ranked_cases import GEOMETRIES, PATTERNS, SINKS, check_ranked, peaked, plan_of, shuffled, unvisited

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.kernels.attend import torch_ranked as ranked
from sparsekit.patterns import S2O
from sparsekit.plan import dense_plan, stack_heads
from sparsekit.plan.flex import to_flex

G300 = GEOMETRIES["300"]


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_torch_is_the_definition(name: str, kind: str) -> None:
    geometry = GEOMETRIES[name]
    inputs = peaked(geometry)
    check_ranked(plan_of(PATTERNS[kind], inputs, geometry), inputs, "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.4}], ids=str)
def test_softmax_variants(options: dict[str, object], dtype: torch.dtype) -> None:
    inputs = peaked(G300, dtype)
    check_ranked(plan_of(PATTERNS["stops"], inputs, G300), inputs, "torch", **options)  # type: ignore[arg-type]


def test_some_tiles_ahead_or_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(600, block_q=64)
    inputs = peaked(geometry)
    for at_once in (1, 3):
        monkeypatch.setattr(ranked, "TILES_AT_ONCE", at_once)
        for kind in ("stops", "patient"):
            check_ranked(plan_of(PATTERNS[kind], inputs, geometry), inputs, "torch")


def test_these_plans_do_stop_early() -> None:
    """Without which the comparisons above would say little."""
    geometry = Geometry.of(1300, block_q=64)
    q, k, v = peaked(geometry)
    for kind in ("stops", "odd segments", "patient"):
        plan = plan_of(PATTERNS[kind], (q, k, v), geometry)
        assert plan.ranked is not None
        attend(q, k, v, plan)
        listed = plan.ranked.key_ptr.diff()[:, None, :, None]
        ended = (plan.visited * 64 < listed) & (listed > 0)
        assert float(ended.sum() / (listed > 0).expand_as(ended).sum()) > 0.25
        assert len(plan.visited.unique()) > 3


def test_what_is_visited_is_known_after_execution() -> None:
    geometry = Geometry.of(700, block_q=64)
    q, k, v = peaked(geometry)
    plan = plan_of(PATTERNS["stops"], (q, k, v), geometry)
    assert plan.ranked is not None
    assert plan.visited is None
    before = plan.density()
    assert before == 1
    attend(q, k, v, plan)
    after = plan.density()
    assert after < before
    assert plan.kept_pairs() == int(plan.to_mask().sum())
    assert after == plan.kept_pairs() / (4 * 700 * 701 / 2)
    assert plan.to("cpu").density() == after
    assert attend(q, k, v, plan, impl="reference").shape == q.shape  # type: ignore[union-attr]
    assert plan.density() == after


@pytest.mark.parametrize("kind", PATTERNS)
def test_tiles_are_counted_as_they_are_visited(kind: str) -> None:
    """By loops over query tiles: own tiles up to the last query, the sink tile, ranked tiles."""
    geometry = Geometry.of(500, block_q=64)
    q, k, v = peaked(geometry)
    plan = plan_of(PATTERNS[kind], (q, k, v), geometry)
    attend(q, k, v, plan)
    assert plan.ranked is not None
    size, tiles = plan.ranked.segment_tokens, 0
    for head in range(4):
        for segment in range(-(-500 // size)):
            places = plan.ranked.q_index[0, head, segment].tolist()
            for t in range(plan.visited.shape[-1]):
                queries = [p for p in places[t * plan.block_q : (t + 1) * plan.block_q] if p >= 0]
                if queries:
                    tiles += (max(queries) - segment * size) // 64 + 1 + (segment > 0)
                    tiles += int(plan.visited[0, head, segment, t])
    assert plan.visited_tiles() == tiles


def test_nan_is_no_reason_to_stop() -> None:
    geometry = Geometry.of(500, block_q=64)
    q, k, v = peaked(geometry)
    plan = plan_of(S2O(segment_tokens=64, tau=0.9), (q, k, v), geometry)
    q[0, 0, 450] = float("nan")
    for impl in ("torch", "reference"):
        fresh = unvisited(plan)
        out = attend(q, k, v, fresh, impl=impl)
        assert isinstance(out, torch.Tensor)
        assert fresh.visited is not None
        assert int(fresh.visited[0, 0, 7, 0]) == 6  # all of them: 448 keys, less the sink tile
        assert int(fresh.visited[0, 1, 7, 0]) < 6
        assert bool(out[0, 0, 450].isnan().all())
        assert int(out.isnan().any(-1).sum()) == 1


def test_what_a_ranked_plan_refuses() -> None:
    inputs = peaked(G300)
    plan = plan_of(PATTERNS["stops"], inputs, G300)
    with pytest.raises(SparsekitError, match="a ranked plan is a layer's only one"):
        stack_heads([plan, dense_plan(plan.geometry)], [0, 0, 1, 1])
    assert stack_heads([plan, dense_plan(plan.geometry)], [0, 0, 0, 0]) is plan
    with pytest.raises(SparsekitError, match="block_kv=32: a ranked plan stops by tiles of its own 64 keys"):
        plan.with_block_kv(32)
    with pytest.raises(SparsekitError, match="to_flex: a ranked plan stops while it is executed"):
        to_flex(plan)
    with pytest.raises(SparsekitError, match=r"plan\.ranked\.q_index is on meta, q on cpu"):
        attend(*inputs, plan.to("meta"), impl="torch")


def test_bytes_and_tensors() -> None:
    plan = plan_of(PATTERNS["everything"], peaked(G300), G300)
    assert plan.ranked is not None
    assert plan.nbytes == sum(t.nbytes for t in plan.ranked.tensors.values())
    assert {name.removeprefix("ranked.") for name in plan.tensors} == {"q_index", "keys", "key_ptr"}
    assert not plan.all_dense


def test_shuffling_keeps_the_set() -> None:
    plan = plan_of(PATTERNS["everything"], peaked(G300), G300)
    other = shuffled(plan)
    assert other.ranked is not None and plan.ranked is not None
    assert not torch.equal(other.ranked.keys, plan.ranked.keys)
    assert torch.equal(other.to_mask(), plan.to_mask())


# ---- the Triton kernel


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("attend/interpreted_ranked.py")


@pytest.mark.slow
def test_it_compiles(tmp_path: Path) -> None:
    """For cards that are not here: shared memory, matrix instructions, and loads ahead of the gathers."""
    made = compiled("attend/compile_ranked.py", tmp_path)
    ranking = {"_mean_queries", "_segment_scores", "_select", "_sort", "_list_bits"}
    assert {case["kernel"] for case in made} == {"_attend_ranked", *ranking}
    for case in made:
        assert case["shared"] <= case["limit"], case
        if case["kernel"] == "_attend_ranked":
            assert case["wgmma" if case["capability"] == 90 and case["block_q"] >= 64 else "mma"] > 0, case
            assert case["serialised"] == 0, case
            if case["dtype"] != "torch.float32" and case["dim"] <= 128:
                assert case["spilled"] <= 64, case
                assert case["ahead"] > 0, case
        elif case["dtype"] != "torch.float32" and case["dim"] <= 128:
            assert case["spilled"] <= 96, case  # the choice of keys has 80 registers a thread on sm_90
        if case["kernel"] == "_segment_scores":
            assert case["wgmma" if case["capability"] == 90 else "mma"] > 0 or case["dtype"] == "torch.float32", case
            assert case["serialised"] == 0, case

"""Every n-th query over all its keys, and the correction of the others by it: torch against the formula, the Triton
forms in the interpreter, and all of them on a card."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from children import interpret
from torch import Tensor

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.attend import torch_blocks
from sparsekit.kernels.attend.correct import anchor_queries
from sparsekit.kernels.choose import TABLE
from sparsekit.plan import BlockPlan, TokenRule, anchor_positions, dense_plan, plan_from_rule, stack_heads
from sparsekit.plan.flex import to_flex
from sparsekit.testing import GEOMETRIES, inputs_for

EVERY = (2, 7, 64, 500)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
every = pytest.mark.parametrize("every", EVERY)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("attend/interpreted_correct.py")


def _triangle(geometry: Geometry, window: int = 40) -> BlockPlan:
    return plan_from_rule([TokenRule(5, window, max(s.prompt_tokens - 20, 0)) for s in geometry.spans], geometry)


# ---- queries with a step


@every
@geometries
def test_anchors_are_rows_of_the_whole(geometry: Geometry, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row r is the first query of its block, in positions; what it attends is what it attends among all queries."""
    monkeypatch.setattr(torch_blocks, "DENSE_ROWS_AT_ONCE", 16)  # several stretches of rows
    anchors = geometry.anchors(every)
    q, k, v = inputs_for(geometry, dtype=torch.float64)
    dense = attend(q, k, v, dense_plan(geometry), impl="reference")
    some, expected = anchor_queries(q, anchors), anchor_queries(dense, anchors)  # type: ignore[arg-type]
    position = anchor_positions(anchors, geometry.batch)
    for b, span in enumerate(geometry.spans):
        firsts = {max(p // every * every, span.q_first) for p in range(span.q_first, span.q_end)}
        assert position[b][position[b] >= 0].tolist() == sorted(firsts)
        expected[b, :, len(firsts) :] = 0
        row = [p + geometry.kv_start[b] - geometry.q_offset for p in sorted(firsts)]
        assert torch.equal(some[b, :, : len(firsts)], q[b][:, row])
    plan = dense_plan(anchors)
    for impl in ("reference", "torch"):
        out, lse = attend(some, k, v, plan, impl=impl, return_lse=True)
        assert (out - expected).abs().max() < 1e-12
        assert (attend(some, k, v, plan, impl=impl) - expected).abs().max() < 1e-12
        assert torch.equal(lse.isfinite()[:, 0], position >= 0)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": SINKS}], ids=str)
def test_anchors_have_the_calls_softmax(options: dict[str, object]) -> None:
    geometry = GEOMETRIES[-1]
    q, k, v = inputs_for(geometry, dtype=torch.float64)
    some, plan = anchor_queries(q, geometry.anchors(7)), dense_plan(geometry.anchors(7))
    expected = attend(some, k, v, plan, impl="reference", **options)  # type: ignore[arg-type]
    assert (attend(some, k, v, plan, impl="torch", **options) - expected).abs().max() < 1e-12  # type: ignore[arg-type]


@every
@geometries
def test_counts_of_anchors_are_the_masks(geometry: Geometry, every: int) -> None:
    plan = dense_plan(geometry.anchors(every))
    assert plan.kept_pairs() == int(plan.multiplicity().sum())
    assert plan.density() == plan.tile_density() == 1


def test_only_a_dense_plan_has_a_step() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    plan = _triangle(geometry)
    with pytest.raises(SparsekitError, match="plan of every 64th query: only a dense one can be"):
        replace(plan, geometry=replace(geometry, q_step=64))
    q, k, v = inputs_for(geometry)
    anchors = geometry.anchors(64)
    some = anchor_queries(q, anchors)
    with pytest.raises(SparsekitError, match="plan of every 64th query: only a dense one can be"):
        sparsekit.attention(some, k, v, "triangle", geometry=anchors)
    dense = sparsekit.attention(q, k, v, "dense")
    got = sparsekit.attention(some, k, v, "dense", geometry=anchors)
    torch.testing.assert_close(got, dense[:, :, ::64])  # type: ignore[index]


# ---- the correction


def _corrected(plan: BlockPlan, sparse: Tensor, dense: Tensor, kept_all: Tensor) -> Tensor:
    """The formula, row by row. kept_all: bool (B, H, Q), rows that the plan makes dense."""
    g, out = plan.geometry, sparse.clone()
    for b, span in enumerate(g.spans):
        shift = g.kv_start[b] - g.q_offset
        for i in range(span.q_first, span.q_end):
            a = max(i // plan.correct_every * plan.correct_every, span.q_first)
            change = dense[b, :, a + shift] - sparse[b, :, a + shift]
            out[b, :, i + shift] += change.masked_fill(kept_all[b, :, i + shift, None], 0)
    return out


def _late(geometry: Geometry, heads: int) -> Tensor:
    """Of `_triangle`: the prompt's last 20 rows."""
    late = torch.zeros(geometry.batch, heads, geometry.q_len, dtype=torch.bool)
    for b, span in enumerate(geometry.spans):
        position = torch.arange(geometry.q_len) + geometry.q_offset - geometry.kv_start[b]
        late[b] = position >= span.prompt_tokens - 20
    return late


@every
@geometries
def test_outputs_are_corrected_by_the_formula(geometry: Geometry, every: int) -> None:
    q, k, v = inputs_for(geometry, dtype=torch.float64)
    plan = _triangle(geometry).corrected(every)
    sparse, dense = (attend(q, k, v, p, impl="reference") for p in (plan.corrected(0), dense_plan(geometry)))
    expected = sparse if plan.all_dense else _corrected(plan, sparse, dense, _late(geometry, 4))  # type: ignore[arg-type]
    for impl in ("reference", "torch"):
        assert (attend(q, k, v, plan, impl=impl) - expected).abs().max() < 1e-12
    into = torch.full((geometry.batch, 4, geometry.q_len, 16), torch.nan, dtype=torch.float64)
    assert attend(q, k, v, plan, out=into) is into
    assert (into - expected).abs().max() < 1e-12


@pytest.mark.parametrize("able", [True, False])
def test_a_form_may_correct_in_its_own_pass(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed the anchors' dense rows; what it cannot do is done after it, and nothing twice."""
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    q, k, v = inputs_for(geometry)
    plan = _triangle(geometry).corrected(64)
    expected = attend(q, k, v, plan)
    asked: list[Tensor] = []

    def own_pass(q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, dense: Tensor, out: Tensor | None) -> object:
        asked.append(dense)
        return torch.full_like(q, 7.0) if able else None

    table = sys.modules["sparsekit.kernels.choose"]  # the function of that name hides it
    monkeypatch.setattr(table, "TABLE", tuple(row._replace(corrected=own_pass) for row in TABLE))
    got = attend(q, k, v, _triangle(geometry).corrected(64))
    dense = attend(q, k, v, dense_plan(geometry))
    assert torch.equal(got, torch.full_like(q, 7.0) if able else expected)  # type: ignore[arg-type]
    torch.testing.assert_close(asked[0], dense[:, :, ::64])  # type: ignore[index]


def test_dense_heads_stay_dense() -> None:
    """In a layer of several patterns the rows of its dense heads are not touched, bit for bit."""
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    q, k, v = inputs_for(geometry)
    plan = stack_heads([_triangle(geometry).corrected(64), dense_plan(geometry)], (0, 1, 0, 1))
    assert plan.correct_every == 64
    bare = attend(q, k, v, plan.corrected(0))
    got = attend(q, k, v, plan)
    changed = (got != bare).any(-1)[0]
    assert not changed[1::2].any()
    assert not changed[::2, 280:].any()  # the last rows of the triangle
    assert changed[::2, 64:280].all()


def test_heads_are_corrected_alike() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    with pytest.raises(SparsekitError, match=r"correct_every \[0, 64\]: they must share it"):
        stack_heads([_triangle(geometry).corrected(64), _triangle(geometry, 50)], (0, 1, 0, 1))


def test_a_plan_that_is_dense_is_not_corrected() -> None:
    """Whoever made it: it keeps its log-sum-exp, counts no anchors, and is a BlockMask."""
    geometry = Geometry.of(300)
    dense = dense_plan(geometry)
    assert dense.corrected(64) is dense
    plan = BlockPlan(geometry, on_grid=True, correct_every=64)
    assert plan.anchors is None
    assert plan.density() == plan.tile_density() == 1
    q, k, v = inputs_for(geometry)
    got, expected = (attend(q, k, v, each, return_lse=True) for each in (plan, dense))
    assert all(map(torch.equal, got, expected))
    to_flex(plan)


def test_plans_of_one_geometry_share_their_anchors() -> None:
    """A dynamic pattern makes a plan in each layer; its anchors, with what is prepared for them, are made once."""
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    one, other = _triangle(geometry).corrected(64), _triangle(geometry, 50).corrected(64)
    assert one.anchors is other.anchors
    assert one.anchors is not one.corrected(32).anchors


def test_anchors_count_in_the_density() -> None:
    geometry = Geometry.of(300, batch=2, kv_start=(0, 70), block_q=64, block_kv=64)
    plan = _triangle(geometry).corrected(64)
    pairs = sum(p + 1 for n in (300, 230) for p in range(0, n, 64))
    assert plan.kept_pairs() == plan.corrected(0).kept_pairs() + pairs
    assert plan.visited_tiles() == plan.corrected(0).visited_tiles() + 5 + 4  # one row of anchors a sample
    assert plan.density() == plan.kept_pairs() / sum(n * (n + 1) // 2 for n in (300, 230))
    assert plan.totals().kept_pairs() == plan.kept_pairs()
    moved = plan.to("meta")
    assert moved.correct_every == 64


def test_a_corrected_output_has_no_lse() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    plan = _triangle(geometry).corrected(64)
    with pytest.raises(SparsekitError, match="return_lse: outputs that are corrected by every 64th row"):
        attend(*inputs_for(geometry), plan, return_lse=True)
    with pytest.raises(SparsekitError, match="to_flex: the plan's outputs are corrected afterwards"):
        to_flex(plan)
    with pytest.raises(SparsekitError, match="to_flex: the plan is of every 64th query"):
        to_flex(dense_plan(geometry.anchors(64)))


# ---- on a card


def _on_card(geometry: Geometry, dtype: torch.dtype, dim: int, heads: int = 8, key_heads: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def tensor(tokens: int, count: int) -> Tensor:
        return torch.randn(geometry.batch, tokens, count, dim, generator=g).to(dtype).cuda().transpose(1, 2)

    return [tensor(geometry.q_len, heads), tensor(geometry.kv_len, key_heads), tensor(geometry.kv_len, key_heads)]


CARD = [
    Geometry.of(1000, block_q=128, block_kv=128),
    Geometry.of(4500, block_q=128, block_kv=128),
    Geometry.of(700, 2300, q_offset=1450, block_q=128, block_kv=128),
    Geometry.of(1500, batch=3, kv_start=(0, 100, 1443), block_q=128, block_kv=128),
    Geometry.of(1500, batch=3, kv_end=(1500, 100, 777), block_q=128, block_kv=128),
]


def _near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert got.isfinite().all()
    error = (got.double().cpu() - expected).norm() / expected.norm()
    assert float(error) < limit, float(error)


@pytest.mark.gpu
@pytest.mark.parametrize("step", [2, 16, 64, 100])
@pytest.mark.parametrize("geometry", CARD, ids=str)
@pytest.mark.parametrize(
    ("impl", "dim", "dtype", "sinks"),
    [
        ("hopper", 128, torch.bfloat16, False),
        ("hopper", 64, torch.float16, True),
        ("hopper", 256, torch.bfloat16, False),
        ("triton", 128, torch.bfloat16, True),
        ("triton", 96, torch.float16, False),
        ("triton", 64, torch.float32, False),
    ],
)
def test_card_anchors(impl: str, dim: int, dtype: torch.dtype, sinks: bool, geometry: Geometry, step: int) -> None:
    q, k, v = _on_card(geometry, dtype, dim)
    anchors = geometry.anchors(step)
    some, plan = anchor_queries(q, anchors), dense_plan(anchors)
    logits = torch.arange(8, device="cuda") / 4 if sinks else None
    own = None if logits is None else logits.cpu()
    expected, expected_lse = attend(
        *(x.double().cpu() for x in (some, k, v)), plan, sink_logits=own, impl="reference", return_lse=True
    )
    out, lse = attend(some, k, v, plan, sink_logits=logits, impl=impl, return_lse=True)
    again, _ = attend(some, k, v, plan, sink_logits=logits, impl=impl, return_lse=True)
    assert torch.equal(out, again)
    _near(out, expected, dtype)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite().cpu(), seen)
    assert float((lse.double().cpu() - expected_lse)[seen].abs().max()) < 2e-3
    assert not out.cpu().transpose(1, 2)[~seen.transpose(1, 2)].any()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (12, 2)])
def test_card_long_anchors_are_cut_over_keys(heads: tuple[int, int]) -> None:
    """Few heads: the anchors are a handful of rows over many keys."""
    geometry = Geometry.of(20000, block_q=128, block_kv=128)
    q, k, v = _on_card(geometry, torch.bfloat16, 128, *heads)
    some, plan = anchor_queries(q, geometry.anchors(64)), dense_plan(geometry.anchors(64))
    expected = attend(*(x.double().cpu() for x in (some, k, v)), plan, impl="reference")
    _near(attend(some, k, v, plan, impl="hopper"), expected, torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("step", [16, 64, 100, 256])
@pytest.mark.parametrize("geometry", CARD, ids=str)
@pytest.mark.parametrize(("impl", "dim"), [("hopper", 128), ("hopper", 64), ("triton", 128), ("triton", 80)])
def test_card_correction(impl: str, dim: int, geometry: Geometry, step: int) -> None:
    q, k, v = _on_card(geometry, torch.bfloat16, dim)
    plan = _triangle(geometry, 200).corrected(step)
    expected = attend(*(x.double().cpu() for x in (q, k, v)), plan, impl="reference")
    got = attend(q, k, v, plan.to("cuda"), impl=impl)
    _near(got, expected, torch.bfloat16)  # type: ignore[arg-type]
    into = torch.full_like(q, torch.nan).transpose(1, 2).contiguous().transpose(1, 2)
    attend(q, k, v, plan.to("cuda"), impl=impl, out=into)
    assert torch.equal(into, got)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_card_dense_heads_stay_dense() -> None:
    geometry = Geometry.of(3000, block_q=128, block_kv=128)
    q, k, v = _on_card(geometry, torch.bfloat16, 128)
    parts = [_triangle(geometry, 200).to("cuda").corrected(64), dense_plan(geometry)]
    plan = stack_heads(parts, (0, 1, 0, 1, 0, 0, 1, 1))
    got, bare = attend(q, k, v, plan), attend(q, k, v, plan.corrected(0))
    same = (got == bare).all(-1)[0].cpu()  # type: ignore[union-attr]
    assert same[[1, 3, 6, 7]].all()
    assert not same[[0, 2, 4, 5], 256:2980].all(-1).any()


@pytest.mark.gpu
def test_card_correction_in_pages_and_without_a_wait() -> None:
    geometry = Geometry.of(700, 2300, q_offset=1600, block_q=128, block_kv=128)
    q, k, v = _on_card(geometry, torch.bfloat16, 128)
    plan = _triangle(geometry, 200).to("cuda").corrected(64)
    expected = attend(q, k, v, plan)
    count = -(-2300 // 16)
    place = torch.randperm(count + 3)[:count]
    pages = torch.full((count + 3, 16, 2, 256), torch.nan, dtype=torch.bfloat16, device="cuda")
    joint = torch.nn.functional.pad(torch.cat([k, v], -1)[0].transpose(0, 1), (0, 0, 0, 0, 0, count * 16 - 2300))
    pages[place] = joint.unflatten(0, (count, 16))
    keys = Keys(*pages.transpose(1, 2).split(128, -1), place.int().cuda()[None])
    warm = attend(q, keys.k, keys.v, plan, table=keys.table)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attend(q, keys.k, keys.v, plan, table=keys.table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, warm)  # type: ignore[arg-type]
    assert float((got.double() - expected.double()).norm() / expected.double().norm()) < 1e-2  # type: ignore[union-attr]

"""s2o: equal to dense without a stop, its ranking by loops, what tau does, padding, chunks, bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from ranked_cases import history_of, peaked, plan_of, shuffled, unvisited
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekit import SparsekitError, attention
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.kernels.select import ranking
from sparsekit.kernels.select.segments import segments_of, turns_of
from sparsekit.patterns import S2O, parse_pattern, s2o
from sparsekit.plan import BlockPlan


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _run(plan: BlockPlan, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    out = attend(*inputs, plan)
    assert isinstance(out, Tensor)
    return out


# ---- nothing is lost where nothing stops


@pytest.mark.parametrize("guide", ["none", "mean", "last"])
@pytest.mark.parametrize("segment", [64, 65, 100, 128, 200, 256, 512, 699, 700])
@pytest.mark.parametrize("chunk", [700, 130])
def test_tau_0_is_dense_for_every_segment(segment: int, guide: str, chunk: int) -> None:
    geometry = Geometry.of(chunk, 700, block_q=64)
    q, k, v = peaked(Geometry.of(700))
    inputs = (q[:, :, -chunk:], k, v)
    plan = plan_of(S2O(segment_tokens=segment, tau=0.0, max_tokens=None, guide=guide), inputs, geometry)  # type: ignore[arg-type]
    assert (plan.ranked is None) == (segment == 700)
    assert (_run(plan, inputs) - _dense(*inputs)).abs().max() < 1e-5
    assert plan.density() == 1
    assert bool((plan.multiplicity() == torch.ones(chunk, 700).tril(700 - chunk)).all())


def test_tau_0_is_dense_in_any_order_of_the_history() -> None:
    geometry = Geometry.of(500, block_q=64)
    inputs = peaked(geometry)
    plan = plan_of(S2O(segment_tokens=100, tau=0.0, max_tokens=None), inputs, geometry)
    for seed in range(3):
        other = shuffled(plan, seed)
        assert (_run(other, inputs) - _dense(*inputs)).abs().max() < 1e-5
        assert other.density() == 1


def test_tau_0_in_bfloat16() -> None:
    q, k, v = peaked(Geometry.of(500), torch.bfloat16)
    out = attention(q, k, v, S2O(segment_tokens=128, tau=0.0, max_tokens=None))
    assert isinstance(out, Tensor)
    assert (out.float() - _dense(q.float(), k.float(), v.float())).abs().max() < 2e-2


def test_a_cap_of_everything_is_no_cap() -> None:
    geometry = Geometry.of(500, block_q=64)
    inputs = peaked(geometry)
    plan = plan_of(S2O(segment_tokens=64, tau=0.0, max_tokens=500), inputs, geometry)
    assert torch.equal(_run(plan, inputs), attention(*inputs, S2O(segment_tokens=64, tau=0.0, max_tokens=None)))


@pytest.mark.parametrize("patience", [1, 2])
def test_density_falls_with_tau(patience: int) -> None:
    """For every query tile, hence for the plan."""
    geometry = Geometry.of(1000, block_q=64)
    inputs = peaked(geometry)
    before, densities, errors = None, [], []
    for tau in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        plan = plan_of(S2O(segment_tokens=128, tau=tau, patience=patience), inputs, geometry)
        assert plan.ranked is not None
        errors.append(float((_run(plan, inputs) - _dense(*inputs)).norm()))
        assert before is None or bool((plan.visited <= before).all())
        before = plan.visited
        densities.append(plan.density())
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 4
    assert errors == sorted(errors)
    listed = -(-plan.ranked.key_ptr.diff()[:, None, :, None] // 64)  # tau 1 stops at once: no gain is 1
    assert torch.equal(before, listed.clamp(max=patience).expand_as(before).int())


def test_patience_waits() -> None:
    geometry = Geometry.of(1000, block_q=64)
    inputs = peaked(geometry)
    visited = []
    for patience in (1, 2, 3):
        plan = plan_of(S2O(segment_tokens=128, tau=0.1, patience=patience), inputs, geometry)
        _run(plan, inputs)
        assert plan.ranked is not None
        visited.append(plan.visited)
    listed = -(-plan.ranked.key_ptr.diff()[:, None, :, None] // 64)
    for less, more in pairwise(visited):
        assert bool((more >= torch.minimum(less + 1, listed)).all())


# ---- the ranking, by loops


@pytest.mark.parametrize("cap", [None, 50, 200])
@pytest.mark.parametrize("guide", ["none", "mean", "last"])
def test_order_by_loops(guide: str, cap: int | None) -> None:
    geometry = Geometry.of(250, 400, block_q=64)
    q, k, v = peaked(geometry)
    plan = plan_of(S2O(segment_tokens=100, guide=guide, max_tokens=cap), (q, k, v), geometry)  # type: ignore[arg-type]
    assert plan.ranked is not None
    for segment in range(3):  # of 100 to 400; the first one's queries begin at 150
        low = max(100 + 100 * segment, 150)
        for h in range(4):
            rows = q[0, h, low - 150 : 200 + 100 * segment - 150]
            first, keys = history_of(plan, 0, h, segment)
            assert first == 100 + 100 * segment
            score = k[0, h // 2] @ rows.mean(0)
            expected = sorted(range(64, first), key=lambda j: -float(score[j]))
            assert keys == expected[: len(expected) if cap is None else cap]
            likeness = rows @ (rows.mean(0) if guide == "mean" else rows[-1])
            order = sorted(range(len(rows)), key=lambda i: -float(likeness[i]))
            order = list(range(len(rows))) if guide == "none" else order
            places = plan.ranked.q_index[0, h, segment].tolist()
            assert places == [low + i for i in order] + [-1] * (128 - len(rows))


def test_ties_go_to_the_earlier_key() -> None:
    geometry = Geometry.of(400, block_q=64)
    q, k, v = peaked(geometry)
    k[:] = k[:, :, :1]
    for cap in (None, 100):
        plan = plan_of(S2O(segment_tokens=128, tau=0.2, max_tokens=cap), (q, k, v), geometry)
        for segment in range(4):
            first, keys = history_of(plan, 0, 1, segment)
            assert keys == list(range(64, first))[:cap]
        _run(plan, (q, k, v))
        assert 0 < plan.density() <= 1


def test_groups_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored at once is bounded, and decides nothing."""
    geometry = Geometry.of(900, batch=2, kv_start=(0, 333), block_q=64)
    inputs = peaked(geometry)
    for pattern in (S2O(segment_tokens=64, max_tokens=200, guide="last"), S2O(segment_tokens=70, max_tokens=None)):
        plan = plan_of(pattern, inputs, geometry)
        for scratch in (1, 20_000, 60_000):
            monkeypatch.setattr(ranking, "SCRATCH_BYTES", scratch)
            other = plan_of(pattern, inputs, geometry)
            for name in ("q_index", "keys", "key_ptr"):
                assert torch.equal(plan.tensors[f"ranked.{name}"], other.tensors[f"ranked.{name}"]), name
        monkeypatch.undo()


def test_groups_fit_the_scratch() -> None:
    tokens, segment, heads = 131072, 512, 32
    firsts = [[i, i, i + segment] for i in range(0, tokens, segment)]
    for cap in (4096, tokens):
        counts = torch.tensor([min(max(row[0] - 64, 0), cap) for row in firsts])
        ptr = [0, *counts.cumsum(0).tolist()]
        seen: list[int] = []
        for a, b, most in ranking._groups(firsts, ptr, heads):
            assert most == max(counts[a:b].tolist())
            assert heads * (b - a) * firsts[b - 1][0] * 4 <= ranking.SCRATCH_BYTES
            assert len({int(counts[i]) < firsts[i][0] - 64 for i in range(a, b)}) == 1
            seen += range(a, b)
        assert seen == list(range(1, 256))


@pytest.mark.parametrize("limit", [1 << 22, 1 << 26, 1 << 28])
def test_turns_fit_the_limit(limit: int) -> None:
    """Of the Triton path: every segment with a list is in one turn, in a row wide enough."""
    for geometry in (Geometry.of(131072), Geometry.of(5000, 20000, batch=2, kv_start=(0, 19000))):
        segments = segments_of(geometry, 512, 4096, torch.device("cpu"))
        seen: list[int] = []
        for a, b, width in turns_of(geometry, 512, 32, 128, 1000, limit):
            ends = [rows[i][0] for rows in segments.rows for i in range(a, b) if rows[i][1] < rows[i][2]]
            assert 0 <= width - 1000 - (max(ends) - 64) < 128
            assert (width - 1000) % 128 == 0
            assert b - a == 1 or geometry.batch * 32 * (b - a) * width <= limit
            seen += range(a, b)
        lists = [any(p[i + 1] > p[i] for p in segments.ptr) for i in range(len(segments.rows[0]))]
        assert seen == [i for i, some in enumerate(lists) if some]


# ---- samples and chunks


def test_a_padded_sample_is_what_it_is_alone() -> None:
    geometry = Geometry.of(500, batch=2, kv_start=(0, 171), block_q=64)
    q, k, v = peaked(geometry)
    pattern = S2O(segment_tokens=64, tau=0.1, guide="mean")
    plan = plan_of(pattern, (q, k, v), geometry)
    out = _run(plan, (q, k, v))
    alone = Geometry.of(329, block_q=64)
    own = tuple(x[1:, :, 171:] for x in (q, k, v))
    other = plan_of(pattern, own, alone)  # type: ignore[arg-type]
    assert (_run(other, own) - out[1:, :, 171:]).abs().max() < 1e-6  # type: ignore[arg-type]
    assert other.visited is not None and plan.visited is not None
    assert torch.equal(plan.visited[1, :, :6], other.visited[0])
    assert bool((out[1, :, :171] == 0).all())


def test_chunks_of_whole_segments_are_the_whole() -> None:
    """History includes the keys of earlier chunks, and segments count from the prompt's start."""
    q, k, v = peaked(Geometry.of(512))
    pattern = S2O(segment_tokens=128, tau=0.1)
    whole = attention(q, k, v, pattern)
    assert isinstance(whole, Tensor)
    for first in (0, 128, 256):
        last = first + 256
        part = attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last], pattern)
        assert (part - whole[:, :, first:last]).abs().max() < 1e-6  # type: ignore[operator]


def test_prompts_within_a_segment_are_dense() -> None:
    for tokens in (1, 63, 512):
        inputs = peaked(Geometry.of(tokens))
        plan = plan_of(S2O(), inputs, Geometry.of(tokens))
        assert plan.all_dense
    assert not plan_of(S2O(), peaked(Geometry.of(513)), Geometry.of(513)).all_dense


def test_the_cap_bounds_what_is_kept() -> None:
    geometry = Geometry.of(1000, block_q=64)
    plan = plan_of(S2O(segment_tokens=100, tau=0.0, max_tokens=70), peaked(geometry), geometry)
    kept = plan.to_mask()[0].sum(-1)
    row = torch.arange(1000)
    history = row // 100 * 100
    assert torch.equal(kept, (row - history + 1 + history.clamp(max=134)).expand(4, -1))


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": -0.001}, r"s2o: tau = -0.001: it should be greater than or equal to 0\."),
        ({"tau": 1.5}, r"s2o: tau = 1.5: it should be less than or equal to 1\."),
        ({"tau": float("nan")}, "s2o: tau = nan: it should be"),
        ({"segment_tokens": 63}, r"s2o: segment_tokens = 63: it should be greater than or equal to 64\."),
        ({"max_tokens": 0}, r"s2o: max_tokens = 0: it should be greater than or equal to 1\."),
        ({"patience": 0}, r"s2o: patience = 0: it should be greater than or equal to 1\."),
        ({"guide": "median"}, r"s2o: guide = 'median': it should be 'mean', 'last' or 'none'\."),
        ({"segment": 512}, r"s2o: unknown field 'segment' = 512; .*Did you mean 'segment_tokens'\?"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        parse_pattern({"name": "s2o", **fields})


def test_more_keys_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s2o, "RANKED_BYTES", 10_000)
    geometry = Geometry.of(400)
    inputs = peaked(geometry)
    with pytest.raises(SparsekitError, match=r"max_tokens=None and segment_tokens=64 rank 0\.0 GiB of keys for 1 x"):
        plan_of(S2O(segment_tokens=64, max_tokens=None), inputs, geometry)
    plan_of(S2O(segment_tokens=64, max_tokens=64), inputs, geometry)


def test_a_million_tokens_fit() -> None:
    """The default's ranked keys at 1M tokens and 32 heads, by what the pattern counts before it allocates."""
    geometry = Geometry.of(1 << 20)
    pattern = S2O()
    room = segments_of(geometry, pattern.segment_tokens, pattern.max_tokens, torch.device("cpu")).room
    assert 32 * room * 4 < 1.1 * 2**30
    pattern._check_room(32 * room * 4, geometry)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    """The plan stays valid; rows that never meet the value stay what they were."""
    geometry = Geometry.of(400, block_q=64)
    q, k, v = peaked(geometry)
    expected = attention(q, k, v, S2O(segment_tokens=64, tau=0.0, max_tokens=None))
    (q if where == "q" else k)[0, 0, 250, 3] = value
    for cap in (None, 90):
        plan = plan_of(S2O(segment_tokens=64, tau=0.1, max_tokens=cap, guide="mean"), (q, k, v), geometry)
        for segment in range(7):
            for head in range(4):
                first, keys = history_of(plan, 0, head, segment)
                assert len(set(keys)) == len(keys)
                assert all(64 <= key < first for key in keys)
        out = _run(plan, (q, k, v))
        often = plan.multiplicity()
        assert int(often.max()) == 1
        assert bool(often.diagonal(dim1=-2, dim2=-1).all())
        assert not bool(often.triu(1).any())
        assert bool(out[0, :, :250].isfinite().all())
    exact = unvisited(plan_of(S2O(segment_tokens=64, tau=0.0, max_tokens=None), (q, k, v), geometry))
    assert (_run(exact, (q, k, v))[:, :, :192] - expected[:, :, :192]).abs().max() < 1e-5  # type: ignore[index]


def test_all_mass_on_one_key() -> None:
    """It is in the first ranked tile; the second adds nothing and ends the walk."""
    geometry = Geometry.of(600, block_q=64)
    q, k, v = peaked(geometry)
    q[..., 1], k[..., 1] = 10.0, 0.0
    k[:, :, 100, 1] = 10.0
    plan = plan_of(S2O(segment_tokens=128), (q, k, v), geometry)
    out = _run(plan, (q, k, v))
    assert plan.ranked is not None
    assert plan.visited[0, 0, :, 0].tolist() == [0, 1, 2, 2, 2]  # segment 1 has 64 ranked keys
    assert (out[:, :, 128:] - v.repeat_interleave(2, 1)[:, :, 100:101]).abs().max() < 1e-3

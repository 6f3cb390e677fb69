"""vertical_slash: what it chooses and what its tiles hold, by loops; forced sets; padding, chunks, bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit import SparsekitError, attention
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.slash import plan_from_vertical_slash
from sparsekit.patterns import VerticalSlash, parse_pattern
from sparsekit.plan import BlockPlan, causal_tiles
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

CASES = {
    "whole": Geometry.of(700, block_q=128, block_kv=64),
    "off the grid": Geometry.of(333, block_q=64, block_kv=32),
    "chunk": Geometry.of(301, 700, block_q=128, block_kv=64),
    "chunk of a static cache": Geometry.of(200, 800, q_offset=430, block_q=64, block_kv=64),
    "left padding": Geometry.of(500, batch=3, kv_start=(0, 137, 450), block_q=128, block_kv=64),
    "right padding": Geometry.of(500, batch=3, kv_end=(500, 137, 380), block_q=64, block_kv=64),
    "batch of equals": Geometry.of(400, batch=2, block_q=128, block_kv=128),
}


def _select(pattern: VerticalSlash, geometry: Geometry, q: Tensor, k: Tensor, **softmax: object) -> BlockPlan:
    return pattern.select(q, k, geometry, Softmax(q.shape[-1] ** -0.5, **softmax))  # type: ignore[arg-type]


def _best(scores: Tensor, count: int, forced: int) -> list[int]:
    """The `count` largest, the first `forced` before all others; ties to the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (i >= forced, -float(scores[i]), i))
    return sorted(order[:count])


def _chosen(
    pattern: VerticalSlash, geometry: Geometry, q: Tensor, k: Tensor, b: int, head: int
) -> tuple[list[int], list[int]]:
    """Columns and distances of one head, from the definition."""
    span, key = geometry.spans[b], geometry.kv_start[b]
    n = min(pattern.estimate_queries, span.q_end - span.q_first)
    at = geometry.q_index(b, span.q_end - n)
    keys = k[b, head // (q.shape[1] // k.shape[1]), key : key + span.q_end]
    column, distance = torch.zeros(span.q_end), torch.zeros(span.q_end)
    for r in range(n):
        i = span.q_end - n + r
        weights = torch.softmax(keys[: i + 1] @ q[b, head, at + r] * q.shape[-1] ** -0.5, 0)
        column[: i + 1] += weights
        distance[: i + 1] += weights.flip(0)
    columns = max(pattern.vertical_tokens, 30)
    slashes = max(pattern.slash_tokens, 100)
    return _best(column, columns, 30), _best(distance, slashes, 100)


def _mask_of(
    columns: list[int], distances: list[int], geometry: Geometry, b: int, block_kv: int
) -> tuple[Tensor, list[list[int]]]:
    """bool (queries, keys) of one head, and each row's tiles: by loops over queries, distances and keys."""
    span, block_q = geometry.spans[b], geometry.block_q
    mask = torch.zeros(span.q_end - span.q_first, span.keys, dtype=torch.bool)
    rows = []
    for start in range(span.q_first // block_q * block_q, span.q_end, block_q):
        low, high = max(start, span.q_first), min(start + block_q, span.q_end)
        touched = torch.zeros(high, dtype=torch.bool)
        for d in distances:
            touched[max(low - d, 0) : max(high - d, 0)] = True
        tiles, key = [], 0
        while key < high:
            if touched[key]:
                tiles.append(key)
                key += block_kv
            else:
                key += 1
        for i in range(low, high):
            for j in tiles:
                mask[i - span.q_first, j : min(j + block_kv, i + 1)] = True
            mask[i - span.q_first, [j for j in columns if j <= i]] = True
        rows.append(tiles)
    return mask, rows


def _tiles(plan: BlockPlan, sample: int, head: int) -> list[list[int]]:
    assert plan.row_ptr is not None and plan.entries is not None
    first = (sample * plan.heads + head) * plan.rows
    pointers = plan.row_ptr[first : first + plan.rows + 1].tolist()
    return [(plan.entries[a:b] >> 2).tolist() for a, b in pairwise(pointers)]


def _inner(plan: BlockPlan, b: int) -> Tensor:
    g, span = plan.geometry, plan.geometry.spans[b]
    at = g.q_index(b, span.q_first)
    return plan.to_mask()[b, :, at : at + span.q_end - span.q_first, g.kv_start[b] : g.kv_start[b] + span.keys]


@pytest.mark.parametrize("name", CASES)
def test_the_mask_is_the_columns_and_the_tiles_that_diagonals_touch(name: str) -> None:
    geometry = CASES[name]
    q, k, _ = inputs_for(geometry)
    pattern = VerticalSlash(vertical_tokens=41, slash_tokens=107, estimate_queries=50)
    plan = _select(pattern, geometry, q * 3, k)
    assert plan.samples == geometry.batch
    assert plan.heads == 4
    assert int(plan.multiplicity().max()) == 1
    assert plan.order is not None
    for b in range(geometry.batch):
        inner = _inner(plan, b)
        for head in range(4):
            columns, distances = _chosen(pattern, geometry, q * 3, k, b, head)
            expected, tiles = _mask_of(columns, distances, geometry, b, plan.block_kv)
            assert torch.equal(inner[head], expected)
            assert _tiles(plan, b, head)[: len(tiles)] == tiles
            assert not any(_tiles(plan, b, head)[len(tiles) :])


@given(
    tokens=st.integers(1, 400),
    first=st.integers(0, 300),
    block_q=st.sampled_from([16, 64, 128]),
    block_kv=st.sampled_from([16, 32, 64, 128]),
    columns=st.integers(0, 60),
    slashes=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_builder_against_loops(
    tokens: int, first: int, block_q: int, block_kv: int, columns: int, slashes: int, seed: int
) -> None:
    """Any columns and distances, tiles of any width: the tiles, their flags, the columns that no tile holds."""
    first = min(first, tokens - 1)
    geometry = Geometry.of(tokens - first, tokens, block_q=block_q, block_kv=block_kv)
    g = torch.Generator().manual_seed(seed)
    picked = [torch.randperm(tokens, generator=g)[:count].tolist() for count in (columns, slashes)]
    picked[1] = sorted({0, *picked[1]})
    chosen = torch.zeros(2, 1, 1, tokens, dtype=torch.bool)
    for kind in range(2):
        chosen[kind, 0, 0, picked[kind]] = True
    plan = plan_from_vertical_slash(pack_bits(chosen), geometry, max(columns, 1), slashes + 1, block_kv)
    expected, tiles = _mask_of(sorted(picked[0]), picked[1], geometry, 0, block_kv)
    assert torch.equal(_inner(plan, 0)[0], expected)
    assert int(plan.multiplicity().max()) == 1
    assert _tiles(plan, 0, 0) == tiles
    assert plan.kept_pairs() == int(expected.sum())
    flags = iter((plan.entries & 3).tolist())  # type: ignore[operator]
    for r, row in enumerate(tiles):
        low = max((first // block_q + r) * block_q, first)
        assert [next(flags) for _ in row] == [int(key + block_kv - 1 > low) for key in row]


def test_a_missing_diagonal_is_an_error() -> None:
    chosen = torch.zeros(2, 1, 2, 300, dtype=torch.bool)
    chosen[1, 0, :, 1:] = True
    with pytest.raises(SparsekitError, match="distance 0 is missing"):
        plan_from_vertical_slash(pack_bits(chosen), Geometry.of(300), 1, 300, 64)
    with pytest.raises(SparsekitError, match=r"bits \(2, 1, 2, 5\).*10 words"):
        plan_from_vertical_slash(pack_bits(chosen)[..., :5].contiguous(), Geometry.of(300), 1, 300, 64)


@pytest.mark.parametrize("tokens", [131, 200, 333])
def test_forced_columns_and_distances(tokens: int) -> None:
    """Columns 0..29 and distances 0..99, whatever they score, and however small the budgets are."""
    geometry = Geometry.of(tokens, block_q=16, block_kv=16)
    q, k, _ = inputs_for(geometry)
    k[:, :, :30] = -5 * q.mean(2, keepdim=True)[:, ::2]
    mask = _select(VerticalSlash(vertical_tokens=1, slash_tokens=1), geometry, q, k).to_mask()[0]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    forced = (j <= i) & ((j < 30) | (i - j < 100))
    assert bool((mask | ~forced).all())
    touched = (j <= i) & ((j < 30) | (j >= i // 16 * 16 - 99))
    assert not bool((mask & ~touched).any())  # and nothing else, but for whole tiles
    more = _select(VerticalSlash(vertical_tokens=50, slash_tokens=120), geometry, q, k).to_mask()[0]
    assert bool((more | ~mask).all())


@pytest.mark.parametrize("tokens", [1, 29, 63, 64, 65, 100])
def test_prompts_no_longer_than_what_is_forced_are_dense(tokens: int) -> None:
    geometry = Geometry.of(tokens)
    q, k, _ = inputs_for(geometry)
    assert _select(VerticalSlash(vertical_tokens=1, slash_tokens=1), geometry, q, k).density() == 1


@pytest.mark.parametrize("budget", [{"vertical_tokens": 400}, {"slash_tokens": 400}, {"slash_tokens": 1 << 30}])
def test_a_full_budget_is_dense(budget: dict[str, int]) -> None:
    geometry = Geometry.of(400)
    q, k, v = inputs_for(geometry)
    pattern = VerticalSlash(**{"vertical_tokens": 30, "slash_tokens": 100, **budget})
    assert _select(pattern, geometry, q, k).all_dense
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = [t.to(dtype) for t in (q, k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
        assert (attention(*x, pattern) - exact).abs().max() <= most  # type: ignore[arg-type, operator]


def test_a_sample_whose_every_distance_is_kept_is_dense() -> None:
    """The budget covers the short sample, and not the long one."""
    geometry = Geometry.of(800, batch=2, kv_start=(0, 680), block_q=16, block_kv=16)
    q, k, _ = inputs_for(geometry)
    plan = _select(VerticalSlash(vertical_tokens=30, slash_tokens=120), geometry, q, k)
    inner = _inner(plan, 1)
    assert torch.equal(inner, torch.ones_like(inner).tril())
    assert not bool(_inner(plan, 0)[:, -1].all())


def test_a_padded_sample_means_the_same_as_alone() -> None:
    pattern = VerticalSlash(vertical_tokens=40, slash_tokens=110)
    geometry = Geometry.of(500, batch=2, kv_start=(0, 100), kv_end=(500, 460), block_q=64)
    q, k, _ = inputs_for(geometry)
    both = _select(pattern, geometry, q, k)
    alone = _select(pattern, Geometry.of(360, block_q=64), q[1:, :, 100:460], k[1:, :, 100:460])
    assert torch.equal(_inner(both, 1), alone.to_mask()[0])


def test_rows_that_do_not_fit_run_dense() -> None:
    geometry = Geometry.of(600, block_q=64, block_kv=64)
    chosen = torch.zeros(2, 1, 2, 600, dtype=torch.bool)
    chosen[0, ..., 100::90] = True
    chosen[1, ..., :20] = True
    chosen[1, 0, 1, ::70] = True
    bits = pack_bits(chosen)
    whole = plan_from_vertical_slash(bits, geometry, 8, 40, 64)
    tight = plan_from_vertical_slash(bits, geometry, 8, 40, 64, capacity=30)
    assert whole.dense_rows is None
    assert tight.dense_rows is not None and tight.row_ptr is not None
    assert 0 < int(tight.dense_rows.sum()) < 20
    assert int(tight.row_ptr[-1]) <= 30
    assert int(tight.multiplicity().max()) == 1
    kept, before = tight.to_mask()[0], whole.to_mask()[0]
    dense = tight.dense_rows.view(2, 10).repeat_interleave(64, 1)[:, :600]
    causal = torch.ones(600, 600, dtype=torch.bool).tril()
    assert torch.equal(kept, torch.where(dense[..., None], causal, before))
    assert tight.kept_pairs() == int(kept.sum())
    with pytest.raises(SparsekitError, match="capacity=-1"):
        plan_from_vertical_slash(bits, geometry, 8, 40, 64, capacity=-1)


@pytest.mark.parametrize(("block_q", "small", "fits"), [(64, 1 << 23, True), (64, 0, False), (128, 0, True)])
def test_narrow_rows_have_room_for_half(block_q: int, small: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts in rows of 64 queries: what lists more than half of what it might runs dense, the densest first."""
    monkeypatch.setattr("sparsekit.kernels.select.slash.SMALL", small)
    geometry = Geometry.of(1000, block_q=block_q, block_kv=64)
    chosen = torch.zeros(2, 1, 2, 1024, dtype=torch.bool)
    chosen[1, 0, 0, :1000:64] = True  # all tiles
    chosen[1, 0, 1, :1000:256] = True
    plan = plan_from_vertical_slash(pack_bits(chosen), geometry, 8, 40, 64)
    assert plan.row_ptr is not None
    causal = 2 * int(causal_tiles(plan.geometry, 1).sum())
    if fits:
        assert plan.dense_rows is None
        assert int(plan.row_ptr[-1]) > causal / 2
    else:
        assert plan.dense_rows is not None
        dense = plan.dense_rows.view(2, -1).sum(1)
        assert int(dense[0]) > int(dense[1])
        assert int(plan.row_ptr[-1]) <= causal / 2


def test_ties_go_to_the_lower_index() -> None:
    """Keys all alike: every query spreads evenly, so the first columns and the nearest distances are as good as any."""
    geometry = Geometry.of(640, block_q=64, block_kv=16)
    q, k = torch.ones(1, 2, 640, 16), torch.ones(1, 1, 640, 16)
    plan = _select(VerticalSlash(vertical_tokens=77, slash_tokens=150), geometry, q, k)
    assert plan.tokens is not None
    assert plan.tokens[0].tolist() == [list(range(77))] * 2
    expected, _ = _mask_of(list(range(77)), list(range(150)), geometry, 0, 16)
    assert torch.equal(plan.to_mask()[0], expected.expand(2, -1, -1))


def test_all_mass_on_one_key() -> None:
    geometry = Geometry.of(500, block_q=64, block_kv=64)
    q, k = torch.ones(1, 2, 500, 16), torch.zeros(1, 1, 500, 16)
    k[:, :, 333] = 100.0
    plan = _select(VerticalSlash(vertical_tokens=31, slash_tokens=101), geometry, q, k)
    assert plan.tokens is not None
    assert plan.tokens[0].tolist() == [[*range(30), 333]] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["one query", "one key", "all"])
def test_nan_and_inf_leave_a_valid_plan(where: str, value: float) -> None:
    geometry = Geometry.of(400, block_q=64)
    q, k, _ = inputs_for(geometry)
    if where == "one query":
        q[0, 1, 390] = value
    elif where == "one key":
        k[0, 0, 200] = value
    else:
        q[:], k[:] = value, value
    plan = _select(VerticalSlash(vertical_tokens=40, slash_tokens=120), geometry, q, k)
    mask, often = plan.to_mask()[0], plan.multiplicity()
    i, j = torch.arange(400)[:, None], torch.arange(400)[None]
    assert int(often.max()) == 1
    assert not bool((mask & (j > i)).any())
    assert bool((mask | ~((j <= i) & ((j < 30) | (i - j < 100)))).all())


def test_softmax_options_reach_the_estimate() -> None:
    geometry = Geometry.of(400, block_q=64)
    q, k, _ = inputs_for(geometry)
    pattern = VerticalSlash(vertical_tokens=60, slash_tokens=130)
    plain = _select(pattern, geometry, 4 * q, k).to_mask()
    capped = _select(pattern, geometry, 4 * q, k, softcap=0.5).to_mask()
    assert not torch.equal(plain, capped)
    sinks = torch.tensor([0.0, 5.0, -5.0, 1.0])
    assert _select(pattern, geometry, 4 * q, k, sink_logits=sinks).density() < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vertical_tokens": 0}, r"vertical_slash: vertical_tokens = 0: .*greater than or equal to 1"),
        ({"slash_tokens": 0}, r"slash_tokens = 0"),
        ({"estimate_queries": 0}, r"estimate_queries = 0"),
        ({"estimate_queries": 129}, r"estimate_queries = 129: .*less than or equal to 128"),
        ({"slash_token": 5}, r"Did you mean 'slash_tokens'\?"),
    ],
)
def test_refusals(fields: dict[str, int], message: str) -> None:
    with pytest.raises(SparsekitError, match=message) as caught:
        parse_pattern({"name": "vertical_slash", **fields})
    assert "\n" not in str(caught.value)


def test_contract_on_longer_prompts() -> None:
    check_pattern(VerticalSlash(vertical_tokens=30, slash_tokens=110, estimate_queries=30), [*CASES.values()])
    check_pattern(VerticalSlash(), GEOMETRIES[:5])

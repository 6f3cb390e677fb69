"""flexprefill: budgets, divergence and both branches, by sorting and by loops; padding, chunks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError, attention
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.bits import unpack_bits
from sparsekit.kernels.select.flexprefill import fewest_tokens, flex_bits, js_distance, mass_codes, mass_threshold
from sparsekit.kernels.select.grid import Budgets
from sparsekit.kernels.select.last_queries import last_query_sums
from sparsekit.patterns import FlexPrefill, parse_pattern
from sparsekit.plan import BlockPlan
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

CASES = {
    "whole": Geometry.of(1500, block_q=128, block_kv=64),
    "rows of 64": Geometry.of(1100, block_q=64, block_kv=128),
    "chunk": Geometry.of(500, 1300, block_q=128, block_kv=128),
    "chunk of a static cache": Geometry.of(200, 1500, q_offset=930, block_q=128, block_kv=64),
    "left padding": Geometry.of(1000, batch=3, kv_start=(0, 137, 950), block_q=128, block_kv=64),
    "batch of equals": Geometry.of(700, batch=2, block_q=128, block_kv=128),
}


def _select(pattern: FlexPrefill, geometry: Geometry, q: Tensor, k: Tensor) -> BlockPlan:
    return pattern.select(q, k, geometry, Softmax(q.shape[-1] ** -0.5))


def _cut(mass: Tensor) -> Tensor:
    """Masses to 8 significant bits, as float64; below 2^-24 nothing."""
    mantissa, exponent = torch.frexp(mass.double())
    return torch.where(mass >= 2.0**-24, torch.ldexp((mantissa * 256).floor() / 256, exponent), 0.0)


def _fewest(mass: Tensor, gamma: float) -> tuple[int, float]:
    """By a sort: how many of the cut masses reach gamma of their sum, and the last one's value."""
    ranked = _cut(mass).sort(descending=True).values
    reached = ranked.cumsum(0) >= gamma * ranked.sum()
    count = int((~reached).sum()) + 1
    return count, float(ranked[count - 1])


def _expected(pattern: FlexPrefill, geometry: Geometry, q: Tensor, k: Tensor, b: int, head: int) -> tuple[Tensor, bool]:
    """bool (rows, blocks) that one head keeps, and whether it is query-aware: from the definition, in float64."""
    span, start, scale = geometry.spans[b], geometry.kv_start[b], q.shape[-1] ** -0.5
    keys = k[b, head // 2, start : start + span.q_end].double()
    at = geometry.q_index(b, span.q_first)
    queries = q[b, head, at : at + span.q_end - span.q_first].double()
    n, blocks = min(128, len(queries)), -(-span.q_end // 128)
    column, distance = torch.zeros(blocks * 128).double(), torch.zeros(blocks * 128).double()
    for r in range(n):
        i = span.q_end - n + r
        weights = torch.softmax(keys[: i + 1] @ queries[len(queries) - n + r] * scale, 0)
        column[: i + 1] += weights
        distance[: i + 1] += weights.flip(0)
    k_mean = torch.stack([keys[c * 128 : (c + 1) * 128].mean(0) for c in range(blocks)])
    estimate = torch.softmax(k_mean @ queries[-n:].mean(0) * scale, 0)
    seen = column.view(-1, 128).sum(1) / n
    middle = (estimate + seen) / 2
    divergence = (estimate * (estimate / middle).log() + seen * (seen / middle).log()).sum() / 2
    aware = math.sqrt(max(float(divergence), 0)) < pattern.tau
    least = -(-pattern.min_budget_tokens // 128)
    kept = []
    for mass in (column, distance):
        wanted = _fewest(mass.float(), pattern.gamma)[0] // 128 + 1
        wanted = least if aware else max(wanted, least)
        if pattern.max_budget_tokens is not None:
            wanted = min(wanted, -(-pattern.max_budget_tokens // 128))
        score = mass.view(-1, 128).sum(1)
        kept.append(sorted(range(blocks), key=lambda c, score=score: (c != 0, -float(score[c]), c))[:wanted])
    first = span.q_first // 128
    rows = range(first, (span.q_end - 1) // 128 + 1)
    out = torch.zeros(len(rows), blocks, dtype=torch.bool)
    table = torch.zeros(len(rows), blocks)
    for r in rows:
        out[r - first, [c for c in kept[0] if c <= r]] = True
        out[r - first, [r - o for o in kept[1] if o <= r]] = True
        low, high = max(r * 128, span.q_first) - span.q_first, min((r + 1) * 128, span.q_end) - span.q_first
        table[r - first, : r + 1] = torch.softmax(k_mean[: r + 1] @ queries[low:high].mean(0) * scale, 0).float()
    if aware:
        out |= _cut(table) >= _fewest(table.flatten(), pattern.gamma)[1]
    return out, aware


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_kept_blocks_by_loops(name: str, tau: float) -> None:
    geometry = CASES[name]
    q, k, _ = inputs_for(geometry)
    q[:, 1, :, 0] = 6  # one head looks at two keys a block, whose opposites hide them from the block's mean
    k[:, 0, 300:700:200, 0], k[:, 0, 301:700:200, 0] = 6, -6
    k[:, :, ::50] *= 2
    pattern = FlexPrefill(gamma=0.3, tau=tau, min_budget_tokens=100)
    sums = last_query_sums(q, k, geometry, Softmax(0.25), 128)
    bits = flex_bits(q, k, sums, geometry, Softmax(0.25), 128, Budgets(0.3, tau, 1, 10_000))
    plan, branches = _select(pattern, geometry, q, k), set()
    assert plan.samples == geometry.batch
    mask = plan.to_mask()
    for b, span in enumerate(geometry.spans):
        at, key = geometry.q_index(b, span.q_first), geometry.kv_start[b]
        for head in range(4):
            expected, aware = _expected(pattern, geometry, q, k, b, head)
            branches.add(aware)
            kept = unpack_bits(bits[b, head], expected.shape[1])[: expected.shape[0]]
            assert torch.equal(kept, expected), (b, head, aware)
            own = torch.arange(span.q_first // 128, span.q_first // 128 + len(expected))
            expected[torch.arange(len(expected)), own] = True
            i, j = torch.arange(span.q_first, span.q_end), torch.arange(span.keys)
            pairs = expected[i // 128 - span.q_first // 128][:, j.clamp(max=span.q_end - 1) // 128]
            inner = mask[b, head, at : at + len(i), key : key + span.keys]
            assert torch.equal(inner, pairs & (j <= i[:, None]))
    assert branches == {0.0: {False}, 0.25: {False, True}, 1.0: {True}}[tau]


def test_token_budgets() -> None:
    """n_v = m // 128 + 1 blocks, m the fewest tokens that reach gamma."""
    one = torch.zeros(1280)
    one[700] = 1.0
    assert int(fewest_tokens(one[None], 0.9)) // 128 + 1 == 1
    even = torch.full((1, 1280), 1 / 1280)
    assert int(fewest_tokens(even, 0.9)) in (1152, 1153)
    assert int(fewest_tokens(even, 0.9)) // 128 + 1 == 10
    assert fewest_tokens(torch.zeros(2, 50), 0.9).tolist() == [0, 0]
    assert fewest_tokens(torch.full((1, 50), float("nan")), 0.9).tolist() == [0]


@pytest.mark.parametrize("gamma", [0.05, 0.5, 0.9, 0.999])
def test_fewest_tokens_by_a_sort(gamma: float) -> None:
    g = torch.Generator().manual_seed(0)
    for power in (1, 4, 12):
        mass = torch.rand(3, 2000, generator=g) ** power
        got = fewest_tokens(mass, gamma).tolist()
        assert got == [_fewest(row, gamma)[0] for row in mass]
        for row, count in zip(mass.double(), got, strict=True):  # and of the masses as they are, to their 8 bits
            ranked = row.sort(descending=True).values.cumsum(0) / row.sum()
            assert float(ranked[count - 1]) > gamma - 0.005
            assert count == 1 or float(ranked[count - 2]) < gamma + 0.005


def test_mass_codes_keep_the_order() -> None:
    g = torch.Generator().manual_seed(1)
    mass = torch.exp2(torch.rand(5000, generator=g) * 34 - 26).sort().values
    codes = mass_codes(mass)
    assert bool((codes.diff() >= 0).all())
    assert int(codes.min()) == 0 and int(codes.max()) < 4096
    assert mass_codes(torch.tensor([0.0, -1.0, float("nan"), 1e30, 1.0])).tolist() == [0, 0, 0, 4095, 24 * 128]
    code, count = mass_threshold(torch.bincount(codes, minlength=4096), 0.5)
    assert count == _fewest(mass, 0.5)[0]
    assert bool(_cut(mass)[codes >= code].sum() >= 0.5 * _cut(mass).sum())


def test_divergence() -> None:
    """0 of equal distributions, sqrt(log 2) of disjoint ones; zeros are handled, NaN is below no tau."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]])
    assert js_distance(p, p).tolist() == [0, 0]
    assert js_distance(p[0], p[0].flip(0)).item() == pytest.approx(math.sqrt(math.log(2)), abs=1e-6)
    mid = math.sqrt(0.5 * (2 * 0.5 * math.log(0.5 / 0.375) + 2 * 0.25 * math.log(0.25 / 0.375) + 0.5 * math.log(2)))
    assert js_distance(p[0], p[1]).item() == pytest.approx(mid, abs=1e-6)
    assert not bool(js_distance(p[0], p[1] * float("nan")) < 1)


def test_identical_estimates_are_query_aware_for_any_tau() -> None:
    """Keys all alike: what block means foretell is what the last queries see, up to the last block."""
    geometry = Geometry.of(1280)
    q, k = torch.zeros(1, 1, 1280, 16), torch.ones(1, 1, 1280, 16)
    sums = last_query_sums(q, k, geometry, Softmax(0.25), 128)
    sums[0] = 0.1  # as even as the estimate
    for tau, aware in ((0.0, False), (1e-3, True)):
        bits = flex_bits(q, k, sums, geometry, Softmax(0.25), 128, Budgets(0.3, tau, 1, 10))
        rows = unpack_bits(bits, 10)[0, 0]
        vertical = int((rows[9, :9]).sum())
        assert (vertical < 3) == aware, "a query-aware head has one column block; gamma 0.3 of even mass takes 4"


def test_the_map_threshold_spans_the_whole_head() -> None:
    """Rows of even maps: early rows have the larger shares, and are kept before any late one."""
    geometry = Geometry.of(1280)
    q, k = torch.zeros(1, 1, 1280, 16), torch.ones(1, 1, 1280, 16)
    sums = last_query_sums(q, k, geometry, Softmax(0.25), 128)
    bits = flex_bits(q, k, sums, geometry, Softmax(0.25), 128, Budgets(0.35, 1.0, 1, 10))
    rows = unpack_bits(bits, 10)[0, 0]
    whole = [bool(rows[r, : r + 1].all()) for r in range(10)]
    assert whole == [True] * 4 + [False] * 6  # 4 of 10 rows hold more than 0.35 of the sum
    assert [int(rows[r].sum()) for r in range(4, 10)] == [2] * 6  # the first block, and the row's own


@pytest.mark.parametrize("tokens", [100, 256, 257, 1024, 1025])
def test_prompts_within_the_minimum_are_dense(tokens: int) -> None:
    geometry = Geometry.of(tokens)
    q, k, _ = inputs_for(geometry)
    assert _select(FlexPrefill(), geometry, q, k).all_dense == (tokens <= 1024)
    assert _select(FlexPrefill(min_budget_tokens=1), geometry, q, k).all_dense == (tokens <= 256)


@pytest.mark.parametrize("pattern", [FlexPrefill(gamma=1), FlexPrefill(min_budget_tokens=1400)], ids=str)
def test_a_full_budget_is_dense(pattern: FlexPrefill) -> None:
    geometry = Geometry.of(1300)
    q, k, v = inputs_for(geometry)
    assert _select(pattern, geometry, q, k).all_dense
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = [t.to(dtype) for t in (q, k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
        assert (attention(*x, pattern) - exact).abs().max() <= most  # type: ignore[arg-type, operator]


def test_a_maximum_caps_columns_and_diagonals() -> None:
    geometry = Geometry.of(1300)
    q, k, _ = inputs_for(geometry)
    wide = _select(FlexPrefill(gamma=0.95, tau=0, min_budget_tokens=1), geometry, q, k)
    capped = _select(FlexPrefill(gamma=0.95, tau=0, min_budget_tokens=1, max_budget_tokens=128), geometry, q, k)
    blocks = capped.to_mask()[0, :, 127::128, ::128].sum(-1)
    assert int(blocks.max()) == 2
    assert wide.density() > capped.density()


def test_a_padded_sample_means_the_same_as_alone() -> None:
    pattern = FlexPrefill(gamma=0.4, tau=0.2, min_budget_tokens=1)
    geometry = Geometry.of(1200, batch=2, kv_start=(0, 100), kv_end=(1200, 1060))
    q, k, _ = inputs_for(geometry)
    both = _select(pattern, geometry, q, k).to_mask()[1, :, 100:1060, 100:1060]
    alone = _select(pattern, Geometry.of(960), q[1:, :, 100:1060], k[1:, :, 100:1060])
    assert torch.equal(both, alone.to_mask()[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["one query", "one key", "all"])
def test_nan_and_inf_leave_a_valid_plan(where: str, value: float) -> None:
    geometry = Geometry.of(700, block_q=64)
    q, k, _ = inputs_for(geometry)
    if where == "one query":
        q[0, 1, 690] = value
    elif where == "one key":
        k[0, 0, 200] = value
    else:
        q[:], k[:] = value, value
    for tau in (0.0, 1.0):
        plan = _select(FlexPrefill(gamma=0.3, tau=tau, min_budget_tokens=1), geometry, q, k)
        mask = plan.to_mask()[0]
        i, j = torch.arange(700)[:, None], torch.arange(700)[None]
        assert int(plan.multiplicity().max()) == 1
        assert not bool((mask & (j > i)).any())
        assert bool((mask | ~((j <= i) & ((j < 128) | (i // 128 == j // 128)))).all())


def test_softmax_options_reach_the_estimate() -> None:
    geometry = Geometry.of(1300)
    q, k, _ = inputs_for(geometry)
    masks = []
    for softmax in (Softmax(0.25), Softmax(0.25, softcap=0.5), Softmax(0.25, sink_logits=torch.full((4,), 20.0))):
        plan = FlexPrefill(gamma=0.3, tau=0.2, min_budget_tokens=1).select(4 * q, k, geometry, softmax)
        masks.append(plan.to_mask())
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma": 0.0}, r"flexprefill: gamma = 0.0: .*greater than 0"),
        ({"gamma": 1.1}, r"gamma = 1.1: .*less than or equal to 1"),
        ({"tau": -0.1}, r"tau = -0.1"),
        ({"tau": float("nan")}, r"tau = nan"),
        ({"min_budget_tokens": 0}, r"min_budget_tokens = 0"),
        ({"max_budget_tokens": 0}, r"max_budget_tokens = 0"),
        ({"max_budget_tokens": 512}, r"max_budget_tokens = 512: it should be at least min_budget_tokens = 1024"),
        ({"gama": 0.5}, r"Did you mean 'gamma'\?"),
    ],
)
def test_refusals(fields: dict[str, float], message: str) -> None:
    with pytest.raises(SparsekitError, match=message) as caught:
        parse_pattern({"name": "flexprefill", **fields})
    assert "\n" not in str(caught.value)


def test_contract_on_longer_prompts() -> None:
    few = [CASES[name] for name in ("chunk", "left padding", "batch of equals")]
    check_pattern(FlexPrefill(gamma=0.4, tau=0.2, min_budget_tokens=1), few)
    check_pattern(FlexPrefill(), GEOMETRIES[:5])

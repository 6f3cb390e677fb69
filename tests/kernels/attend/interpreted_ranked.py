"""Ranked execution by the Triton kernel in Triton's interpreter. `test_ranked.py` runs this file in a process of its
own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import pytest
import torch
from ranked_cases import (
    GEOMETRIES,
    MISLED,
    PATTERNS,
    SELECTIONS,
    SINKS,
    check_ranked,
    misled,
    peaked,
    plan_of,
    shuffled,
    unvisited,
    whole,
)
from test_select import rows_of
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend, launch
from sparsekit.kernels.attend import tiles, triton_ranked
from sparsekit.kernels.select import ranking, ranking_triton
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.segments import segments_of
from sparsekit.patterns import S2O

G300 = GEOMETRIES["300"]


def test_it_is_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.parametrize("kind", ["stops", "odd segments"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, kind: str) -> None:
    geometry = GEOMETRIES[name]
    inputs = peaked(geometry, heads=2, key_heads=1)
    check_ranked(plan_of(PATTERNS[kind], inputs, geometry), inputs, "triton")


@pytest.mark.parametrize("kind", ["patient", "everything"])
def test_plans(kind: str) -> None:
    geometry = Geometry.of(700, block_q=64)
    inputs = peaked(geometry, heads=2, key_heads=1)
    check_ranked(plan_of(PATTERNS[kind], inputs, geometry), inputs, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.4}], ids=str)
def test_softmax_variants(options: dict[str, object], dtype: torch.dtype) -> None:
    inputs = peaked(G300, dtype)
    check_ranked(plan_of(PATTERNS["stops"], inputs, G300), inputs, "triton", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", launch.HEAD_SIZES)
def test_head_sizes(dim: int) -> None:
    geometry = Geometry.of(200, block_q=128)
    inputs = peaked(geometry, torch.float16, dim=dim, heads=2, key_heads=1)
    check_ranked(plan_of(PATTERNS["stops"], inputs, geometry), inputs, "triton")


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (5, 1)])
def test_heads(heads: int, key_heads: int) -> None:
    inputs = peaked(G300, heads=heads, key_heads=key_heads)
    check_ranked(plan_of(PATTERNS["odd segments"], inputs, G300), inputs, "triton")


def test_a_key_tile_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 of wide heads has it: the stop still speaks of 64 keys."""
    geometry = Geometry.of(260, block_q=32)
    inputs = peaked(geometry, dim=32, heads=2, key_heads=1)
    for part in (16, 32):
        tile = tiles.Tile(32, part, 4, 2)
        monkeypatch.setattr(triton_ranked, "tile_of", lambda *args, tile=tile: tile)
        for kind in ("stops", "patient"):
            check_ranked(plan_of(PATTERNS[kind], inputs, geometry), inputs, "triton")


@pytest.mark.parametrize("check", [1, 7])
def test_looks_at_the_stop(check: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ranked, "CHECK", check)
    geometry = Geometry.of(600, block_q=128)
    inputs = peaked(geometry, heads=2, key_heads=1)
    check_ranked(plan_of(PATTERNS["stops"], inputs, geometry), inputs, "triton")


def test_any_order_of_the_history_without_a_stop() -> None:
    inputs = peaked(G300)
    check_ranked(shuffled(plan_of(PATTERNS["everything"], inputs, G300)), inputs, "triton")


def test_nan_is_no_reason_to_stop() -> None:
    geometry = Geometry.of(500, block_q=64)
    q, k, v = peaked(geometry)
    plan = plan_of(S2O(segment_tokens=64, tau=0.9), (q, k, v), geometry)
    q[0, 0, 450] = float("nan")
    fresh = unvisited(plan)
    out = attend(q, k, v, fresh, impl="triton")
    assert isinstance(out, torch.Tensor)
    assert fresh.visited is not None
    assert int(fresh.visited[0, 0, 7, 0]) == 6
    assert int(fresh.visited[0, 1, 7, 0]) < 6
    assert bool(out[0, 0, 450].isnan().all())
    out[0, 0, 450] = 0
    assert bool(out.isfinite().all())


def test_dead_cache_rows_are_not_read() -> None:
    geometry = GEOMETRIES["chunk of a static cache"]
    q, k, v = peaked(geometry)
    plan = plan_of(PATTERNS["stops"], (q, k, v), geometry)
    expected = attend(q, k, v, plan, impl="triton")
    k[:, :, geometry.kv_end[0] :], v[:, :, geometry.kv_end[0] :] = float("nan"), float("nan")
    assert torch.equal(attend(q, k, v, plan, impl="triton"), expected)  # type: ignore[arg-type]


def test_refusals() -> None:
    inputs = peaked(G300, heads=4, key_heads=2)
    plan = plan_of(PATTERNS["stops"], inputs, G300)
    q, k, v = peaked(G300, heads=8, key_heads=4)
    with pytest.raises(
        SparsekitError, match="a ranked plan of 1 samples and 4 heads: want the batch, 1, and the query"
    ):
        attend(q, k, v, plan, impl="triton")
    with pytest.raises(SparsekitError, match=r"k has strides .*needs the last one to be 1"):
        attend(q[:, :4], k[:, :2].mT.contiguous().mT, v[:, :2], plan, impl="triton")


# ---- selection


@pytest.mark.parametrize("columns", [1, 31, 700, 5000])
def test_bit_positions(columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    count = (columns + 1) // 2
    mask = torch.rand(5, columns, generator=g).argsort(1).argsort(1) < count
    got = ranking_triton.bit_positions_triton(pack_bits(mask), count)
    assert torch.equal(got, mask.nonzero()[:, 1].view(5, count).int())


def test_the_largest_keys_of_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, infinities and NaN as the pattern makes them finite, and what lies in the future."""
    scores = ranking._finite(rows_of(8, 900))
    scores[:, 800:] = -torch.inf
    expected = ranking._largest(scores, 300)
    monkeypatch.setattr(ranking, "runs_triton", lambda device: True)
    monkeypatch.setattr(
        ranking, "topk_indices_mask", lambda scores, k, pick=ranking.topk_indices_mask: pick(scores, k, impl="triton")
    )
    assert torch.equal(ranking._largest(scores, 300), expected)


def _infinite(fresh: Tensor) -> Tensor:
    return fresh.fill_(torch.inf) if fresh.is_floating_point() else fresh


def _compare(
    monkeypatch: pytest.MonkeyPatch, pattern: S2O, inputs: tuple[Tensor, Tensor, Tensor], geometry: Geometry
) -> None:
    """The same plan of both paths, to the last key. A score that is not written would be the largest."""
    expected = plan_of(pattern, inputs, geometry)
    monkeypatch.setattr(ranking, "runs_triton", lambda device: True)
    empty = torch.empty
    with monkeypatch.context() as poisoned:
        poisoned.setattr(torch, "empty", lambda *size, **options: _infinite(empty(*size, **options)))
        got = plan_of(pattern, inputs, geometry)
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name


@pytest.mark.parametrize("case", SELECTIONS)
def test_select_of_both_paths(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, pattern, heads = SELECTIONS[case]
    inputs = whole(geometry, heads=heads[0], key_heads=heads[1])
    _compare(monkeypatch, pattern, inputs, geometry)


def test_select_by_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 numbers of a head of 80."""
    geometry, pattern, _ = SELECTIONS["chunk"]
    _compare(monkeypatch, pattern, whole(geometry, dim=80, heads=2, key_heads=1), geometry)


def test_select_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, pattern, _ = SELECTIONS["left padding"]
    monkeypatch.setattr(ranking_triton, "SCORE_BYTES", 20_000)
    _compare(monkeypatch, pattern, whole(geometry, heads=2, key_heads=1), geometry)


@pytest.mark.parametrize(("heads", "size", "tokens"), [(8, 64, (400,)), (16, 128, (400,)), (16, 96, (264, 600))])
def test_select_by_programs_of_two_tiles(
    heads: int, size: int, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four tiles of mean queries, of two segments each or of one; the first have none of the last keys."""
    geometry = Geometry.of(*tokens, block_q=64)
    monkeypatch.setattr(ranking_triton, "TILES", 2)
    monkeypatch.setattr(ranking_triton, "EXACT_SCORES", ranking_triton.EXACT_SCORES._replace(m=16))
    _compare(monkeypatch, S2O(segment_tokens=size, max_tokens=90), whole(geometry, heads=heads, key_heads=1), geometry)


@pytest.mark.parametrize("turns", [0, 4])
@pytest.mark.parametrize("case", MISLED)
def test_select_from_a_sample_that_misleads(case: str, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few or too many scores reach what it suggests; and without a suggestion."""
    geometry = Geometry.of(768, block_q=64)
    monkeypatch.setattr(ranking_triton, "TURNS", turns)
    _compare(monkeypatch, S2O(segment_tokens=384, max_tokens=90), misled(case, geometry), geometry)


def test_select_does_not_read_dead_cache_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(96, 700, q_offset=240, block_q=64)
    q, k, v = whole(geometry, heads=2, key_heads=1)
    k[:, :, 336:] = float("nan")
    _compare(monkeypatch, S2O(segment_tokens=96, max_tokens=60), (q, k, v), geometry)


def test_strides_that_are_refused_are_those_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(200, block_q=64)
    q, k, v = whole(geometry, heads=2, key_heads=1)
    monkeypatch.setattr(ranking, "runs_triton", lambda device: True)
    for name, inputs in (("q", (q.mT.contiguous().mT, k, v)), ("k", (q, k.mT.contiguous().mT, v))):
        with pytest.raises(SparsekitError, match=rf"{name} has strides .* {name}\.contiguous\(\)"):
            plan_of(S2O(segment_tokens=64), inputs, geometry)


def test_select_of_values_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(384, block_q=64)
    q, k, v = whole(geometry, heads=2, key_heads=1)
    k[0, 0, 100, 3], k[0, 0, 130, 2], k[0, 0, 170, 1] = float("nan"), float("inf"), -float("inf")
    q[0, 1, 350, 3] = float("nan")
    _compare(monkeypatch, S2O(segment_tokens=96, max_tokens=80), (q, k, v), geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 80])
def test_mean_queries_of_both_paths(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(130, 250, batch=2, kv_start=(0, 30), block_q=64)
    q = peaked(geometry, dtype, dim=dim, heads=2, key_heads=1)[0]
    segments = segments_of(geometry, 70, None, q.device)
    places = [torch.full((2, 2, 3, 128), 7, dtype=torch.int32) for _ in range(2)]
    expected = ranking.mean_queries(q, segments, "none", places[0])
    monkeypatch.setattr(ranking, "runs_triton", lambda device: True)
    got = ranking.mean_queries(q, segments, "none", places[1])
    assert torch.equal(*places)
    assert got.dtype == expected.dtype == dtype
    assert (got - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_select_of_lists_too_long_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(600, batch=2, kv_start=(0, 77), block_q=64)
    monkeypatch.setattr(ranking_triton, "LONGEST", 99)
    monkeypatch.setattr(
        ranking, "topk_indices_mask", lambda scores, k, pick=ranking.topk_indices_mask: pick(scores, k, impl="triton")
    )
    inputs = whole(geometry, heads=2, key_heads=1)
    _compare(monkeypatch, S2O(segment_tokens=64, max_tokens=100), inputs, geometry)

"""block_topk: what it keeps, by loops; forced blocks; ties; padding, chunks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError, attention
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.patterns import BlockTopK, parse_pattern
from sparsekit.plan import BlockPlan
from sparsekit.testing import inputs_for


def _select(pattern: BlockTopK, geometry: Geometry, q: Tensor, k: Tensor) -> BlockPlan:
    return pattern.select(q, k, geometry, Softmax(q.shape[-1] ** -0.5))


def _blocks(plan: BlockPlan, block: int) -> Tensor:
    """bool (P, R, C): the key blocks that the last query of each plan row's block keeps. One sample, no padding."""
    mask = plan.to_mask()[0]
    last = [min(end, mask.shape[1]) - 1 for end in range(block, mask.shape[1] + block, block)]
    return mask[:, last][:, :, ::block]


@pytest.mark.parametrize("force", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("block", [64, 128])
def test_the_best_blocks_by_loops(block: int, top_k: int, force: tuple[bool, bool]) -> None:
    geometry = Geometry.of(block * 7 + 9, block_q=block, block_kv=64)
    q, k, _ = inputs_for(geometry)
    pattern = BlockTopK(top_k=top_k, block_tokens=block, force_sink=force[0], force_diagonal=force[1])  # type: ignore[arg-type]
    kept = _blocks(_select(pattern, geometry, q, k), block)
    for h in range(4):
        for r in range(8):
            rows = q[0, h, r * block : (r + 1) * block].mean(0)
            score = [float(rows @ k[0, h // 2, c * block : (c + 1) * block].mean(0)) for c in range(r + 1)]
            forced = {c for c, wanted in ((0, force[0]), (r, force[1])) if wanted}
            ranked = [c for c in sorted(range(r + 1), key=lambda c: -score[c]) if c not in forced]
            expected = forced | set(ranked[: max(top_k - len(forced), 0)]) | {r}
            assert set(kept[h, r].nonzero().flatten().tolist()) == expected


def test_forced_blocks_count_among_the_top_k() -> None:
    geometry = Geometry.of(64 * 12, block_q=64, block_kv=64)
    q, k, _ = inputs_for(geometry)
    for top_k in (1, 2, 5):
        kept = _blocks(_select(BlockTopK(top_k=top_k), geometry, q, k), 64)
        assert kept.sum(-1)[0].tolist() == [min(max(top_k, 2), r + 1) for r in range(12)]


def test_the_last_block_is_a_true_mean() -> None:
    """One key in the last block: with zeros averaged in, its score would be 1/64 of what it is, and lose."""
    geometry = Geometry.of(64 * 4 + 1, block_q=64, block_kv=64)
    q = torch.ones(1, 1, 257, 16)
    k = torch.zeros(1, 1, 257, 16)
    k[:, :, 64:128] = 0.5
    k[:, :, 256] = 1.0
    pattern = BlockTopK(top_k=1, force_sink=False, force_diagonal=False)
    assert _blocks(_select(pattern, geometry, q, k), 64)[0, 4].nonzero().flatten().tolist() == [4]
    k[:, :, 256] = 0.4
    assert _blocks(_select(pattern, geometry, q, k), 64)[0, 4].nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("tokens", [256, 257, 300])
def test_a_budget_of_all_blocks_is_dense(tokens: int) -> None:
    geometry = Geometry.of(tokens, block_q=64)  # a row of 128 queries would keep what either of its two blocks does
    q, k, v = inputs_for(geometry)
    blocks = -(-tokens // 64)
    for top_k in (blocks, blocks + 1, 10_000):
        assert _select(BlockTopK(top_k=top_k), geometry, q, k).all_dense
    assert _select(BlockTopK(top_k=blocks - 1), geometry, q, k).density() < 1
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = [t.to(dtype) for t in (q, k, v)]
        out = attention(*x, BlockTopK(top_k=blocks))  # type: ignore[arg-type]
        exact = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
        assert float((out - exact).abs().max()) <= most  # type: ignore[operator]


def test_equal_keys_go_to_the_earlier_block() -> None:
    geometry = Geometry.of(64 * 9, block_q=64, block_kv=64)
    q, k, _ = inputs_for(geometry)
    k[:] = k[:, :, :1]
    kept = _blocks(_select(BlockTopK(top_k=4), geometry, q, k), 64)
    assert kept[2, 8].nonzero().flatten().tolist() == [0, 1, 2, 8]


def test_a_heavy_key_brings_its_block() -> None:
    geometry = Geometry.of(64 * 9, block_q=64, block_kv=64)
    q, k, _ = inputs_for(geometry)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 64 * 3 + 5, 0] = 1e4
    kept = _blocks(_select(BlockTopK(top_k=3), geometry, q, k), 64)
    assert kept[:, 3:, 3].all()


def test_a_tile_of_two_blocks_keeps_what_either_keeps() -> None:
    pattern = BlockTopK(top_k=2)
    narrow, wide = (Geometry.of(64 * 8, block_q=block, block_kv=128) for block in (64, 128))
    q, k, _ = inputs_for(narrow)
    small, large = (_select(pattern, g, q, k) for g in (narrow, wide))
    assert (large.block_q, large.block_kv) == (128, 64)
    blocks = small.to_mask()[0].unflatten(1, (4, 128)).any(2)
    rows = large.to_mask()[0].unflatten(1, (4, 128)).any(2)
    assert torch.equal(blocks, rows)


def test_padding_changes_nothing() -> None:
    bounds = ((0, 500), (37, 500), (150, 410), (200, 230))
    padded = Geometry.of(500, batch=4, kv_start=[a for a, _ in bounds], kv_end=[b for _, b in bounds])
    q, k, _ = inputs_for(padded)
    mask = _select(BlockTopK(top_k=2), padded, q, k).to_mask()
    for b, (low, high) in enumerate(bounds):
        x = (q[b : b + 1, :, low:high], k[b : b + 1, :, low:high])
        alone = _select(BlockTopK(top_k=2), Geometry.of(high - low), *x).to_mask()[0]
        assert torch.equal(mask[b, :, low:high, low:high], alone.expand(4, -1, -1))
        assert int(mask[b].sum()) == int(alone.expand(4, -1, -1).sum())


@pytest.mark.parametrize("first", [128, 384])
def test_a_chunk_selects_as_the_whole(first: int) -> None:
    whole = Geometry.of(700)
    q, k, _ = inputs_for(whole)
    expected = _select(BlockTopK(top_k=3), whole, q, k).to_mask()[:, :, first:]
    chunk = Geometry.of(700 - first, 700)
    assert torch.equal(_select(BlockTopK(top_k=3), chunk, q[:, :, first:], k).to_mask(), expected)


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [slice(70, 71), slice(None)])
def test_a_plan_stays_valid_whatever_comes(fill: float, rows: slice) -> None:
    geometry = Geometry.of(500)
    q, k, v = inputs_for(geometry)
    q[:, 0, rows] = fill
    k[:, 1, rows] = fill
    often = _select(BlockTopK(top_k=2), geometry, q, k).multiplicity()
    assert int(often.max()) == 1
    assert not torch.triu(often, 1).any()
    assert bool((often.diagonal(dim1=-2, dim2=-1) == 1).all())
    out = attention(q, k, v, BlockTopK(top_k=2))
    clean = attention(*inputs_for(geometry), BlockTopK(top_k=2))  # type: ignore[misc]
    if rows != slice(None):  # heads 0 and 1 share key head 0, which is clean; head 1's queries are, too
        assert torch.equal(out[:, 1], clean[:, 1])  # type: ignore[index]


def test_selection_is_by_query_head() -> None:
    geometry = Geometry.of(64 * 10, block_q=64, block_kv=64)
    q, k, _ = inputs_for(geometry)
    plan = _select(BlockTopK(top_k=3), geometry, q, k)
    assert plan.heads == 4
    kept = _blocks(plan, 64)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("top_k", 0, "top_k = 0: it should be greater than or equal to 1"),
        ("block_tokens", 32, "block_tokens = 32: it should be 64 or 128"),
        ("topk", 5, "unknown field 'topk' = 5; allowed: .* Did you mean 'top_k'?"),
        ("force_sink", 1, "force_sink = 1: it should be a valid boolean"),
    ],
)
def test_bad_fields_are_refused(field: str, value: int, said: str) -> None:
    with pytest.raises(SparsekitError, match=said):
        parse_pattern({"name": "block_topk", field: value})

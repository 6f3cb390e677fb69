"""xattention: the fewest blocks that reach the threshold; thresholds a head; ties; padding, chunks, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError, attention
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.block_scores import antidiagonal_mass
from sparsekit.kernels.select.grid import block_grid
from sparsekit.patterns import XAttention, parse_pattern
from sparsekit.plan import BlockPlan
from sparsekit.testing import inputs_for

SOFT = Softmax(0.25)


def _select(pattern: XAttention, geometry: Geometry, q: Tensor, k: Tensor) -> BlockPlan:
    return pattern.select(q, k, geometry, SOFT)


def _sharp(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose heads look at a few places: on plain random ones every estimate is flat."""
    q, k, v = inputs_for(geometry)
    g = torch.Generator().manual_seed(5)
    q[..., 0], k[..., 0] = 4.0, 0.0
    for place in torch.randint(0, geometry.kv_len, (4,), generator=g).tolist():
        k[..., place : place + 20, 0] = 6 * torch.rand(k.shape[0], k.shape[1], 1, generator=g)
    return q, k, v


def _kept(plan: BlockPlan) -> Tensor:
    """bool (P, R, C): key blocks that each block of 128 queries keeps. One sample, whole blocks."""
    return plan.to_mask()[0].unflatten(1, (-1, 128)).any(2)[:, :, ::128]


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_the_fewest_blocks_that_reach_the_threshold(threshold: float, stride: int) -> None:
    geometry = Geometry.of(128 * 9, block_kv=128)
    q, k, _ = _sharp(geometry)
    kept = _kept(_select(XAttention(threshold=threshold, stride=stride), geometry, q, k))  # type: ignore[arg-type]
    mass = antidiagonal_mass(q, k, geometry, block_grid(geometry, 128, 1, q.device), 128, stride, SOFT)[0].double()
    fewer = 0
    for h in range(4):
        for r in range(9):
            row, chosen = mass[h, r, : r + 1], kept[h, r, : r + 1]
            total, slack = float(row.sum()), float(row.sum()) * 2**-24
            assert chosen[0] and chosen[r]
            assert float(row[chosen].sum()) >= threshold * total - slack
            free = chosen.clone()
            free[[0, r]] = False
            if free.any():
                assert float(row[chosen].sum() - row[free].min()) < threshold * total + slack
                assert (row[~chosen] <= row[free].min()).all()
            fewer += int((~chosen).sum())
    assert fewer > 0, "everything was kept, so this tests nothing"


@pytest.mark.parametrize("tokens", [128, 300, 1000])
def test_a_threshold_of_one_is_dense(tokens: int) -> None:
    geometry = Geometry.of(tokens)
    q, k, v = _sharp(geometry)
    assert _select(XAttention(threshold=1.0), geometry, q, k).all_dense
    assert _select(XAttention(threshold=(1.0,) * 4), geometry, q, k).all_dense
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = [t.to(dtype) for t in (q, k, v)]
        out = attention(*x, XAttention(threshold=1))  # type: ignore[arg-type]
        exact = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
        assert float((out - exact).abs().max()) <= most  # type: ignore[operator]


def test_thresholds_of_each_head() -> None:
    geometry = Geometry.of(128 * 9, block_kv=128)
    q, k, _ = _sharp(geometry)
    shares = (0.3, 1.0, 0.9, 0.5)
    mixed = _select(XAttention(threshold=shares), geometry, q, k).to_mask()[0]
    for h, share in enumerate(shares):
        alone = _select(XAttention(threshold=share), geometry, q, k).to_mask()[0]
        assert torch.equal(mixed[h], alone[h if alone.shape[0] > 1 else 0])
    assert torch.equal(mixed[1], torch.ones_like(mixed[1]).tril())
    with pytest.raises(SparsekitError, match="threshold has 3 values for 4 query heads: give one number, or 4"):
        _select(XAttention(threshold=(0.5, 0.6, 0.7)), geometry, q, k)


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 3.0, -2.0, 0.0])], ids=["no sinks", "sinks"])
def test_a_proxy_is_the_mean_query(sinks: Tensor | None) -> None:
    """Heads 0 and 1 keep, each by its own threshold, what one head of their mean query and mean sink keeps."""
    geometry = Geometry.of(128 * 9, block_kv=128)
    q, k, _ = _sharp(geometry)
    shares = (0.3, 0.7, 0.5, 0.9)
    softmax = Softmax(0.25, None, sinks)
    plan = XAttention(threshold=shares, proxy="mean").select(q, k, geometry, softmax)
    mean = Softmax(0.25, None, None if sinks is None else torch.tensor([2.0, -1.0]))
    for h, share in enumerate(shares):
        one = XAttention(threshold=share).select((q[:, ::2] + q[:, 1::2]) / 2, k, geometry, mean)
        assert torch.equal(_kept(plan)[h], _kept(one)[h // 2])
    same = [XAttention(threshold=one, proxy="mean").select(q, k, geometry, softmax) for one in (0.5, (0.5,) * 4)]
    assert torch.equal(same[0].to_mask(), same[1].to_mask())
    assert not torch.equal(_kept(plan), _kept(XAttention(threshold=shares).select(q, k, geometry, softmax)))


def test_a_proxy_of_one_head_is_that_head() -> None:
    geometry = Geometry.of(500)
    q, k, _ = _sharp(geometry)
    for heads in (q[:, ::2], q[:, ::2].repeat_interleave(2, 1)):  # a key head each, or two that are equal
        plans = [_select(XAttention(threshold=0.5, proxy=proxy), geometry, heads, k) for proxy in (None, "mean")]  # type: ignore[arg-type]
        assert torch.equal(plans[0].to_mask(), plans[1].to_mask())


def test_records_name_a_proxy_only_where_there_is_one() -> None:
    assert "proxy" not in XAttention().model_dump()
    assert XAttention(proxy="mean").model_dump()["proxy"] == "mean"
    assert parse_pattern(XAttention(proxy="mean").to_yaml()) == XAttention(proxy="mean")


def test_more_threshold_keeps_more() -> None:
    geometry = Geometry.of(128 * 9)
    q, k, _ = _sharp(geometry)
    masks = [_select(XAttention(threshold=t), geometry, q, k).to_mask() for t in (0.1, 0.5, 0.9, 0.99)]
    for low, high in pairwise(masks):
        assert not (low & ~high).any()
    assert int(masks[0].sum()) < int(masks[-1].sum())


def test_equal_keys_go_to_the_earlier_block() -> None:
    """All masses of a row equal 128 / (keys): half of them, the first and the last before the others."""
    geometry = Geometry.of(128 * 8, block_kv=128)
    q, k, _ = inputs_for(geometry)
    k[:] = 0.0
    kept = _kept(_select(XAttention(threshold=0.5), geometry, q, k))
    assert kept[3, 6].nonzero().flatten().tolist() == [0, 1, 2, 6]


def test_a_heavy_key_brings_its_block() -> None:
    geometry = Geometry.of(128 * 9, block_kv=128)
    q, k, _ = inputs_for(geometry)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 128 * 3 + 5, 0] = 1e4
    kept = _kept(_select(XAttention(threshold=0.9), geometry, q, k))
    # All mass is on one block: with it, the first and the own are enough.
    assert all(kept[0, r].nonzero().flatten().tolist() == sorted({0, 3, r}) for r in range(4, 9))


def test_padding_changes_nothing() -> None:
    bounds = ((0, 500), (37, 500), (150, 410), (200, 230))
    padded = Geometry.of(500, batch=4, kv_start=[a for a, _ in bounds], kv_end=[b for _, b in bounds])
    q, k, _ = _sharp(padded)
    pattern = XAttention(threshold=0.4)
    mask = _select(pattern, padded, q, k).to_mask()
    assert int(mask[0].sum()) < 4 * 500 * 501 // 2
    for b, (low, high) in enumerate(bounds):
        alone = _select(pattern, Geometry.of(high - low), q[b : b + 1, :, low:high], k[b : b + 1, :, low:high])
        assert torch.equal(mask[b, :, low:high, low:high], alone.to_mask()[0])


@pytest.mark.parametrize("first", [128, 384])
def test_a_chunk_selects_as_the_whole(first: int) -> None:
    whole = Geometry.of(700)
    q, k, _ = _sharp(whole)
    pattern = XAttention(threshold=0.5)
    expected = _select(pattern, whole, q, k).to_mask()[:, :, first:]
    chunk = Geometry.of(700 - first, 700)
    assert torch.equal(_select(pattern, chunk, q[:, :, first:], k).to_mask(), expected)


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [slice(70, 71), slice(None)])
def test_a_plan_stays_valid_whatever_comes(fill: float, rows: slice) -> None:
    geometry = Geometry.of(500)
    q, k, _ = inputs_for(geometry)
    q[:, 0, rows] = fill
    k[:, 1, rows] = fill
    often = _select(XAttention(threshold=0.6), geometry, q, k).multiplicity()
    assert int(often.max()) == 1
    assert not torch.triu(often, 1).any()
    assert bool((often.diagonal(dim1=-2, dim2=-1) == 1).all())


def test_sink_logits_and_softcap_reach_the_estimate() -> None:
    geometry = Geometry.of(128 * 9)
    q, k, _ = _sharp(geometry)
    pattern = XAttention(threshold=0.7)
    masks = [
        pattern.select(q, k, geometry, softmax).to_mask()
        for softmax in (SOFT, Softmax(0.25, 0.5), Softmax(0.25, None, torch.full((4,), 6.0)))
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("threshold", 0, "threshold = 0: 0 must be above 0 and up to 1"),
        ("threshold", 1.01, "threshold = 1.01: 1.01 must be above 0 and up to 1"),
        ("threshold", math.nan, "nan must be above 0 and up to 1"),
        ("threshold", [0.5, -1], "-1 must be above 0 and up to 1"),
        ("threshold", [0.5, True], "it must be a number above 0 and up to 1, or one for each query head"),
        ("threshold", [], "it must be a number above 0 and up to 1, or one for each query head"),
        ("threshold", "most", "it must be a number above 0 and up to 1, or one for each query head"),
        ("stride", 7, "stride = 7: it should be 4, 8 or 16"),
        ("stride", 32, "stride = 32: it should be 4, 8 or 16"),
        ("treshold", 0.5, "unknown field 'treshold' = 0.5; .* Did you mean 'threshold'?"),
    ],
)
def test_bad_fields_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(SparsekitError, match=said):
        parse_pattern({"name": "xattention", field: value})


def test_yaml_lists_come_back_as_thresholds() -> None:
    pattern = parse_pattern({"name": "xattention", "threshold": [0.5, 1]})
    assert pattern == XAttention(threshold=(0.5, 1.0))
    assert pattern.to_yaml() == {"name": "xattention", "threshold": [0.5, 1.0]}
    assert hash(pattern) == hash(XAttention(threshold=(0.5, 1.0)))

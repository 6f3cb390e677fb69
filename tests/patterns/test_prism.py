"""prism: its choice against the definition in float64; bands, temperature, chunks, padding, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.patterns import Blocks, Prism, parse_pattern
from sparsekit.plan import BlockPlan
from sparsekit.testing import inputs_for

SOFT = Softmax(0.25)
DIM = 16


def _inputs(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Blocks whose means differ in each band, so that both softmaxes have something to choose."""
    q, k, _ = inputs_for(geometry)
    g = torch.Generator().manual_seed(3)
    for x in (q, k):
        blocks = torch.randn(*x.shape[:2], -(-x.shape[2] // 128), 16, generator=g) * 3
        x += blocks.repeat_interleave(128, 2)[:, :, -x.shape[2] :]
    return q, k


def _kept(plan: BlockPlan) -> Tensor:
    """bool (H, R, C): key blocks that each block of 128 queries keeps. One sample, whole blocks."""
    return plan.to_mask()[0].unflatten(1, (-1, 128)).any(2)[:, :, ::128]


def _definition(pattern: Prism, q: Tensor, k: Tensor, softmax: Softmax) -> tuple[Tensor, float]:
    """bool (H, R, C) of one sample of whole blocks, by loops in float64, with the published temperature; and the least
    distance of a sum from the share that decided."""
    heads, dim = q.shape[1], q.shape[3]
    mq, mk = (x[0].double().unflatten(1, (-1, 128)).mean(2) for x in (q, k))
    blocks = mq.shape[1]
    kept, least = torch.zeros(heads, blocks, blocks, dtype=torch.bool), math.inf
    half = dim // 2
    n_low, n_high = round(pattern.low_share * half), round(pattern.high_share * half)
    bands = [[i + off for off in (0, half) for i in at] for at in (range(half - n_low, half), range(n_high))]

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    for h in range(heads):
        a, b = mq[h], mk[h * mk.shape[0] // heads]
        for band in bands:
            t = math.sqrt(len(band) / dim) * rms(a[:, band]) / rms(a) * rms(b[:, band]) / rms(b)
            for r in range(blocks):
                z = [
                    float(a[r, band] @ b[c, band]) * softmax.scale * math.sqrt(dim) / (math.sqrt(len(band)) * t)
                    for c in range(r + 1)
                ]
                if softmax.softcap is not None:
                    z = [softmax.softcap * math.tanh(one / softmax.softcap) for one in z]
                weights = torch.tensor(z, dtype=torch.float64).softmax(0).tolist()
                total = 0.0
                for c in sorted(range(r + 1), key=lambda c: (-weights[c], c)):
                    least = min(least, abs(total - pattern.top_p))
                    if total >= pattern.top_p:
                        break
                    kept[h, r, c] = True
                    total += weights[c]
        kept[h, :, 0] = True
        kept[h].fill_diagonal_(True)
    return kept, least


@pytest.mark.parametrize("softmax", [SOFT, Softmax(0.25, 2.0), Softmax(0.25, None, torch.full((4,), 3.0))], ids=str)
@pytest.mark.parametrize(
    "pattern", [Prism(), Prism(top_p=0.5), Prism(top_p=0.8, low_share=0.5, high_share=0.25)], ids=str
)
def test_the_definition_in_float64(pattern: Prism, softmax: Softmax) -> None:
    geometry = Geometry.of(128 * 9, block_kv=128)
    q, k = _inputs(geometry)
    expected, least = _definition(pattern, q, k, softmax)
    assert least > 1e-5, "a tie in float32, so this tests nothing"
    assert torch.equal(_kept(pattern.select(q, k, geometry, softmax)), expected)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert int((~expected & causal).sum()) > 4 * 2, "nothing was dropped, so this tests nothing"


def test_the_union_is_of_both_bands() -> None:
    """Block 2 answers in the low band alone, block 4 in the high band alone; a whole mean would keep one of them."""
    geometry = Geometry.of(128 * 8, block_kv=128)
    q, k, _ = inputs_for(geometry)
    q[:], k[:] = 0.01, 0.0
    q[..., 0], q[..., 7] = 1.0, 100.0  # high, low
    k[:, :, 2 * 128 : 3 * 128, 7] = 10.0
    k[:, :, 4 * 128 : 5 * 128, 0] = 10.0
    pattern = Prism(top_p=0.9, low_share=0.5, high_share=0.5)
    kept = _kept(pattern.select(q, k, geometry, Softmax(1.0)))
    assert kept[0, 6].nonzero().flatten().tolist() == [0, 2, 4, 6]


def test_a_band_without_energy_keeps_a_share_of_everything() -> None:
    geometry = Geometry.of(128 * 8, block_kv=128)
    q, k, _ = inputs_for(geometry)
    q[:] = 0.0
    kept = _kept(Prism(top_p=0.5).select(q, k, geometry, SOFT))
    assert kept[0, 7].nonzero().flatten().tolist() == [0, 1, 2, 3, 7]


def test_scores_carry_two_bands_a_head() -> None:
    geometry = Geometry.of(300)
    q, k, _ = inputs_for(geometry)
    blocks = Blocks(q, k, geometry, SOFT, 128)
    assert Prism().score(blocks, 0, 3).shape == (1, 8, 3, 3)


def test_padding_changes_nothing() -> None:
    bounds = ((0, 900), (37, 900), (150, 810), (200, 230))
    padded = Geometry.of(900, batch=4, kv_start=[a for a, _ in bounds], kv_end=[b for _, b in bounds])
    q, k = _inputs(padded)
    pattern = Prism(top_p=0.5)
    mask = pattern.select(q, k, padded, SOFT).to_mask()
    assert int(mask[0].sum()) < 4 * 900 * 901 // 2
    for b, (low, high) in enumerate(bounds):
        alone = pattern.select(q[b : b + 1, :, low:high], k[b : b + 1, :, low:high], Geometry.of(high - low), SOFT)
        assert (mask[b, :, low:high, low:high] == alone.to_mask()[0]).all()  # of one head where all are alike


def test_a_chunk_whose_queries_have_the_prompts_energy_selects_as_the_whole() -> None:
    """The temperature is the one thing that a chunk reads from all of its queries."""
    geometry = Geometry.of(128 * 8)
    q, k = _inputs(geometry)
    q[:, :, 512:] = q[:, :, :512]
    pattern = Prism(top_p=0.5)
    whole = pattern.select(q, k, geometry, SOFT).to_mask()[:, :, 512:]
    chunk = pattern.select(q[:, :, 512:], k, Geometry.of(512, 1024), SOFT).to_mask()
    assert torch.equal(chunk, whole)
    assert not whole.all()


def test_one_keeps_everything() -> None:
    geometry = Geometry.of(700)
    q, k = _inputs(geometry)
    assert Prism(top_p=1.0).select(q, k, geometry, SOFT).all_dense


def test_an_odd_head_is_refused() -> None:
    geometry = Geometry.of(300)
    q, k = _inputs(geometry)
    with pytest.raises(SparsekitError, match="prism: head size 15: it must be even"):
        Prism().select(q[..., :15], k[..., :15], geometry, SOFT)


@pytest.mark.parametrize(("field", "value"), [("top_p", 0.0), ("top_p", 1.5), ("low_share", 0.0), ("high_share", 2.0)])
def test_bad_fields_are_refused(field: str, value: float) -> None:
    with pytest.raises(SparsekitError, match=rf"{field} = {value}"):
        parse_pattern({"name": "prism", field: value})

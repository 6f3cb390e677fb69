"""flashprefill: its choice against the definition in float64; sinks, window, last rows; chunks, padding, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select import block_scores, near_top_bits, query_block_lse
from sparsekit.kernels.select.bits import unpack_bits
from sparsekit.kernels.select.grid import block_grid
from sparsekit.patterns import Blocks, FlashPrefill, parse_pattern
from sparsekit.plan import BlockPlan
from sparsekit.testing import GEOMETRIES, inputs_for

SOFT = Softmax(0.25)
BARE = {"sink_blocks": 0, "window_blocks": 1, "last_blocks": 0}


def _inputs(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Blocks whose mean keys differ, so that a row has something to choose."""
    q, k, _ = inputs_for(geometry)
    g = torch.Generator().manual_seed(3)
    blocks = torch.randn(*k.shape[:2], -(-k.shape[2] // 128), 16, generator=g) * 3
    k += blocks.repeat_interleave(128, 2)[:, :, -k.shape[2] :]
    return q, k


def _kept(plan: BlockPlan) -> Tensor:
    """bool (H, R, C): key blocks that each block of 128 queries keeps. One sample, whole blocks."""
    return plan.to_mask()[0].unflatten(1, (-1, 128)).any(2)[:, :, ::128]


def _definition(pattern: FlashPrefill, q: Tensor, k: Tensor, softmax: Softmax) -> tuple[Tensor, float]:
    """bool (H, R, C) of one sample of whole blocks, by loops in float64; and the least distance from the threshold."""
    heads = q.shape[1]
    queries = q[0].double().unflatten(1, (-1, 128))
    means = k[0].double().unflatten(1, (-1, 128)).mean(2)
    blocks = means.shape[1]
    kept, least = torch.zeros(heads, blocks, blocks, dtype=torch.bool), math.inf
    for h in range(heads):
        for r in range(blocks):
            z = queries[h, r] @ means[h * means.shape[0] // heads, : r + 1].T * softmax.scale
            if softmax.softcap is not None:
                z = softmax.softcap * torch.tanh(z / softmax.softcap)
            scores = torch.exp(z - z.max()).mean(0)
            for c in range(r + 1):
                ratio = float(scores[c] / scores.max())
                least = min(least, abs(ratio - pattern.alpha)) if ratio < 1 else least
                always = c < pattern.sink_blocks or c > r - pattern.window_blocks
                kept[h, r, c] = always or ratio >= pattern.alpha or r >= blocks - pattern.last_blocks
    return kept, least


@pytest.mark.parametrize("softmax", [SOFT, Softmax(0.25, 6.0), Softmax(0.25, None, torch.full((4,), 3.0))], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        FlashPrefill(alpha=0.3, last_blocks=2),
        FlashPrefill(alpha=0.5, sink_blocks=1, window_blocks=2, last_blocks=1),
        FlashPrefill(alpha=1.0, **BARE),
    ],
    ids=str,
)
def test_the_definition_in_float64(pattern: FlashPrefill, softmax: Softmax) -> None:
    geometry = Geometry.of(128 * 12, block_kv=128)
    q, k = _inputs(geometry)
    expected, least = _definition(pattern, q, k, softmax)
    assert least > 1e-5, "a tie in float32, so this tests nothing"
    assert torch.equal(_kept(pattern.select(q, k, geometry, softmax)), expected)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    assert int((~expected & causal).sum()) > 4 * 2, "nothing was dropped, so this tests nothing"


@pytest.mark.parametrize("softmax", [SOFT, Softmax(0.25, 2.0)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g.q_len}-{g.kv_len}-{g.batch}-{g.block_q}")
def test_scores_by_loops(geometry: Geometry, softmax: Softmax, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, 128, geometry.batch, q.device)
    means = Blocks(q, k, geometry, softmax, 128).key_means
    assert torch.equal(means, Blocks(q, k, geometry, softmax, 128).means[1])
    got = query_block_lse(q, means, geometry, grid, 128, softmax)
    monkeypatch.setattr(block_scores, "SCRATCH_BYTES", 1)
    assert torch.allclose(query_block_lse(q, means, geometry, grid, 128, softmax), got, atol=1e-5)
    for b, span in enumerate(geometry.spans):
        for r in range(grid.rows):
            own = span.q_first // 128 + r
            rows = range(max(own * 128, span.q_first), min((own + 1) * 128, span.q_end))
            assert bool((got[b, :, r, own + 1 if rows else 0 :] == -torch.inf).all())
            for c in range(own + 1 if rows else 0):
                queries = torch.stack([q[b, :, geometry.q_index(b, i)] for i in rows], 1).double()
                key = means[b, :, c].double().repeat_interleave(2, 0)
                z = (queries * key[:, None]).sum(-1) * softmax.scale
                if softmax.softcap is not None:
                    z = softmax.softcap * torch.tanh(z / softmax.softcap)
                assert torch.allclose(got[b, :, r, c].double(), z.exp().sum(1).log(), atol=1e-5)


def test_near_the_largest() -> None:
    scores = torch.tensor(
        [[0.0, -1.0, -0.5, -3.0], [-torch.inf] * 4, [torch.nan, -2.0, torch.inf, 1.0], [5.0, 5.0, 5.0, 9.0]]
    )
    lengths = torch.tensor([4, 4, 4, 3], dtype=torch.int32)

    def kept(**more: int) -> list[list[int]]:
        bits = near_top_bits(scores, 0.5, lengths=lengths, **more)
        return [row.nonzero().flatten().tolist() for row in unpack_bits(bits, 4)]

    assert kept() == [[0, 2], [], [2], [0, 1, 2]]
    assert kept(first=1, last=1) == [[0, 2, 3], [0, 3], [0, 2, 3], [0, 1, 2]]
    assert kept(last=2)[1] == [2, 3]


def test_padding_changes_nothing() -> None:
    bounds = ((0, 900), (37, 900), (150, 810), (200, 230))
    padded = Geometry.of(900, batch=4, kv_start=[a for a, _ in bounds], kv_end=[b for _, b in bounds])
    q, k = _inputs(padded)
    pattern = FlashPrefill(alpha=0.5, sink_blocks=1, window_blocks=1, last_blocks=1)
    mask = pattern.select(q, k, padded, SOFT).to_mask()
    assert int(mask[0].sum()) < 4 * 900 * 901 // 2
    for b, (low, high) in enumerate(bounds):
        alone = pattern.select(q[b : b + 1, :, low:high], k[b : b + 1, :, low:high], Geometry.of(high - low), SOFT)
        assert (mask[b, :, low:high, low:high] == alone.to_mask()[0]).all()  # of one head where all are alike


@pytest.mark.parametrize("last_blocks", [0, 2])
def test_a_chunk_of_a_known_prompt_selects_as_the_whole(last_blocks: int) -> None:
    whole = Geometry.of(1000)
    q, k = _inputs(whole)
    pattern = FlashPrefill(alpha=0.5, sink_blocks=1, window_blocks=1, last_blocks=last_blocks)
    expected = pattern.select(q, k, whole, SOFT).to_mask()
    for low, high in ((0, 384), (384, 640), (640, 1000)):
        chunk = Geometry.of(high - low, high, prompt_len=1000)
        got = pattern.select(q[:, :, low:high], k[:, :, :high], chunk, SOFT).to_mask()
        assert torch.equal(got, expected[:, :, low:high, :high])


def test_what_is_kept_always_may_be_everything() -> None:
    geometry = Geometry.of(1024)
    q, k = _inputs(geometry)
    for fields in ({}, {"last_blocks": 0, "sink_blocks": 4, "window_blocks": 4}):
        assert FlashPrefill(**fields).select(q, k, geometry, SOFT).all_dense
    assert not FlashPrefill(last_blocks=1).select(q, k, geometry, SOFT).all_dense


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", 0.0), ("alpha", 1.5), ("sink_blocks", -1), ("window_blocks", 0), ("last_blocks", -1)]
)
def test_bad_fields_are_refused(field: str, value: float) -> None:
    with pytest.raises(SparsekitError, match=rf"{field} = {value}"):
        parse_pattern({"name": "flashprefill", field: value})

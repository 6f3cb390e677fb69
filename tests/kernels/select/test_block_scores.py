"""Block scores on the torch path against loops over tokens; the Triton path is held to the torch path elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select import block_scores
from sparsekit.kernels.select.block_scores import antidiagonal_mass, pooled_means, pooled_scores, row_groups
from sparsekit.kernels.select.grid import block_grid
from sparsekit.testing import GEOMETRIES, inputs_for

CPU = torch.device("cpu")
IDS = [f"{g.q_len}-{g.kv_len}-{g.batch}-{g.block_q}x{g.block_kv}" for g in GEOMETRIES]


@pytest.mark.parametrize("block_tokens", [64, 128])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_means_are_over_the_tokens_there_are(geometry: Geometry, block_tokens: int) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, block_tokens, geometry.batch, CPU)
    mean_q, mean_k = pooled_means(q, k, geometry, grid, block_tokens)
    scores = pooled_scores(mean_q, mean_k, grid, block_tokens)
    for b, span in enumerate(geometry.spans):
        first = span.q_first // block_tokens
        for r in range(grid.rows):
            low, high = max((first + r) * block_tokens, span.q_first), min((first + r + 1) * block_tokens, span.q_end)
            if low >= high:
                assert bool((scores[b, :, r] == -torch.inf).all())
                continue
            query = q[b, :, geometry.q_index(b, low) : geometry.q_index(b, high)].mean(1)
            assert torch.allclose(mean_q[b, :, r], query, atol=1e-6)
            for c in range(grid.columns):
                if c > first + r:
                    assert bool((scores[b, :, r, c] == -torch.inf).all())
                    continue
                at = geometry.kv_start[b]
                key = k[b, :, at + c * block_tokens : at + min((c + 1) * block_tokens, span.q_end)].mean(1)
                expected = (query.unflatten(0, (2, 2)) * key[:, None]).sum(-1).flatten()
                assert torch.allclose(scores[b, :, r, c], expected, atol=1e-5)


def test_no_block_is_added_to_whole_ones() -> None:
    assert block_grid(Geometry.of(256), 64, 1, CPU).columns == 4
    assert block_grid(Geometry.of(257), 64, 1, CPU).columns == 5


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_one_tile_is_the_mean_of_its_antidiagonal(stride: int) -> None:
    """Two stride rows: the softmax of the second row's two logits, each a mean of `stride` products / sqrt(d)."""
    dim = 2 * stride
    geometry = Geometry.of(2 * stride)
    q, k = torch.zeros(1, 1, 2 * stride, dim), torch.zeros(1, 1, 2 * stride, dim)
    for s in range(stride):  # query stride - 1 - s of the second tile meets key s of the first, weight s + 1
        q[0, 0, 2 * stride - 1 - s, s] = s + 1.0
        k[0, 0, s, s] = 3.0
    logit = 3.0 * sum(range(1, stride + 1)) / stride / math.sqrt(dim)
    grid = block_grid(geometry, 128, 1, CPU)
    # Blocks as small as a stride show the tile itself.
    small = block_grid(geometry, 16, 1, CPU) if stride == 16 else None
    mass = antidiagonal_mass(q, k, geometry, grid, 128, stride, Softmax(dim**-0.5))
    assert float(mass[0, 0, 0, 0]) == pytest.approx(2.0)  # two stride rows
    if small is not None:
        mass = antidiagonal_mass(q, k, geometry, small, 16, stride, Softmax(dim**-0.5))
        share = math.exp(logit) / (math.exp(logit) + 1)
        assert mass[0, 0].flatten().tolist() == pytest.approx([1, 0, share, 1 - share], rel=1e-5)


@pytest.mark.parametrize("softmax", [Softmax(0.25), Softmax(0.25, 2.0), Softmax(0.25, None, torch.ones(4))], ids=str)
@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_masses_by_loops(geometry: Geometry, stride: int, softmax: Softmax) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, 128, geometry.batch, CPU)
    got = antidiagonal_mass(q, k, geometry, grid, 128, stride, softmax)
    for b, span in enumerate(geometry.spans):
        expected = torch.zeros(4, grid.rows, grid.columns)
        first, start = span.q_first // 128, geometry.kv_start[b]
        keys = k[b, :, start : start + span.q_end].repeat_interleave(2, 0)
        for i in range(span.q_first // stride, -(-span.q_end // stride)):
            rows = range(max(i * stride, span.q_first), min((i + 1) * stride, span.q_end))
            logits = torch.zeros(4, i + 1)
            for pos in rows:
                s = stride * i + stride - 1 - pos
                there = torch.arange(i + 1) * stride + s
                column = there < span.q_end
                query = q[b, :, geometry.q_index(b, pos)]
                logits[:, column] += torch.einsum("hd,hjd->hj", query, keys[:, there[column]])
            logits = logits * softmax.scale / len(rows)
            if softmax.softcap is not None:
                logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
            weights = logits.exp()
            total = weights.sum(-1, keepdim=True)
            if softmax.sink_logits is not None:
                total = total + softmax.sink_logits.exp()[:, None] / stride
            block = torch.arange(i + 1) * stride // 128
            expected[:, i * stride // 128 - first].index_add_(1, block, weights / total)
        assert torch.allclose(got[b], expected, atol=1e-5)


@pytest.mark.parametrize("first", [128, 256])
def test_a_chunk_scores_as_the_whole(first: int) -> None:
    whole = Geometry.of(500)
    q, k, _ = inputs_for(whole)
    chunk = Geometry.of(500 - first, 500)
    both = []
    for geometry, queries in ((whole, q), (chunk, q[:, :, first:])):
        grid = block_grid(geometry, 128, 1, CPU)
        mass = antidiagonal_mass(queries, k, geometry, grid, 128, 16, Softmax(0.25))
        both.append((mass, pooled_scores(*pooled_means(queries, k, geometry, grid, 128), grid, 128)))
    for of_all, of_chunk in zip(*both, strict=True):
        assert torch.allclose(of_all[:, :, first // 128 :], of_chunk, atol=1e-6)


def test_padding_changes_nothing() -> None:
    padded = Geometry.of(300, batch=3, kv_start=(0, 37, 140), kv_end=(300, 300, 290))
    q, k, _ = inputs_for(padded)
    grid = block_grid(padded, 64, 3, CPU)
    wide = block_grid(padded, 128, 3, CPU)
    scores = pooled_scores(*pooled_means(q, k, padded, grid, 64), grid, 64)
    mass = antidiagonal_mass(q, k, padded, wide, 128, 16, Softmax(0.25))
    for b, (low, high) in enumerate(zip(padded.kv_start, padded.kv_end, strict=True)):
        alone = Geometry.of(high - low)
        inner = (q[b : b + 1, :, low:high], k[b : b + 1, :, low:high], alone)
        small = block_grid(alone, 64, 1, CPU)
        expected = pooled_scores(*pooled_means(*inner, small, 64), small, 64)
        assert torch.allclose(scores[b : b + 1, :, : small.rows, : small.columns], expected, atol=1e-6)
        small = block_grid(alone, 128, 1, CPU)
        expected = antidiagonal_mass(*inner, small, 128, 16, Softmax(0.25))
        assert torch.allclose(mass[b : b + 1, :, : small.rows, : small.columns], expected, atol=1e-6)


def test_groups_of_rows_cover_all_and_fit() -> None:
    for rows, row_bytes in ((1, 1), (1024, 1 << 20), (2048, 1 << 18), (16384, 1 << 21), (5, 1 << 40)):
        groups = list(row_groups(rows, row_bytes))
        assert [first for first, _ in groups] == [sum(n for _, n in groups[:i]) for i in range(len(groups))]
        assert sum(n for _, n in groups) == rows
        assert all(n * row_bytes <= block_scores.SCRATCH_BYTES or n == 1 for _, n in groups)

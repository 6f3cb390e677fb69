"""block_topk and xattention on a CUDA card: Triton paths against torch paths on the same scores, and no wait for the
device in any `select`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import poisoned_memory, tensors
from test_select import random_bits, rows_of
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.select import block_scores_triton
from sparsekit.kernels.select.block_scores import antidiagonal_mass, pooled_means, pooled_scores
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import block_grid, head_lengths
from sparsekit.kernels.select.topk import top_p_bits, topk_bits, topk_indices_mask
from sparsekit.patterns import BlockTopK, DynamicPattern, XAttention
from sparsekit.plan import BlockPlan
from sparsekit.testing import GEOMETRIES

pytestmark = pytest.mark.gpu

CASES = {
    "whole": Geometry.of(4096, block_kv=128),
    "odd": Geometry.of(3001, block_kv=64),
    "chunk": Geometry.of(777, 3000, q_offset=2000, block_kv=128),
    "padded": Geometry.of(1000, batch=3, kv_start=(0, 100, 443), block_kv=64),
    "padded by strides": Geometry.of(1024, batch=2, kv_start=(0, 128), block_kv=128),
    "right padded": Geometry.of(1000, batch=2, kv_end=(1000, 300), block_kv=128),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS: list[DynamicPattern] = [
    BlockTopK(top_k=5),
    BlockTopK(top_k=3, block_tokens=128, force_sink=False, force_diagonal=False),
    XAttention(threshold=0.5),
    XAttention(threshold=(0.3, 0.5, 0.9, 1.0), stride=8),
    XAttention(threshold=0.7, stride=4),
]


def _inputs(geometry: Geometry, dtype: torch.dtype, dim: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.cuda() for x in tensors(geometry, dtype, dim=dim))
    q[..., 0], k[..., 0] = 4.0, 0.0
    for i in range(0, geometry.kv_len, 700):
        k[:, :, i + 31 : i + 60, 0] = 6.0
    return q, k, v


def _both(pick: object, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    return tuple(pick(*args, impl=impl, **options) for impl in ("torch", "triton"))  # type: ignore[operator, return-value]


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _same(one: BlockPlan, two: BlockPlan) -> None:
    assert one.geometry == two.geometry
    for name in ("row_ptr", "dense_rows", "entries"):
        mine, theirs = getattr(one, name), getattr(two, name)
        n = min(mine.numel(), theirs.numel())
        assert torch.equal(mine[:n], theirs[:n]), name


@pytest.mark.parametrize("columns", [1, 33, 300, 1024, 2048, 5000, 16384])
def test_rows(columns: int) -> None:
    scores = rows_of(64, columns).cuda()
    lengths = torch.randint(0, columns + 1, (64,), dtype=torch.int32).cuda()
    for force in ({}, {"force_first": True, "force_last": True}):
        for k in (0, 1, 100, columns, lengths.flip(0)):
            for given in (None, lengths):
                assert torch.equal(*_both(topk_bits, scores, k, lengths=given, **force)), k
        for p in (0.1, 0.9, 1 - 1e-12, 1.0, torch.rand(64, dtype=torch.float64).cuda()):
            for given in (None, lengths):
                assert torch.equal(*_both(top_p_bits, scores.exp(), p, lengths=given, **force)), p


@pytest.mark.parametrize("columns", [100, 20000, 131072, 1 << 20])
def test_long_rows(columns: int) -> None:
    scores = rows_of(16, columns).cuda()
    scores[8] = scores[8].round(decimals=2)
    for k in (0, 1, 1000, columns // 2, columns + 9):
        assert torch.equal(*_both(topk_indices_mask, scores, k)), k


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
def test_plans(block_tokens: int) -> None:
    for geometry in (*GEOMETRIES, *CASES.values()):
        bits = random_bits(geometry, block_tokens).cuda()
        bits[:, 1] = -1
        for capacity in (None, 100):
            plans = (
                plan_from_block_bits(bits, geometry, block_tokens, capacity=capacity, impl=impl)
                for impl in ("torch", "triton")
            )
            _same(*plans)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scores(name: str, dtype: torch.dtype) -> None:
    geometry = CASES[name]
    q, k, _ = _inputs(geometry, dtype)
    for block_tokens in (64, 128):
        grid = block_grid(geometry, block_tokens, geometry.batch, q.device)
        lengths = head_lengths(geometry, block_tokens, geometry.batch, 4, q.device)
        seen = torch.arange(grid.columns, device="cuda") < lengths[..., None]
        with poisoned_memory():
            means, again = _both(pooled_means, q, k, geometry, grid, block_tokens)
            for one, two in zip(means, again, strict=True):
                assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)
            scores = pooled_scores(*means, grid, block_tokens, impl="torch")
            for exact, most in ((True, 1e-5), (False, 2e-3)):  # tf32 keeps 11 bits of each factor
                got = pooled_scores(*means, grid, block_tokens, exact=exact, impl="triton")
                assert float((got - scores)[seen].abs().max()) <= most * float(scores[seen].abs().max())
            halves = pooled_means(q, k, geometry, grid, block_tokens, half=True, impl="triton")
            got = pooled_scores(*halves, grid, block_tokens, impl="triton")
            assert float((got - scores)[seen].abs().max()) <= 2e-3 * float(scores[seen].abs().max())


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_antidiagonals(name: str, dtype: torch.dtype, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = CASES[name]
    q, k, _ = _inputs(geometry, dtype)
    grid = block_grid(geometry, 128, geometry.batch, q.device)
    lengths = head_lengths(geometry, 128, geometry.batch, 4, q.device)
    seen = torch.arange(grid.columns, device="cuda") < lengths[..., None]
    has = block_scores_triton._has_tma
    monkeypatch.setattr(block_scores_triton, "_has_tma", lambda device: tma and has(device))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).cuda()
    for stride, softmax in ((4, Softmax(0.09)), (8, Softmax(0.09, 5.0)), (16, Softmax(0.09, None, sinks))):
        with poisoned_memory():
            expected, got = _both(antidiagonal_mass, q, k, geometry, grid, 128, stride, softmax)
        # Masses of a block of queries add up to 128 / stride; exponentials of float32 logits are good to 1e-5.
        assert float((got - expected)[seen].abs().max()) <= 1e-4 * 128 / stride


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 192, 256])
def test_head_sizes(dim: int) -> None:
    for dtype in DTYPES:
        q, k, _ = _inputs(CASES["odd"], dtype, dim)
        grid = block_grid(CASES["odd"], 128, 1, q.device)
        expected, got = _both(antidiagonal_mass, q, k, CASES["odd"], grid, 128, 16, Softmax(dim**-0.5))
        assert float((got.tril() - expected).abs().max()) <= 1e-3
        for one, two in zip(*_both(pooled_means, q, k, CASES["odd"], grid, 128), strict=True):
            assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_select_never_waits_and_repeats(name: str, pattern: DynamicPattern) -> None:
    geometry = CASES[name]
    q, k, v = _inputs(geometry, torch.bfloat16)
    with no_sync():  # the first call too: what it uploads must not wait
        plan = pattern.select(q, k, geometry, Softmax(128**-0.5))
        again = pattern.select(q, k, geometry, Softmax(128**-0.5))
    _same(plan, again)
    often = plan.multiplicity()
    assert int(often.max()) == 1
    expected = attend(q, k, v, plan, impl="reference")
    got = attend(q, k, v, plan)
    assert float((got.float() - expected.float()).norm() / expected.float().norm()) < 1e-2  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_nan_and_inf(fill: float, pattern: DynamicPattern) -> None:
    geometry = CASES["whole"]
    q, k, _ = _inputs(geometry, torch.bfloat16)
    for rows in (slice(70, 71), slice(None)):
        q[:, 0, rows], k[:, 1, rows] = fill, fill
        plan = pattern.select(q, k, geometry, Softmax(128**-0.5))
        often = plan.multiplicity()
        assert int(often.max()) == 1
        assert not torch.triu(often, 1).any()
        assert bool((often.diagonal(dim1=-2, dim2=-1) == 1).all())


@pytest.mark.parametrize("pattern", [BlockTopK(), XAttention()], ids=str)
def test_a_million_tokens_fit(pattern: DynamicPattern) -> None:
    tokens = 1 << 20
    q = torch.randn(1, tokens, 32, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(1, tokens, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_sync():
        plan = pattern.select(q, k, Geometry.of(tokens, block_kv=128), Softmax(0.125))
    assert plan.row_ptr is not None and plan.entries is not None
    assert int(plan.row_ptr[-1]) <= plan.entries.numel()
    assert torch.cuda.max_memory_allocated() - before < 4 << 30

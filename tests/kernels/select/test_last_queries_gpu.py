"""vertical_slash and flexprefill on a CUDA card: Triton paths against torch paths, the same plan from the same sums,
and no wait for the device in any `select`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import poisoned_memory, tensors
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.select.bits import pack_bits, unpack_bits
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.flexprefill import flex_bits
from sparsekit.kernels.select.grid import Budgets
from sparsekit.kernels.select.last_queries import last_query_sums
from sparsekit.kernels.select.slash import plan_from_vertical_slash
from sparsekit.kernels.select.topk import topk_indices_mask
from sparsekit.patterns import DynamicPattern, FlexPrefill, VerticalSlash
from sparsekit.plan import BlockPlan

pytestmark = pytest.mark.gpu

CASES = {
    "whole": Geometry.of(2048, block_kv=128),
    "odd": Geometry.of(1501, block_kv=64),
    "chunk": Geometry.of(777, 1900, q_offset=1000, block_kv=128),
    "padded": Geometry.of(1200, batch=3, kv_start=(0, 100, 443), block_kv=64),
    "right padded": Geometry.of(1200, batch=2, kv_end=(1200, 300), block_kv=128),
    "batch": Geometry.of(1024, batch=2, block_kv=128),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS: list[DynamicPattern] = [
    VerticalSlash(vertical_tokens=100, slash_tokens=200),
    VerticalSlash(vertical_tokens=30, slash_tokens=100, estimate_queries=128),
    FlexPrefill(gamma=0.5, min_budget_tokens=128),
    FlexPrefill(gamma=0.3, tau=1.0, min_budget_tokens=1),
    FlexPrefill(gamma=0.7, tau=0.0, min_budget_tokens=1, max_budget_tokens=512),
]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def _inputs(geometry: Geometry, dtype: torch.dtype, dim: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """With a few hundred keys that all queries look for."""
    q, k, v = (x.cuda() for x in tensors(geometry, dtype, dim=dim))
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    for i in range(0, geometry.kv_len, 700):
        k[:, :, i + 31 : i + 60, 0] = 12.0
    return q, k, v


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
    assert one.row_ptr is not None
    assert one.tensors.keys() == two.tensors.keys()
    for name, mine in one.tensors.items():
        n = int(one.row_ptr[-1]) if name == "entries" else len(mine)
        assert torch.equal(mine[:n], two.tensors[name][:n]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sums(name: str, dtype: torch.dtype) -> None:
    geometry = CASES[name]
    for dim in (64, 128, 256):
        q, k, _ = _inputs(geometry, dtype, dim)
        for softmax in (Softmax(dim**-0.5), Softmax(dim**-0.5, softcap=5.0, sink_logits=SINKS.cuda())):
            for queries in (1, 20, 64, 128):
                if dtype == torch.float32 and dim * 16 > (2048 if queries <= 64 else 1024):
                    continue
                expected = last_query_sums(q, k, geometry, softmax, queries, impl="torch")
                with poisoned_memory():
                    got, again = (last_query_sums(q, k, geometry, softmax, queries, impl="triton") for _ in range(2))
                assert torch.equal(got, again)
                # Products are exact in float32 and added in another order: a few units of the largest logit.
                assert float((got - expected).abs().max()) < 1e-4 * queries
                assert float((got - expected).abs().sum() / expected.abs().sum()) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_vertical_slash_from_the_same_sums(name: str) -> None:
    geometry = CASES[name]
    q, k, _ = _inputs(geometry, torch.bfloat16)
    tokens = max(span.q_end for span in geometry.spans)
    sums = last_query_sums(
        q, k, geometry, Softmax(128**-0.5), 64, force_columns=30, force_distances=100, impl="triton"
    )  # fmt: skip
    wanted = torch.tensor([100, 200], dtype=torch.int32, device="cuda").repeat_interleave(sums[0].numel() // tokens)
    for width in (32, 64, 128):
        for capacity in (None, 3000):
            plans = []
            for impl in ("torch", "triton"):
                bits = topk_indices_mask(sums.view(-1, tokens), wanted, impl=impl).view(2, geometry.batch, 4, -1)
                with poisoned_memory():
                    plan = plan_from_vertical_slash(bits, geometry, 100, 200, width, capacity=capacity, impl=impl)
                plans.append(plan)
            _same(*plans)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 1.0])
def test_vertical_slash_of_random_bits(share: float) -> None:
    geometry = Geometry.of(20000, block_kv=128)
    chosen = torch.rand(2, 1, 3, 20000, device="cuda") < share
    chosen[1, ..., 0] = True
    bits = pack_bits(chosen)
    most = [int(kind.sum(-1).max()) for kind in chosen]
    _same(*(plan_from_vertical_slash(bits, geometry, *most, 64, impl=impl) for impl in ("torch", "triton")))


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_flexprefill_from_the_same_sums(name: str, tau: float) -> None:
    geometry = CASES[name]
    q, k, _ = _inputs(geometry, torch.float32, 64)
    softmax, budgets = Softmax(0.125), Budgets(0.5, tau, 1, 20)
    sums = last_query_sums(q, k, geometry, softmax, 128, impl="triton")
    bits = []
    for impl in ("torch", "triton"):
        with poisoned_memory():
            bits.append(flex_bits(q, k, sums, geometry, softmax, 128, budgets, impl=impl))
    # Block means differ in the last place, and with them a code at its edge, seldom.
    one, two = (unpack_bits(x, x.shape[-1] * 32) for x in bits)
    assert int((one != two).sum()) <= 1e-3 * int(one.sum())
    _same(*(plan_from_block_bits(bits[1], geometry, 128, impl=impl) for impl in ("torch", "triton")))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CASES), ("odd", torch.float16), ("odd", torch.float32)]
)
def test_select_does_not_wait(name: str, dtype: torch.dtype, pattern: DynamicPattern) -> None:
    geometry = CASES[name]
    q, k, v = _inputs(geometry, dtype)
    for softmax in (Softmax(0.1), Softmax(0.1, softcap=5.0, sink_logits=SINKS.cuda())):
        pattern.select(q, k, geometry, softmax)  # compiles
        with no_sync():
            plan = pattern.select(q, k, geometry, softmax)
        _same(plan, pattern.select(q, k, geometry, softmax))
    assert int(plan.multiplicity().max()) == 1
    out, reference = (attend(q, k, v, plan, scale=0.1, impl=impl) for impl in (None, "reference"))
    assert isinstance(out, Tensor) and isinstance(reference, Tensor)
    assert float((out - reference).float().norm() / reference.float().norm()) < 1e-2


@pytest.mark.parametrize("pattern", [VerticalSlash(), FlexPrefill(), FlexPrefill(tau=1.0)], ids=str)
def test_a_million_tokens_plan_in_4_gb(pattern: DynamicPattern) -> None:
    tokens = 1 << 20
    q = torch.randn(1, tokens, 32, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    k = torch.randn(1, tokens, 8, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    geometry = Geometry.of(tokens, block_kv=128)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plan = pattern.select(q, k, geometry, Softmax(0.125))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 << 30
    assert plan.row_ptr is not None and plan.entries is not None
    assert int(plan.row_ptr[-1]) <= plan.entries.numel()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nan_and_inf_leave_a_valid_plan(pattern: DynamicPattern, value: float) -> None:
    geometry = CASES["odd"]
    for where in range(3):
        q, k, _ = _inputs(geometry, torch.bfloat16)
        if where < 2:
            q[0, 1, 1490] = value
        if where > 0:
            k[0, 0, 200] = value
        plan = pattern.select(q, k, geometry, Softmax(0.1))
        often = plan.multiplicity()[0]
        assert int(often.max()) == 1
        assert not bool(often.triu(1).any())
        assert bool((often.diagonal(dim1=1, dim2=2) == 1).all())

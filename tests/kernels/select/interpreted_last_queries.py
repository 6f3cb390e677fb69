"""The Triton paths of the last queries' sums, of vertical-slash plans and of FlexPrefill's blocks, in Triton's
interpreter. `test_last_queries.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before
triton is imported."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import GEOMETRIES, poisoned_memory, tensors
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.select import last_queries_triton, slash_triton
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.flexprefill import flex_bits
from sparsekit.kernels.select.grid import Budgets
from sparsekit.kernels.select.last_queries import last_query_sums
from sparsekit.kernels.select.slash import plan_from_vertical_slash
from sparsekit.kernels.select.topk import topk_indices_mask
from sparsekit.plan import BlockPlan

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
LONG = {
    **GEOMETRIES,
    "700": Geometry.of(700, block_q=128, block_kv=64),
    "long chunk": Geometry.of(200, 900, q_offset=650, block_q=128, block_kv=64),
}


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in as many parts as there are tiles."""
    monkeypatch.setattr(last_queries_triton, "processors_of", lambda device: 60)
    monkeypatch.setattr(last_queries_triton, "MIN_TILES", 1)


def _sums(q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax, queries: int, impl: str) -> Tensor:
    with poisoned_memory():
        return last_query_sums(q, k, geometry, softmax, queries, force_columns=3, force_distances=7, impl=impl)


def _close(got: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert torch.equal(got.isinf(), expected.isinf())
    assert float((got - expected).masked_fill(expected.isinf(), 0).abs().max()) < most


def test_it_is_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("name", LONG)
def test_sums(name: str) -> None:
    geometry = LONG[name]
    q, k, _ = tensors(geometry, torch.float32)
    for queries, softmax in ((20, Softmax(0.25)), (128, Softmax(0.7, softcap=2.0, sink_logits=SINKS))):
        got, expected = (_sums(q, k, geometry, softmax, queries, impl) for impl in ("triton", "torch"))
        _close(got, expected)


@pytest.mark.parametrize("queries", [1, 64, 100])
def test_sums_in_one_part(queries: int) -> None:
    geometry = LONG["long chunk"]
    q, k, _ = tensors(geometry, torch.float32)
    got, expected = (_sums(q, k, geometry, Softmax(0.25), queries, impl) for impl in ("triton", "torch"))
    _close(got, expected)


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(1, 1, 16), (6, 2, 32), (5, 1, 80), (9, 3, 64), (7, 1, 128)])
def test_heads(heads: int, key_heads: int, dim: int) -> None:
    geometry = Geometry.of(150, block_q=64)
    for dtype in (torch.float32, torch.float16):
        q, k, _ = tensors(geometry, dtype, heads=heads, key_heads=key_heads, dim=dim)
        for queries in (30, 128) if dtype == torch.float16 else (30,):
            got, expected = (_sums(q, k, geometry, Softmax(dim**-0.5), queries, impl) for impl in ("triton", "torch"))
            _close(got, expected)


def test_sums_of_nan_and_of_dead_cache_rows() -> None:
    geometry = LONG["chunk of a static cache"]
    q, k, _ = tensors(geometry, torch.float32)
    expected = _sums(q, k, geometry, Softmax(0.25), 64, "triton")
    k[:, :, geometry.kv_end[0] :] = float("nan")
    assert torch.equal(_sums(q, k, geometry, Softmax(0.25), 64, "triton"), expected)
    q[0, 1, 30] = float("nan")
    got, expected = (_sums(q, k, geometry, Softmax(0.25), 64, impl) for impl in ("triton", "torch"))
    assert torch.equal(got.isnan(), expected.isnan())
    assert bool(got[:, 0, 1].isnan().any()) and not bool(got[:, 0, 0].isnan().any())


def test_what_does_not_fit_is_refused() -> None:
    geometry = Geometry.of(65)
    q, k, _ = tensors(geometry, torch.float32, dim=256)
    with pytest.raises(SparsekitError, match=r"impl='triton': 64 last queries of head size 256 in torch.float32"):
        last_query_sums(q, k, geometry, Softmax(0.25), 64, impl="triton")


def _same_plan(one: BlockPlan, two: BlockPlan) -> None:
    assert one.geometry == two.geometry
    assert one.row_ptr is not None
    assert one.tensors.keys() == two.tensors.keys()
    for name, mine in one.tensors.items():
        n = int(one.row_ptr[-1]) if name == "entries" else len(mine)
        assert torch.equal(mine[:n], two.tensors[name][:n]), name


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.02) for name in LONG), ("chunk", 0.0), ("700", 0.3), ("300", 1.0)]
)
def test_vertical_slash_plans(name: str, share: float) -> None:
    geometry = LONG[name]
    tokens = max(span.q_end for span in geometry.spans)
    g = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(2, geometry.batch, 4, tokens, generator=g) < share
    chosen[1, ..., 0] = True
    bits = pack_bits(chosen)
    columns, slashes = (max(int(kind.sum(-1).max()), 1) for kind in chosen)
    for capacity in (None, 30):
        with poisoned_memory():
            plans = [
                plan_from_vertical_slash(
                    bits, geometry, columns, slashes, geometry.block_kv, capacity=capacity, impl=impl
                )
                for impl in ("torch", "triton")
            ]
        _same_plan(*plans)


def test_vertical_slash_plans_in_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More words, and more columns, than a program looks at in one go."""
    monkeypatch.setattr(slash_triton, "WORDS", 4)
    monkeypatch.setattr(slash_triton, "SEARCH", 64)
    geometry = Geometry.of(900, block_q=64, block_kv=32)
    chosen = torch.rand(2, 1, 2, 900, generator=torch.Generator().manual_seed(0)) < 0.15
    chosen[1, ..., 0], chosen[1, 0, 1, 1:700] = True, False
    bits = pack_bits(chosen)
    _same_plan(*(plan_from_vertical_slash(bits, geometry, 200, 900, 32, impl=impl) for impl in ("torch", "triton")))


def test_vertical_slash_from_scores() -> None:
    geometry = LONG["700"]
    q, k, _ = tensors(geometry, torch.float32)
    sums = _sums(3 * q, k, geometry, Softmax(0.25), 64, "triton").view(-1, 700)
    wanted = torch.tensor([40] * 4 + [110] * 4, dtype=torch.int32)
    plans = []
    for impl in ("torch", "triton"):
        bits = topk_indices_mask(sums, wanted, impl=impl).view(2, 1, 4, -1)
        plans.append(plan_from_vertical_slash(bits, geometry, 40, 110, 64, impl=impl))
    _same_plan(*plans)


FLEX = {
    **LONG,
    "1300": Geometry.of(1300, block_q=128, block_kv=64),
    "padded": Geometry.of(450, batch=2, kv_start=(0, 100), block_q=128, block_kv=128),
}


@pytest.mark.parametrize("name", FLEX)
def test_flexprefill_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = FLEX[name]
    q, k, _ = tensors(geometry, torch.float32)
    q[:, 1] *= 5
    cases = (Softmax(0.25), 0.0, 1 << 29), (Softmax(0.25), 1.0, 1 << 29), (Softmax(0.5, softcap=2.0), 0.3, 1)
    for softmax, tau, group in cases if name in ("700", "padded", "chunk") else cases[:1]:
        monkeypatch.setattr(
            "sparsekit.kernels.select.block_scores.SCRATCH_BYTES", group
        )  # all rows at once, and row by row
        sums = last_query_sums(q, k, geometry, softmax, 128, impl="torch")
        budgets = Budgets(0.6, tau, 1, 3)
        with poisoned_memory():
            bits = [flex_bits(q, k, sums, geometry, softmax, 128, budgets, impl=impl) for impl in ("torch", "triton")]
        assert torch.equal(*bits)
        _same_plan(*(plan_from_block_bits(bits[0], geometry, 128, impl=impl) for impl in ("torch", "triton")))

"""s2o on a CUDA card: ranked execution against the definition, both paths of the selection, and no wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

from sparsekit import attention
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose_call
from sparsekit.kernels.select import ranking
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.ranking_triton import bit_positions_triton
from sparsekit.patterns import S2O

pytestmark = pytest.mark.gpu

LONG = Geometry.of(1500, block_kv=128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _inputs(geometry: Geometry, dtype: torch.dtype, **more: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.cuda() for x in peaked(geometry, dtype, **more))  # type: ignore[return-value]


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PATTERNS)
def test_plans(kind: str, dtype: torch.dtype) -> None:
    inputs = _inputs(LONG, dtype, dim=128)
    check_ranked(plan_of(PATTERNS[kind], inputs, LONG), inputs, "triton")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str) -> None:
    inputs = _inputs(GEOMETRIES[name], torch.bfloat16, dim=64)
    for kind in ("stops", "odd segments"):
        check_ranked(plan_of(PATTERNS[kind], inputs, GEOMETRIES[name]), inputs, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_head_sizes(dim: int, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES["300"]
    inputs = _inputs(geometry, dtype, dim=dim)
    check_ranked(plan_of(PATTERNS["stops"], inputs, geometry), inputs, "triton")


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.2}], ids=str)
def test_softmax_variants(options: dict[str, object]) -> None:
    sinks = options.get("sink_logits")
    options = options | ({"sink_logits": sinks.cuda()} if isinstance(sinks, Tensor) else {})
    inputs = _inputs(GEOMETRIES["300"], torch.bfloat16)
    check_ranked(plan_of(PATTERNS["stops"], inputs, GEOMETRIES["300"]), inputs, "triton", **options)  # type: ignore[arg-type]


def test_any_order_of_the_history_without_a_stop() -> None:
    inputs = _inputs(LONG, torch.bfloat16, dim=128)
    plan = plan_of(PATTERNS["everything"], inputs, LONG)
    check_ranked(shuffled(plan.to("cpu")).to("cuda"), inputs, "triton")


def test_a_result_repeats_bit_for_bit() -> None:
    inputs = _inputs(LONG, torch.bfloat16, dim=128)
    plan = plan_of(PATTERNS["stops"], inputs, LONG)
    first, again = attend(*inputs, unvisited(plan)), attend(*inputs, unvisited(plan))
    assert torch.equal(first, again)  # type: ignore[arg-type]


def test_the_door_says_why_it_is_not_the_hopper_form() -> None:
    inputs = _inputs(LONG, torch.bfloat16, dim=128)
    choice = choose_call(*inputs, plan_of(PATTERNS["stops"], inputs, LONG), Softmax(128**-0.5))
    assert choice.impl == "triton"
    assert torch.cuda.get_device_capability() != (9, 0) or "ranked keys with an early stop" in choice.why


@pytest.mark.parametrize("columns", [1, 700, 5000, 131072])
def test_bit_positions(columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    count = (columns + 1) // 2
    mask = torch.rand(5, columns, generator=g).argsort(1).argsort(1) < count
    got = bit_positions_triton(pack_bits(mask).cuda(), count).cpu()
    assert torch.equal(got, mask.nonzero()[:, 1].view(5, count).int())


@pytest.mark.parametrize(("columns", "count"), [(900, 300), (900, 900), (20000, 4096)])
def test_the_largest_keys_of_both_paths(columns: int, count: int) -> None:
    scores = ranking._finite(rows_of(8, columns))
    scores[:, columns - 10 :] = -torch.inf
    count = min(count, columns - 10)
    assert torch.equal(ranking._largest(scores.cuda(), count).cpu(), ranking._largest(scores, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["whole", "padded"])
def test_select_as_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    """The same keys in the same order, but where products differ in rounding."""
    geometry = Geometry.of(2000) if name == "whole" else Geometry.of(1500, batch=2, kv_start=(0, 300))
    inputs = peaked(geometry, dtype, dim=64)
    for pattern in (S2O(segment_tokens=256, max_tokens=300, guide="mean"), S2O(segment_tokens=128, max_tokens=None)):
        here = plan_of(pattern, inputs, geometry)
        there = plan_of(pattern, tuple(x.cuda() for x in inputs), geometry).to("cpu")  # type: ignore[arg-type]
        assert torch.equal(here.tensors["ranked.key_ptr"], there.tensors["ranked.key_ptr"])
        for field in ("keys", "q_index"):
            same = here.tensors[f"ranked.{field}"] == there.tensors[f"ranked.{field}"]
            assert float(same.float().mean()) > 0.99, field


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SELECTIONS, *MISLED, "default", "8192 keys", "16384 keys"])
def test_select_is_that_of_a_cpu(case: str, dtype: torch.dtype) -> None:
    """Of sums that are exact: the same keys in the same order, equals and all."""
    if case in SELECTIONS:
        geometry, pattern, (heads, key_heads) = SELECTIONS[case]
        inputs = whole(geometry, dtype, heads=heads, key_heads=key_heads)
    elif case in MISLED:
        geometry, pattern = Geometry.of(768), S2O(segment_tokens=384, max_tokens=90)
        inputs = tuple(x.to(dtype) for x in misled(case, geometry))  # type: ignore[assignment]
    else:
        geometry = Geometry.of(24576)
        pattern = S2O() if case == "default" else S2O(max_tokens=int(case.split()[0]), segment_tokens=1536)
        inputs = whole(geometry, dtype, dim=128, heads=2, key_heads=1)
    here = plan_of(pattern, inputs, geometry)
    there = plan_of(pattern, tuple(x.cuda() for x in inputs), geometry).to("cpu")  # type: ignore[arg-type]
    for name, tensor in here.tensors.items():
        assert torch.equal(tensor, there.tensors[name]), name


@pytest.mark.parametrize("tokens", [1000, 20000])
def test_the_host_does_not_wait(tokens: int) -> None:
    """Not for the selection, its second time around, nor for the execution, nor for what it visited."""
    geometry = Geometry.of(tokens, block_kv=128)
    inputs = _inputs(geometry, torch.bfloat16, dim=128)
    for pattern in (S2O(), S2O(segment_tokens=256, guide="mean"), S2O(max_tokens=None, guide="last")):
        attend(*inputs, plan_of(pattern, inputs, geometry))
        with _no_waiting():
            plan = plan_of(pattern, inputs, geometry)
            attend(*inputs, plan)
            plan.sums()
        assert 0 < plan.density() <= 1


def test_tau_0_is_dense() -> None:
    inputs = _inputs(Geometry.of(5000), torch.bfloat16, dim=128)
    dense = attention(*inputs, "dense")
    out = attention(*inputs, S2O(tau=0.0, max_tokens=None))
    assert (out.float() - dense.float()).abs().max() < 2e-2  # type: ignore[union-attr]


def test_values_that_are_not_finite() -> None:
    geometry = Geometry.of(3000)
    for value in (float("nan"), float("inf")):
        q, k, v = _inputs(geometry, torch.bfloat16, dim=128)
        k[:, :, 1300, 5], q[:, :, 2000, 7] = value, value
        out = attention(q, k, v, S2O(segment_tokens=256, max_tokens=500))
        assert bool(out[:, :, :1280].isfinite().all())  # type: ignore[index]

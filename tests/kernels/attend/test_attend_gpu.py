"""The kernels on a CUDA card: bfloat16, float16 and float32, every plan and option, into memory that holds NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    A_SHAPE,
    GEOMETRIES,
    TRIANGLE,
    check,
    mixed_plan,
    random_plan,
    rule_plan,
    tensors,
    unaligned_plan,
    with_columns,
)

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose_call, choose_device
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_rule
from sparsekit.plan.memo import TRITON

pytestmark = pytest.mark.gpu

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = Geometry.of(1000, block_q=128, block_kv=64)
CHUNK = Geometry.of(300, 1100, q_offset=700, block_q=128, block_kv=64)
PADDED = Geometry.of(500, batch=3, kv_start=(0, 100, 443), block_q=128, block_kv=64)
PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: rule_plan("dense", LONG),
    "dense chunk": lambda: rule_plan("dense", CHUNK),
    "triangle": lambda: rule_plan(TRIANGLE, LONG, 200),
    "triangle chunk": lambda: rule_plan(TRIANGLE, CHUNK, 200),
    "triangle padded": lambda: rule_plan(TRIANGLE, PADDED, 100),
    "window": lambda: rule_plan(A_SHAPE, LONG, 70),
    "tiles off the grid": lambda: unaligned_plan(LONG, 4),
    "random tiles a key head": lambda: random_plan(LONG, 2),
    "random tiles a query head, padded": lambda: random_plan(PADDED, 4),
    "wide tiles": lambda: random_plan(LONG.with_tile(128, 128), 4),
    "large tiles": lambda: random_plan(LONG.with_tile(256, 256), 4),
    "small tiles": lambda: random_plan(LONG.with_tile(16, 16), 4, 0.05),
    "mixed heads": lambda: mixed_plan(LONG),
    "columns": lambda: with_columns(rule_plan(TRIANGLE, LONG, 100), 200),
    "columns off the grid": lambda: with_columns(unaligned_plan(CHUNK, 2), 90),
}


def _inputs(geometry: Geometry, dtype: torch.dtype, **more: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.cuda() for x in tensors(geometry, dtype, **{"dim": 128, **more}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]()
    check(plan, _inputs(plan.geometry, dtype), "triton", twice=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str) -> None:
    for kind in ("dense", TRIANGLE):
        check(rule_plan(kind, GEOMETRIES[name]), _inputs(GEOMETRIES[name], torch.bfloat16, dim=64), "triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_head_sizes(dim: int, dtype: torch.dtype) -> None:
    for plan in (rule_plan("dense", CHUNK), with_columns(rule_plan(TRIANGLE, LONG, 100), 100)):
        check(plan, _inputs(plan.geometry, dtype, dim=dim), "triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_rows_whose_first_tile_is_wholly_masked(dim: int, dtype: torch.dtype) -> None:
    """A window without sinks: most rows see nothing of the first key tile that their query tile visits."""
    geometry = Geometry.of(1000, block_q=128, block_kv=64)
    plan = plan_from_rule(TokenRule(0, 40, 1000), geometry)
    check(plan, _inputs(geometry, dtype, dim=dim), "triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.2}])
def test_softmax_variants(options: dict[str, object]) -> None:
    options = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    for plan in (rule_plan("dense", CHUNK), rule_plan(TRIANGLE, PADDED, 100)):
        check(plan, _inputs(plan.geometry, torch.bfloat16), "triton", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_cut_over_keys(heads: int) -> None:
    """A short chunk over a long cache, and Triangle's last rows on few heads: against PyTorch in float32."""
    geometry = Geometry.of(100, 20000, block_q=128, block_kv=64)
    whole = Geometry.of(20000, block_q=128, block_kv=64)
    q, k, v = _inputs(whole, torch.bfloat16, heads=heads, key_heads=1)
    chunk = dense_plan(geometry)
    triangle = plan_from_rule(TokenRule(8, 512, 20000 - 100), whole, "cuda")
    exact = _last_rows(q, k, v, 100)
    for plan, rows in ((chunk, q[:, :, -100:]), (triangle, q)):
        out, lse = attend(rows, k, v, plan, impl="triton", return_lse=True)
        launch = next(value for key, value in plan.memo.items() if key[0] == TRITON)
        assert launch.merge_grid[0] > 0, "no row was cut, so this tests nothing"
        error = (out[:, :, -100:].float() - exact[0]).norm() / exact[0].norm()
        assert float(error) < 4e-3  # bfloat16 rounds at 2^-9; SDPA's own is 2e-3 here
        assert float((lse[:, :, -100:] - exact[1]).abs().max()) < 1e-3


def _last_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = k.shape[2]
    scores = q[:, :, -rows:].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    ahead = torch.arange(n, device="cuda") > torch.arange(n - rows, n, device="cuda")[:, None]
    scores = scores.masked_fill(ahead, float("-inf"))
    return scores.softmax(-1) @ v.float(), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    plan = replace(rule_plan(TRIANGLE, LONG, 200).to("cuda"))
    q, k, v = _inputs(LONG, dtype)
    expected = attend(q, k, v, plan, impl="triton")
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    sliced = [x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in fused.split([512, 256, 256], -1)]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :128] for x in (q, k, v)]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    for inputs in ([x.contiguous() for x in (q, k, v)], sliced):
        assert torch.equal(attend(*inputs, plan, impl="triton"), expected)
    for inputs in (odd, shifted):  # loads through pointers: other instructions, so equal up to rounding
        assert torch.allclose(attend(*inputs, plan, impl="triton"), expected, rtol=2e-2, atol=2e-3)


def test_past_2_to_the_31_elements() -> None:
    """The last heads of a k of 2.1 G elements."""
    tokens, heads = 262144, 64
    geometry = Geometry.of(128, tokens, block_q=128, block_kv=64)
    k = torch.zeros(1, heads, tokens, 128, dtype=torch.bfloat16, device="cuda")
    k[:, -1] = torch.randn(tokens, 128, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(1, heads, 128, 128, dtype=torch.bfloat16, device="cuda")
    exact = _last_rows(q[:, -1:], k[:, -1:], k[:, -1:], 128)[0]
    for shift in (0, 1):  # through descriptors, and through pointers
        flat = torch.empty(k.numel() + 1, dtype=torch.bfloat16, device="cuda") if shift else None
        if flat is not None:
            flat[1:] = k.flatten()
            k = flat[1:].view(k.shape)
        out = attend(q, k, k, dense_plan(geometry), impl="triton")
        assert isinstance(out, torch.Tensor)
        assert float((out[:, -1:].float() - exact).norm() / exact.norm()) < 4e-3
        assert not bool(out[:, :-1].any())


def test_the_door() -> None:
    geometry = Geometry.of(300, block_q=128, block_kv=64)
    q, k, v = _inputs(geometry, torch.bfloat16)
    plan = dense_plan(geometry)
    best = choose_device("cuda")
    assert best.impl == ("hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"), best
    odd = choose_call(q.float(), k.float(), v.float(), plan, Softmax(0.1))
    assert odd.impl == "triton", odd
    if best.impl == "hopper":
        assert "float32" in odd.why
        with pytest.raises(SparsekitError, match=r"impl='hopper' does not cover this call: .*float32"):
            attend(q.float(), k.float(), v.float(), plan, impl="hopper")
    with pytest.raises(SparsekitError, match="on one device"):
        attend(q, k.cpu(), v, plan)
    with pytest.raises(SparsekitError, match=r"plan\.row_ptr is on cpu, q on cuda:0"):
        attend(q, k, v, rule_plan(TRIANGLE, geometry))
    with pytest.raises(SparsekitError, match="head size 20"):
        attend(q[..., :20], k[..., :20], v[..., :20], plan)
    with pytest.raises(SparsekitError, match="dtype float64"):
        attend(q.double(), k.double(), v.double(), plan)


def test_a_result_repeats_bit_for_bit() -> None:
    plan = plan_from_rule(TokenRule(8, 512, 20000 - 100), Geometry.of(20000), "cuda")
    q, k, v = _inputs(plan.geometry, torch.bfloat16)
    first = attend(q, k, v, plan, impl="triton")
    for _ in range(20):
        assert torch.equal(attend(q, k, v, plan, impl="triton"), first)

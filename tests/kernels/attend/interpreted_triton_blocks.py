"""The portable Triton kernel in Triton's interpreter, on the CPU. `test_triton_blocks.py` runs this file in a process
its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    A_SHAPE,
    GEOMETRIES,
    TRIANGLE,
    check,
    in_pages,
    loose_plans,
    mixed_plan,
    poisoned_memory,
    random_plan,
    rule_plan,
    tensors,
    unaligned_plan,
    with_columns,
)

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose, launch
from sparsekit.kernels.attend import triton_blocks
from sparsekit.kernels.primitives import MASKED, UNSEEN, _softmax_step
from sparsekit.patterns import S2O, Triangle, Union
from sparsekit.plan import BlockPlan
from sparsekit.plan.memo import TRITON

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
G150 = Geometry.of(150, block_q=64, block_kv=64)
CHUNK = GEOMETRIES["chunk"]

# Plans made by hand, one for each thing a plan can hold; 4 query heads over 2 key heads.
PLANS: dict[str, Callable[[], BlockPlan]] = {
    "tiles off the grid": lambda: unaligned_plan(G150, 1),
    "tiles off the grid in a chunk": lambda: unaligned_plan(CHUNK, 2, step=51),
    "a plan for each key head": lambda: random_plan(G150, 2),
    "a plan for each query head": lambda: random_plan(G150, 4),
    "a plan for each sample": lambda: random_plan(GEOMETRIES["left padding"], 2),
    "heads with patterns of their own": lambda: mixed_plan(G150),
    "heads with patterns of their own, padded": lambda: mixed_plan(GEOMETRIES["padded chunk"]),
    "columns": lambda: with_columns(rule_plan(A_SHAPE, G150), 70),
    "columns of each head, off the grid": lambda: with_columns(unaligned_plan(CHUNK, 4, step=51), 33),
    "columns and dense rows": lambda: with_columns(rule_plan(TRIANGLE, G150, 9), 120),
    "columns alone": lambda: with_columns(_own_tiles_only(G150), 64),
    "no launch order": lambda: replace(rule_plan(TRIANGLE, G150), order=None),
}


def _own_tiles_only(geometry: Geometry) -> BlockPlan:
    return random_plan(geometry, 1, density=0.0)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the copy engine's descriptors, as on compute capability 9.0 and above; without it, through pointers."""
    monkeypatch.setattr(triton_blocks, "_has_tma", lambda device: True)


@pytest.fixture
def cut_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows cut over keys, as on a card whose processors are many for the work."""
    monkeypatch.setattr(triton_blocks, "processors_of", lambda device: 1000)
    monkeypatch.setattr(triton_blocks, "MIN_CHUNK_STEPS", 2)


def test_it_is_interpreted() -> None:
    assert launch.interpreted()
    assert choose("cpu", "triton") == "triton"
    assert choose("cpu") == "torch"


@pytest.mark.parametrize("kind", ["dense", TRIANGLE])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, kind: str) -> None:
    geometry = GEOMETRIES[name]
    check(rule_plan(kind, geometry), tensors(geometry, torch.float32, heads=2, key_heads=1), "triton")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_through_descriptors(name: str) -> None:
    geometry = GEOMETRIES[name]
    check(rule_plan(TRIANGLE, geometry), tensors(geometry, torch.float16, heads=2, key_heads=1), "triton")


def test_unions() -> None:
    pattern = Union(of=(Triangle(sink_tokens=2, window_tokens=9, last_tokens=5), Triangle(window_tokens=30)))
    q, k, v = tensors(G150, torch.float32)
    check(pattern.plan(q, k, G150, Softmax(0.25)), (q, k, v), "triton")


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    plan = PLANS[name]()
    check(plan, tensors(plan.geometry, torch.float32), "triton")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("name", ["tiles off the grid in a chunk", "columns and dense rows", "a plan for each sample"])
def test_plans_through_descriptors(name: str) -> None:
    plan = PLANS[name]()
    check(plan, tensors(plan.geometry, torch.float16), "triton")


LOOSE_GEOMETRY = Geometry.of(300, block_q=64, block_kv=64)


@triton.jit
def _two_tiles(p_m, p_norm, p_acc, factor, N: tl.constexpr):
    """A wholly masked tile of logits, then one of zeros; m and norm after each."""
    lane, square = tl.arange(0, N), tl.zeros([N, N], tl.float32)
    m, norm, acc = tl.full([N], UNSEEN, tl.float32), tl.zeros([N], tl.float32), square
    m, norm, acc = _softmax_step(square + MASKED, square + 1.0, m, norm, acc, factor, "ieee")
    tl.store(p_m + lane, m)
    tl.store(p_norm + lane, norm)
    m, norm, acc = _softmax_step(square, square + 1.0, m, norm, acc, factor, "ieee")
    tl.store(p_m + N + lane, m)
    tl.store(p_norm + N + lane, norm)
    tl.store(p_acc + lane[:, None] * N + lane[None, :], acc)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
def test_a_wholly_masked_tile_adds_nothing(dim: int) -> None:
    """Not what a later tile would scale away: with a fused multiply-add it may be inf, and inf * 0 is NaN."""
    m, norm, acc = torch.empty(2, 16), torch.empty(2, 16), torch.empty(16, 16)
    _two_tiles[(1,)](m, norm, acc, dim**-0.5 * 1.4426950408889634, N=16)
    assert (m == torch.tensor([[-1e15], [0.0]])).all()
    assert (norm == torch.tensor([[0.0], [16.0]])).all()
    assert (acc == 16).all()


@pytest.mark.parametrize("options", [{}, {"sink_logits": SINKS[:2]}], ids=["plain", "sinks"])
@pytest.mark.parametrize("cut", [False, True])
def test_nan_stays_nan(cut: bool, options: dict[str, torch.Tensor], request: pytest.FixtureRequest) -> None:
    """A query of NaN is not one without keys, whose row is 0."""
    if cut:
        request.getfixturevalue("cut_rows")
    geometry = GEOMETRIES["300"]
    q, k, v = tensors(geometry, torch.float32, heads=2, key_heads=1)
    q[0, 1, -2] = torch.nan
    for plan in (rule_plan("dense", geometry), replace(rule_plan(TRIANGLE, geometry), long_rows=2)):
        out, lse = attend(q, k, v, plan, impl="triton", return_lse=True, **options)  # type: ignore[arg-type]
        assert out[0, 1, -2].isnan().all()
        assert lse[0, 1, -2].isnan()
        assert int(out.isnan().any(-1).sum()) == int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("kind", loose_plans(LOOSE_GEOMETRY))
def test_rows_that_keep_nothing_give_zero(kind: str) -> None:
    """Of plans that nobody checked: 0 and -inf, also where a sink logit would have joined."""
    plan, (q, k, v) = loose_plans(LOOSE_GEOMETRY)[kind], tensors(LOOSE_GEOMETRY, torch.float32)
    for softcap, sinks in ((None, None), (5.0, SINKS), (None, SINKS.new_tensor([0.5, float("-inf"), 2.0, 0.0]))):
        options = {"softcap": softcap, "sink_logits": sinks, "return_lse": True}
        expected, expected_lse = attend(q, k, v, plan, impl="reference", **options)  # type: ignore[arg-type]
        with poisoned_memory():
            out, lse = attend(q, k, v, plan, impl="triton", **options)  # type: ignore[arg-type]
        nothing = expected_lse == float("-inf")
        assert bool(nothing.any())
        assert bool((out[nothing] == 0).all()) and torch.equal(lse == float("-inf"), nothing)
        assert float((out - expected).abs().max()) < 1e-5
        assert torch.allclose(lse[~nothing], expected_lse[~nothing], atol=1e-5)


@pytest.mark.usefixtures("cut_rows")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("300", {"sink_logits": SINKS[:2]}),
        ("chunk of a static cache", {}),
        ("left padding", {}),
        ("left padding", {"sink_logits": SINKS[:2]}),
        ("tile of 256 by 128", {}),
    ],
    ids=["300-sinks", "chunk", "padding", "padding-sinks", "wide"],
)
def test_rows_cut_over_keys(name: str, options: dict[str, torch.Tensor]) -> None:
    geometry = GEOMETRIES[name]
    plans = [rule_plan("dense", geometry), replace(rule_plan(TRIANGLE, geometry, 9), long_rows=2)]
    if geometry.uniform:
        plans.append(replace(with_columns(plans[1], 40), long_rows=3))
    for plan in plans:
        check(plan, tensors(geometry, torch.float32, heads=2, key_heads=1), "triton", **options)
        launch = next(value for key, value in plan.memo.items() if key[0] == TRITON)
        assert launch.merge_grid[0] > 0, "no row was cut, so this tests nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.7}], ids=str)
def test_softmax_variants(options: dict[str, object], dtype: torch.dtype) -> None:
    for plan in (rule_plan(TRIANGLE, CHUNK), rule_plan("dense", G150)):
        check(plan, tensors(plan.geometry, dtype), "triton", twice=True, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cut_rows")
@pytest.mark.parametrize("sinks", [SINKS.repeat_interleave(2)[::2], SINKS[:1].expand(4)], ids=["every second", "one"])
def test_sink_logits_with_a_stride(sinks: torch.Tensor) -> None:
    assert sinks.shape == (4,)
    assert not sinks.is_contiguous()
    for plan in (rule_plan(TRIANGLE, CHUNK), rule_plan("dense", Geometry.of(257, block_q=64, block_kv=64))):
        check(plan, tensors(plan.geometry, torch.float32), "triton", twice=True, sink_logits=sinks)
    launch = next(value for key, value in plan.memo.items() if key[0] == TRITON)
    assert launch.merge_grid[0] > 0, "no row was cut, so this tests less"


@pytest.mark.parametrize("dim", launch.HEAD_SIZES)
def test_head_sizes(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(65, 100, block_q=64, block_kv=64)
    for tma in (False, True):
        monkeypatch.setattr(triton_blocks, "_has_tma", lambda device, tma=tma: tma)
        check(rule_plan(TRIANGLE, geometry, 30), tensors(geometry, torch.float16, dim=dim), "triton")


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (5, 1), (9, 3)])
def test_heads(heads: int, key_heads: int) -> None:
    geometry = Geometry.of(65, block_q=64, block_kv=64)
    inputs = tensors(geometry, torch.float32, heads=heads, key_heads=key_heads)
    for plan in (rule_plan("dense", geometry), random_plan(geometry, heads), random_plan(geometry, key_heads)):
        check(plan, inputs, "triton")


@pytest.mark.usefixtures("descriptors")
def test_strides() -> None:
    """Heads-first, tokens-first, slices of a fused projection, and strides or addresses that descriptors refuse."""
    geometry, plan = G150, rule_plan(TRIANGLE, G150)
    q, k, v = tensors(geometry, torch.float16)
    expected = attend(q, k, v, plan, impl="triton")
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    sliced = [x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in fused.split([64, 32, 32], -1)]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :16] for x in (q, k, v)]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    for inputs in ([x.contiguous() for x in (q, k, v)], sliced, odd, shifted):
        assert torch.equal(attend(*inputs, plan, impl="triton"), expected)
    assert not triton_blocks._steps_fit_tma(odd[0])
    assert triton_blocks._steps_fit_tma(sliced[0])


@pytest.mark.parametrize("tma", [False, True])
def test_dead_cache_rows_are_not_read(tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a static cache holds past its last valid key may be anything."""
    monkeypatch.setattr(triton_blocks, "_has_tma", lambda device: tma)
    geometry = GEOMETRIES["chunk of a static cache"]
    q, k, v = tensors(geometry, torch.float32)
    dead = slice(geometry.kv_end[0], None)
    for plan in (rule_plan("dense", geometry), rule_plan(TRIANGLE, geometry)):
        expected = attend(q, k, v, plan, impl="triton")
        k[:, :, dead], v[:, :, dead] = float("nan"), float("nan")
        assert torch.equal(attend(q, k, v, plan, impl="triton"), expected)


WIDE_CHUNK = Geometry.of(70, 290, q_offset=210, block_q=64, block_kv=64)
RAGGED = Geometry.of(70, batch=2, kv_end=(70, 33), block_q=64, block_kv=64)
# page, head size, dtype, plan, options: each page size, all ways to read keys, and every value of the other ones.
IN_PAGES: dict[str, tuple[int, int, torch.dtype, Callable[[], BlockPlan], dict[str, object]]] = {
    "dense": (16, 64, torch.float32, lambda: rule_plan("dense", WIDE_CHUNK), {}),
    "triangle": (32, 128, torch.float16, lambda: rule_plan(TRIANGLE, WIDE_CHUNK), {"sink_logits": SINKS}),
    "off the grid": (64, 64, torch.float32, lambda: unaligned_plan(WIDE_CHUNK, 2, step=51), {"softcap": 5.0}),
    "columns": (128, 64, torch.float16, lambda: with_columns(rule_plan(A_SHAPE, WIDE_CHUNK), 40), {}),
    "one page": (256, 128, torch.float32, lambda: rule_plan(TRIANGLE, CHUNK), {}),
    "ragged": (16, 64, torch.float32, lambda: rule_plan(TRIANGLE, RAGGED), {"sink_logits": SINKS, "softcap": 5.0}),
    "no power of two": (48, 64, torch.float32, lambda: rule_plan(TRIANGLE, WIDE_CHUNK), {}),
}


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("name", IN_PAGES)
def test_keys_in_pages(name: str) -> None:
    page, dim, dtype, make, options = IN_PAGES[name]
    plan = make()
    check(plan, tensors(plan.geometry, dtype, dim=dim), "triton", page=page, **options)  # type: ignore[arg-type]


def test_a_page_may_span_more_than_int32_counts() -> None:
    """A page may be a whole cache, whose last key is 2^31 elements behind its first; few of these are touched."""
    geometry, far = Geometry.of(40, block_q=16, block_kv=16), 1 << 26
    q, k, v = tensors(geometry, torch.float16, heads=1, key_heads=1, dim=16)
    memory = torch.empty(40 * far, dtype=torch.float16)
    pages = [memory.as_strided(k.shape, (40 * far, 40 * far, far, 1), at) for at in (0, 16)]
    for page, x in zip(pages, (k, v), strict=True):
        page.copy_(x)
    plan, table = rule_plan("dense", geometry), torch.zeros(1, 1, dtype=torch.int32)
    assert torch.equal(attend(q, *pages, plan, table=table, impl="triton"), attend(q, k, v, plan, impl="triton"))  # type: ignore[arg-type]


def test_ranked_keys_in_pages() -> None:
    q, k, v = tensors(G150, torch.float32, heads=2, key_heads=1)
    plan = S2O(segment_tokens=64, dense_below_tokens=0, max_tokens=64).plan(q, k, G150, Softmax(0.25))
    assert plan.ranked is not None
    there = in_pages(k, v, G150, 32)
    expected = attend(q, k, v, plan, impl="triton")
    assert torch.equal(attend(q, there.k, there.v, plan, table=there.table, impl="triton"), expected)  # type: ignore[arg-type]


def test_a_result_repeats_bit_for_bit() -> None:
    plan = rule_plan(TRIANGLE, G150)
    q, k, v = tensors(G150, torch.float32)
    assert torch.equal(attend(q, k, v, plan, impl="triton"), attend(q, k, v, plan, impl="triton"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 20}, "head size 20: impl='triton' takes 16, 32"),
        ({"dtype": torch.float64}, "dtype float64: impl='triton'"),
        ({"dtype": torch.bfloat16}, "bfloat16: Triton's interpreter computes it wrongly"),
        ({"stride": True}, r"k has strides \(.*\): impl='triton' needs the last one to be 1"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, object], message: str) -> None:
    geometry = Geometry.of(65, block_q=64, block_kv=64)
    dim, dtype = change.get("dim", 16), change.get("dtype", torch.float32)
    q, k, v = tensors(geometry, dtype, dim=dim)  # type: ignore[arg-type]
    if "stride" in change:
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    options = {key: change[key] for key in ("scale", "softcap") if key in change}
    with pytest.raises(SparsekitError, match=message):
        attend(q, k, v, rule_plan("dense", geometry), impl="triton", **options)  # type: ignore[arg-type]

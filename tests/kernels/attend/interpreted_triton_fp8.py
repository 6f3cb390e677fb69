"""The portable FP8 form in Triton's interpreter, beside torch that rounds the same numbers; `test_triton_fp8.py` runs
this file in a process of its own. The interpreter has no NaN in e4m3, so what is not finite is tested on a card."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    GEOMETRIES,
    TRIANGLE,
    in_pages,
    loose_plans,
    mixed_plan,
    poisoned_memory,
    random_plan,
    rule_plan,
    tensors,
    within_rows,
)
from torch import Tensor

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose
from sparsekit.kernels.attend import triton_blocks, triton_e4m3
from sparsekit.kernels.attend.fp8 import BLOCK_KEYS, key_blocks
from sparsekit.models import tiny
from sparsekit.plan import BlockPlan, dense_plan
from sparsekit.plan.memo import TRITON

SINKS = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
WHOLE = Geometry.of(300, block_q=128, block_kv=128)
LONG = Geometry.of(40, 700, block_q=128, block_kv=128)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the copy engine's descriptors, as on compute capability 9.0 and above; without it, through pointers."""
    monkeypatch.setattr(triton_blocks, "_has_tma", lambda device: True)


# ---- torch that rounds


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def _in_blocks(x: Tensor, common: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Keys or values (G, n, D) less `common` (G, D): rounded (G, blocks, 128, D), and a scale for each 128."""
    rest = x.float() - common[:, None].float()
    rest = torch.nn.functional.pad(rest, (0, 0, 0, blocks * BLOCK_KEYS - x.shape[1])).unflatten(1, (blocks, BLOCK_KEYS))
    scale = rest.abs().amax((-2, -1)).clamp(min=1e-12) / 448
    return _e4m3(rest * (1 / scale)[..., None, None]), scale


def rounded(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, common: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32, of q, k, v and weights in e4m3: `common` (B, G, 2, D) taken off keys and values, the
    softmax's maximum followed in steps of so many keys."""
    heads, group, g = q.shape[1], q.shape[1] // k.shape[1], plan.geometry
    blocks, mask = key_blocks(g), plan.to_mask()
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    to_log2 = math.log2(math.e) * (1 if softmax.softcap else softmax.scale)
    largest = q.float().abs().amax(-1).clamp(min=1e-12)
    q8, q_scale = _e4m3(q.float() * (1 / largest * 448)[..., None]), largest / 448
    outs, lses = [], []
    for b, (start, end) in enumerate(zip(g.kv_start, g.kv_end, strict=True)):
        (k8, k_scale), (v8, v_scale) = (
            _in_blocks(x[b, :, start:end], common[b, :, i], blocks) for i, x in enumerate((k, v))
        )
        kept = torch.nn.functional.pad(mask[b, :, :, start:end], (0, blocks * BLOCK_KEYS - (end - start)))
        top, total, acc = torch.full(q.shape[1:3], -1e15), torch.zeros(q.shape[1:3]), torch.zeros(q.shape[1:])
        for first in range(0, blocks * BLOCK_KEYS, step):
            block, at = first // BLOCK_KEYS, slice(first % BLOCK_KEYS, first % BLOCK_KEYS + step)
            keys, values = (x[:, block, at].repeat_interleave(group, 0) for x in (k8, v8))
            by = q_scale[b] * k_scale[:, block].repeat_interleave(group, 0)[:, None]
            v_log = v_scale[:, block].log2().repeat_interleave(group, 0)[:, None]
            logits = q8[b] @ keys.mT
            if softmax.softcap:
                logits = softmax.softcap * torch.tanh(logits * by[..., None] * softmax.scale / softmax.softcap)
                by = torch.ones_like(by)
            logits = logits.masked_fill(~kept[:, :, first : first + step], -torch.inf)
            by = by * to_log2
            higher = torch.maximum(top, logits.amax(-1) * by + v_log)
            weights = torch.exp2(logits * by[..., None] + (v_log + 8 - higher)[..., None])
            shrunk = torch.exp2(top - higher)
            total = total * shrunk + weights.sum(-1) * torch.exp2(-v_log)
            acc, top = acc * shrunk[..., None] + _e4m3(weights) @ values, higher
        off_k, off_v = (common[b, :, i].float().repeat_interleave(group, 0) for i in (0, 1))
        acc = acc + total[..., None] * off_v[:, None]
        lse = (
            (top - 8).double() * math.log(2)
            + total.double().log()
            + (q[b].double() @ off_k.double()[..., None])[..., 0] * softmax.scale
        )
        joined = softmax.join(lse[None])[0]
        share = torch.exp(lse - joined) / total.double()
        seen = kept.any(-1)
        outs.append(torch.where(seen[..., None], acc * share[..., None].nan_to_num(), 0.0))
        lses.append(torch.where(seen, joined, -torch.inf))
    return torch.stack(outs), torch.stack(lses)


def agrees(
    plan: BlockPlan, inputs: tuple[Tensor, Tensor, Tensor], keys: Keys | None = None, most: float = 0.06, **options: Any
) -> None:
    """As torch that rounds, but for what another order of a sum rounds otherwise; as far from float64 as that, and no
    farther than `most`."""
    q, k, v = inputs
    given_k, given_v, table = keys or Keys(k, v)
    softmax = Softmax(options.get("scale") or q.shape[3] ** -0.5, options.get("softcap"), options.get("sink_logits"))
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    exact, exact_lse = attend(q.double(), k.double(), v.double(), plan, impl="reference", return_lse=True, **wide)
    with poisoned_memory():
        common = triton_e4m3.quantised(Keys(k, v), plan.geometry, softmax.softcap is None, True)[3]
        out, lse = attend(q, given_k, given_v, plan, impl="triton_fp8", table=table, return_lse=True, **options)
        alone = within_rows(q, given_k, given_v, plan, "triton_fp8", table=table, **options)
    expected, expected_lse = rounded(q, k, v, plan, softmax, common, _launch(plan).tile.block_n)
    seen = exact_lse.isfinite()
    assert torch.equal(out, alone) and not out[~seen].any() and torch.equal(lse.isfinite(), seen)
    expected, far = expected.to(out.dtype).double(), float((out.double() - exact).norm())
    if _launch(plan).merge_grid[0] == 0:  # of rows that are cut each part follows its own maximum
        assert float((out.double() - expected).norm()) <= 0.02 * far
    assert far <= most * float(exact.norm())
    assert far <= 1.01 * float((expected - exact).norm())
    if seen.any():
        assert float((lse - expected_lse)[seen].abs().max()) < 1e-4


def _launch(plan: BlockPlan) -> triton_blocks._Launch:
    [launch] = [value for key, value in plan.memo.items() if key[0] == TRITON]
    return launch


# ---- what it computes

TILED = {name: geometry for name, geometry in GEOMETRIES.items() if geometry.block_kv != 16}
PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: dense_plan(WHOLE),
    "a rule": lambda: rule_plan(TRIANGLE, WHOLE),
    "a rule, padded": lambda: rule_plan(
        TRIANGLE, Geometry.of(300, batch=2, kv_start=(0, 137), block_q=128, block_kv=128)
    ),
    "a list a head": lambda: random_plan(WHOLE, 4),
    "a list a key head, padded": lambda: random_plan(Geometry.of(200, batch=2, kv_start=(0, 40), block_kv=128), 2),
    "a list, in tiles of 64": lambda: random_plan(GEOMETRIES["left padding"], 2),
    "a list, of a chunk": lambda: random_plan(GEOMETRIES["chunk"], 1),
    "heads with patterns of their own": lambda: mixed_plan(WHOLE),
    "rows without entries": lambda: _loose("rows without entries"),
    "a rule that keeps nothing": lambda: _loose("a rule that keeps nothing"),
    "no entry at all": lambda: _loose("no entry at all"),
    "no keys at all": lambda: dense_plan(Geometry.of(100, batch=2, kv_end=(0, 0), block_q=128, block_kv=128)),
}


def _loose(name: str) -> BlockPlan:
    return replace(loose_plans(GEOMETRIES["300 of 64 by 32"])[name], on_grid=True)


@pytest.mark.parametrize("name", TILED)
def test_geometries(name: str) -> None:
    agrees(rule_plan(TRIANGLE, TILED[name]), tensors(TILED[name], torch.float16, heads=2, key_heads=1, dim=64))


@pytest.mark.parametrize("name", ["one", "chunk of a static cache", "left padding", "all padding"])
def test_dense(name: str) -> None:
    agrees(dense_plan(TILED[name]), tensors(TILED[name], torch.float16, heads=2, key_heads=1, dim=64))


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    plan = PLANS[name]()
    agrees(plan, tensors(plan.geometry, torch.float16, dim=64))


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("name", ["dense", "a rule, padded", "a list, of a chunk", "no keys at all"])
def test_plans_through_descriptors(name: str) -> None:
    plan = PLANS[name]()
    agrees(plan, tensors(plan.geometry, torch.float16, dim=64))


@pytest.mark.parametrize("dim", [128, 256])
def test_head_sizes(dim: int) -> None:
    plan = rule_plan(TRIANGLE, GEOMETRIES["chunk"])
    agrees(plan, tensors(plan.geometry, torch.float16, dim=dim))


OPTIONS: list[dict[str, Any]] = [{"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.03}, {"scale": 0.3}]


@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 3.0, "sink_logits": SINKS}], ids=str)
def test_softmax(options: dict[str, Any]) -> None:
    for plan in (dense_plan(WHOLE), rule_plan(TRIANGLE, GEOMETRIES["left padding"])):
        agrees(plan, tensors(plan.geometry, torch.float16, dim=64), most=0.1, **options)


@pytest.mark.parametrize("page", [16, 48])
def test_pages(page: int) -> None:
    geometry = Geometry.of(200, batch=2, kv_end=(200, 130), block_q=128, block_kv=128)
    for plan in (dense_plan(geometry), rule_plan(TRIANGLE, geometry)):
        q, k, v = tensors(geometry, torch.float16, dim=64)
        agrees(plan, (q, k, v), in_pages(k, v, geometry, page))


@pytest.fixture
def cut_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows cut over keys, as on a card whose processors are many for the work."""
    monkeypatch.setattr(triton_blocks, "processors_of", lambda device: 1000)
    monkeypatch.setattr(triton_blocks, "MIN_CHUNK_STEPS", 2)


LARGE_SINKS = torch.tensor([3.5, -1.0, 2.0, 40.0])


@pytest.mark.parametrize("options", [{}, {"sink_logits": LARGE_SINKS}], ids=["plain", "sinks"])
def test_what_heads_have_in_common(options: dict[str, Any]) -> None:
    """Rounding knows nothing of it, where it is ten times what tells keys and values apart."""
    for plan in (dense_plan(LONG), rule_plan(TRIANGLE, LONG)):
        agrees(plan, _with_in_common(LONG), most=0.01, **options)


@pytest.mark.usefixtures("cut_rows")
@pytest.mark.parametrize("options", [{}, {"sink_logits": LARGE_SINKS}], ids=["plain", "sinks"])
def test_rows_cut_over_keys(options: dict[str, Any]) -> None:
    for plan in (dense_plan(LONG), replace(rule_plan(TRIANGLE, LONG), long_rows=1)):
        agrees(plan, _with_in_common(plan.geometry), most=0.01, **options)
        assert _launch(plan).merge_grid[0] > 0


def _with_in_common(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors(geometry, torch.float16, dim=64)
    common = 10 * torch.randn(2, 1, 2, 1, 64, generator=torch.Generator().manual_seed(1)).half()
    return q, k + common[0], v + common[1]


def test_zeros() -> None:
    """Of q and k at once, and of v: a masked logit is -inf, however small scales are."""
    for plan in (dense_plan(WHOLE), rule_plan(TRIANGLE, WHOLE)):
        q, k, v = tensors(WHOLE, torch.float16, dim=64)
        q[:, :2] = k[:, 0] = v[:, 1] = 0
        agrees(plan, (q, k, v))


def test_other_layouts() -> None:
    """Heads first, and heads within a wider row."""
    for plan in (dense_plan(WHOLE), rule_plan(TRIANGLE, WHOLE)):
        q, k, v = tensors(WHOLE, torch.float16, dim=64)
        both = torch.cat((k, v), -1)
        agrees(plan, (q.contiguous(), both[..., :64], both[..., 64:]))


def test_strides_that_rounding_does_not_take() -> None:
    q, _, v = tensors(WHOLE, torch.float16, dim=64)
    odd = torch.zeros(1, 2, 300, 65, dtype=torch.float16)[..., :64]
    with pytest.raises(SparsekitError, match=r"k with strides \(.*\): the last one 1, and the others multiples of 8"):
        attend(q, odd, v, dense_plan(WHOLE), impl="triton_fp8")


# ---- by name


def test_it_runs_by_name_or_by_its_family() -> None:
    assert choose("cpu") == "torch"
    assert choose("cpu", "triton_fp8") == choose("cpu", "fp8") == "triton_fp8"
    q, k, v = tensors(WHOLE, torch.float16, dim=64)
    one, other = (attend(q, k, v, dense_plan(WHOLE), impl=impl) for impl in ("fp8", "triton_fp8"))
    assert torch.equal(one, other)


def test_layers_of_a_config() -> None:
    model = tiny("llama", head_dim=64).to(torch.float16)
    ids = torch.randint(0, 100, (1, 300), generator=torch.Generator().manual_seed(0))
    triangle = {"name": "triangle", "sink_tokens": 8, "window_tokens": 100, "last_tokens": 20}
    topk = {"name": "block_topk", "top_k": 3, "dense_below_tokens": 0}  # in tiles of 64
    config = {"layers": {"1": triangle, "2": triangle, "3": topk}, "precision": {"2-3": "fp8"}}
    with sparsekit.apply(model, config) as handle, torch.inference_mode():
        model(ids)
        ran = {layer.layer: (layer.impl, layer.impl_why) for layer in handle.report().layers}
    assert ran[1][0] == "torch" and ran[2][0] == ran[3][0] == "triton_fp8"
    assert ran[2][1].startswith("asked for; hopper_fp8: it is not a CUDA device")


# ---- how the interpreter rounds


@triton.jit
def _convert(p_x, p_y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(p_y + at, triton_e4m3._to_e4m3(tl.load(p_x + at)))


def test_rounding_is_torchs() -> None:
    """To the nearest, and of two to the even one: all numbers of e4m3, those between, and their neighbours."""
    held = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (held[1:] + held[:-1]) / 2
    some = torch.cat((held, between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor([1e-12, 448.0001])))
    x = torch.zeros(1024)
    x[: len(some)], x[512 : 512 + len(some)] = some, -some
    y = torch.empty(1024, dtype=torch.float8_e4m3fn)
    _convert[(1,)](x, y, N=1024)
    assert torch.equal(y.float(), _e4m3(x))

"""What runs before the FP8 forms, and behind any Hopper form, in Triton's interpreter; `test_hopper_fp8.py` runs this
file in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import in_pages
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.kernels.attend import triton_e4m3
from sparsekit.kernels.attend.hopper import worklist

ORDER = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])  # of the keys of each 16 in V
WHOLE = Geometry.of(300, block_q=128, block_kv=128)
PADDED = Geometry.of(300, batch=3, kv_start=(0, 37, 290), block_q=128, block_kv=128)
RAGGED = Geometry.of(300, batch=2, kv_end=(300, 130), block_q=128, block_kv=128)
CASES = [(WHOLE, 0), (WHOLE, 48), (PADDED, 0), (RAGGED, 0), (RAGGED, 16), (Geometry.of(128, block_q=128), 0)]


def _exact(geometry: Geometry, gain: float, seed: int) -> Tensor:
    """(B, 2, K, 128) in (B, K, 2, 128) memory, where scales are powers of 2 and e4m3 holds every number: integers to 15
    and a 448 for each key, times `gain`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-15, 16, (geometry.batch, geometry.kv_len, 2, 128), generator=g).float()
    x[..., seed] = 448.0
    return (x * gain).half().transpose(1, 2)


def _valid(x: Tensor, geometry: Geometry, tokens: int) -> Tensor:
    """(B, 2, tokens, 128): each sample's valid rows, then zeros."""
    made = torch.zeros(geometry.batch, 2, tokens, 128)
    for b, (start, end) in enumerate(zip(geometry.kv_start, geometry.kv_end, strict=True)):
        made[b, :, : end - start] = x[b, :, start:end]
    return made


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("geometry", "page"), CASES, ids=str)
def test_quantised(geometry: Geometry, page: int, in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the numbers, each where the products look for it, whatever lies behind a sample's last key."""
    whole = triton_e4m3.launch

    def nothing_in_common(kernel: Any, blocks: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        if kernel is triton_e4m3.in_common:
            args[4].zero_()
        else:
            whole(kernel, blocks, args, options)

    monkeypatch.setattr(triton_e4m3, "launch", nothing_in_common)
    k, v = _exact(geometry, 0.25, 1), _exact(geometry, 2.0, 2)
    keys = Keys(k, v)
    if page:
        keys = in_pages(k, v, geometry, page)
    else:
        for b, end in enumerate(geometry.kv_end):
            k[b, :, end:] = v[b, :, end:] = float("nan")
    k8, v8, scales, _ = triton_e4m3.quantised(keys, geometry, True, in_order)
    tokens = k8.shape[2]
    longest = max(end - start for start, end in zip(geometry.kv_start, geometry.kv_end, strict=True))
    assert tokens == -(-longest // 128) * 128
    assert scales.shape == (geometry.batch, 2, tokens // 128, 2)
    factor = scales[..., 0].repeat_interleave(128, 2)[..., None]
    assert torch.equal(k8.float() * factor, _valid(k, geometry, tokens))
    assert torch.equal(_back(v8, scales, in_order), _valid(v, geometry, tokens))


def _back(v8: Tensor, scales: Tensor, in_order: bool = False) -> Tensor:
    """V (B, G, N, 128) of what the products read."""
    tokens = v8.shape[3]
    back = torch.empty_like(v8, dtype=torch.float32)
    order = torch.arange(16) if in_order else ORDER
    back[..., (torch.arange(tokens) // 16 * 16) + order.repeat(tokens // 16)] = v8.float()
    return (back * scales[..., 1].exp2().repeat_interleave(128, 2)[:, :, None]).transpose(2, 3)


@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize(("geometry", "page"), CASES, ids=str)
def test_what_a_head_has_in_common_is_taken_off(geometry: Geometry, page: int, of_keys: bool) -> None:
    """The mean of some of its keys, and of as many values; what lies behind a sample's last key stays 0."""
    g = torch.Generator().manual_seed(0)
    shape, one = (geometry.batch, geometry.kv_len, 2, 128), (geometry.batch, 1, 2, 128)
    k, v = ((torch.randn(shape, generator=g) + 50 * torch.randn(one, generator=g)).half().transpose(1, 2) for _ in "kv")
    keys = in_pages(k, v, geometry, page) if page else Keys(k, v)
    k8, v8, scales, common = triton_e4m3.quantised(keys, geometry, of_keys, False)
    tokens = k8.shape[2]
    assert common.shape == (geometry.batch, 2, 2, 128)
    count = min(1 << (tokens - 1).bit_length(), triton_e4m3.SAMPLED)
    for b, (start, end) in enumerate(zip(geometry.kv_start, geometry.kv_end, strict=True)):
        sampled = start + torch.arange(count) * (end - start) // count
        torch.testing.assert_close(common[b, :, 0], k[b, :, sampled].float().mean(1).bfloat16() * of_keys)
        torch.testing.assert_close(common[b, :, 1], v[b, :, sampled].float().mean(1).bfloat16())
    k_found = k8.float() * scales[..., 0].repeat_interleave(128, 2)[..., None]
    for i, (x, found) in enumerate(((k, k_found), (v, _back(v8, scales)))):
        rest = _valid(x.float() - common[:, :, i, None].float(), geometry, tokens)
        assert float((found - rest).norm()) < 0.03 * float(rest.norm())
        assert not found[rest.abs().sum(-1) == 0].any()


def test_what_is_not_finite_is_taken_for_nothing_in_common() -> None:
    """Where it is among the sampled; and a sample without keys has nothing, whatever lies there."""
    geometry = Geometry.of(300, batch=2, kv_end=(300, 0), block_q=128, block_kv=128)
    k = torch.randn(2, 2, 300, 128, generator=torch.Generator().manual_seed(0)).half()
    k[1] = 7
    expected = k[0].clone()
    expected[:, 3, 5] = expected[:, 4, 5] = expected[:, 5, 6] = 0
    k[0, :, 3, 5], k[0, :, 4, 5], k[0, :, 5, 6] = torch.inf, -torch.inf, torch.nan
    _, _, scales, common = triton_e4m3.quantised(Keys(k, k), geometry, True, False)
    sampled = expected[:, torch.arange(512) * 300 // 512].float().mean(1)
    torch.testing.assert_close(common[0], torch.stack((sampled, sampled), 1).bfloat16())
    assert not common[1].any()
    assert bool(scales.isfinite().all())


def test_of_many_keys_some_are_sampled() -> None:
    """4,096 of the longest sample's, and as many of one that is short: its own again and again."""
    geometry = Geometry.of(5000, batch=2, kv_end=(5000, 3), block_q=128, block_kv=128)
    k, v = torch.randn(2, 2, 5000, 1, 128, generator=torch.Generator().manual_seed(0)).half().transpose(2, 3)
    common = triton_e4m3.quantised(Keys(k, v), geometry, True, False)[3]
    for b, there in enumerate(geometry.kv_end):
        sampled = torch.arange(4096) * there // 4096
        for i, x in enumerate((k, v)):
            torch.testing.assert_close(common[b, 0, i], x[b, 0, sampled].float().mean(0).bfloat16())


def test_the_mean_of_large_numbers_is_finite() -> None:
    """As bfloat16 has them, whose sum is not: all outputs of the head would be NaN. In float32, for the interpreter."""
    x = 1e38 * (1 + torch.rand(1, 1, 300, 128, generator=torch.Generator().manual_seed(0)))
    _, _, scales, common = triton_e4m3.quantised(Keys(x, x), WHOLE, True, False)
    expected = x[0, 0, torch.arange(512) * 300 // 512].double().mean(0)
    torch.testing.assert_close(common[0, 0].double(), expected.expand(2, -1), rtol=0.01, atol=0.0)
    assert bool(scales.isfinite().all())


@triton.jit
def _scaled(p_x, p_y, p_scale, D: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)[:, None] * D + tl.arange(0, D)[None]
    y, scale = triton_e4m3._scaled(tl.load(p_x + at))
    tl.store(p_y + at, y)
    tl.store(p_scale, scale)


def test_what_is_not_finite_stays_where_it_is() -> None:
    """As NaN, which a card rounds to NaN and the interpreter does not; the numbers beside it are as without it."""
    x = torch.randint(-15, 16, (16, 32)).float()
    x[3, 3] = 56.0
    wrong = torch.zeros_like(x, dtype=torch.bool)
    for at, value in (((2, 9), torch.inf), ((2, 10), -torch.inf), ((15, 0), torch.nan)):
        x[at], wrong[at] = value, True
    y, scale = torch.empty_like(x), torch.empty(1)
    _scaled[(1,)](x, y, scale, D=32)
    assert float(scale) == 0.125
    assert torch.equal(y.isnan(), wrong)
    assert torch.equal(y[~wrong] * 0.125, x[~wrong])


@pytest.mark.parametrize("scale", [1.0, 128**-0.5, 1e-6])
def test_zeros_have_a_factor(scale: float) -> None:
    """A masked logit is -inf times the scales of q and k: were they 0 where both are zeros, a row would be NaN."""
    zeros = torch.zeros(1, 2, 300, 128, dtype=torch.float16)
    k8, v8, scales, _ = triton_e4m3.quantised(Keys(zeros, zeros), WHOLE, True, False)
    assert not k8.float().any()
    assert not v8.float().any()
    of_q = torch.tensor(triton_e4m3.SMALLEST.value) * (scale * math.log2(math.e) / triton_e4m3.LARGEST.value)
    factor = of_q * scales[..., 0]
    assert bool((factor >= torch.finfo(torch.float32).tiny).all())
    assert bool(scales[..., 1].isfinite().all())


@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0])], ids=["plain", "sinks"])
def test_merged(sinks: Tensor | None) -> None:
    """Three parts of a row: all there; one without keys; none with keys; a part of NaN; nothing but NaN."""
    lse = torch.randn(3, 128)
    lse[1, 1] = lse[:, 2] = -torch.inf
    lse[0, 3] = lse[:, 4] = torch.nan
    parts = torch.randn(3, 128, 16)
    merges = torch.tensor([[0, 0, 128 << 8, 3], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    work = worklist._Work(torch.empty(0), None, merges, 3, 0, 0)
    out, out_lse = torch.full((1, 1, 128, 16), torch.nan), torch.full((1, 1, 128), torch.nan)
    worklist._merge(work, (parts, lse), out, out_lse, sinks)
    weight = lse.exp2()
    total = weight.sum(0) + (0 if sinks is None else sinks.exp())
    seen = torch.arange(128) != 2
    expected = torch.where(seen[:, None], (weight[..., None] * parts).sum(0) / total[:, None], 0.0)
    expected_lse = torch.where(seen, total.log(), -torch.inf)
    torch.testing.assert_close(out[0, 0], expected, equal_nan=True)
    torch.testing.assert_close(out_lse[0, 0], expected_lse, equal_nan=True)
    assert bool(out[0, 0, 3:5].isnan().all())

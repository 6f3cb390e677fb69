"""Keys in pages: what they give is what the same keys give in one piece, whoever reads them.

The portable kernel over pages is interpreted with its other cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    check,
    in_pages,
    mixed_plan,
    poisoned_memory,
    random_plan,
    rule_plan,
    tensors,
    unaligned_plan,
    with_columns,
)
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose_call
from sparsekit.kernels.attend.hopper import host
from sparsekit.patterns import S2O, Triangle
from sparsekit.patterns.attention import tiled_for
from sparsekit.plan import BlockPlan, dense_plan, stack_heads

PAGES = (16, 32, 64, 128, 256)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
CHUNK = Geometry.of(70, 290, q_offset=210, block_q=64, block_kv=64)


@pytest.mark.parametrize("page", PAGES)
def test_torch_and_the_definition(page: int) -> None:
    ragged = rule_plan("triangle", Geometry.of(70, batch=2, kv_end=(70, 33), block_q=64, block_kv=64))
    for plan in (ragged, rule_plan("triangle", CHUNK), with_columns(rule_plan("a_shape", CHUNK), 40)):
        for impl in ("torch", "reference"):
            check(plan, tensors(plan.geometry, torch.float32), impl, page=page, softcap=5.0, sink_logits=SINKS)


def test_ranked_keys() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    q, k, v = tensors(geometry, torch.float32)
    plan = S2O(segment_tokens=64, dense_below_tokens=0, max_tokens=64).plan(q, k, geometry, Softmax(0.25))
    assert plan.ranked is not None
    there = in_pages(k, v, geometry, 16)
    expected = attend(q, k, v, plan, impl="torch")
    assert torch.equal(attend(q, there.k, there.v, plan, table=there.table, impl="torch"), expected)


def test_some_keys_side_by_side() -> None:
    """Ranges of pages are a shorter table; ranges of tensors are views where there is one."""
    geometry = Geometry.of(300)
    _, k, v = tensors(geometry, torch.float32)
    there = in_pages(k, v, geometry, 16)
    ranges = ((0, 32), (160, 300))
    wanted = torch.cat([k[:, :, :32], k[:, :, 160:]], 2)
    some = there.at(ranges)
    assert some.table is not None
    assert some.k is there.k
    assert some.table.shape == (1, 11)
    few = Geometry.of(172)
    assert torch.equal(some.gathered_k(few), wanted)
    assert torch.equal(some.gathered(few).v, torch.cat([v[:, :, :32], v[:, :, 160:]], 2))
    assert torch.equal(Keys(k, v).at(ranges).k, wanted)
    assert Keys(k, v).at(((5, 300),)).k.data_ptr() == k[:, :, 5:].data_ptr()
    assert (Keys(k, v).tokens, there.tokens, there.page, Keys(k, v).page) == (300, 320, 16, 0)
    for keys, wrong in (
        (there, ((0, 30), (160, 300))),
        (there, ((8, 300),)),
        (there, ((0, 400),)),
        (some, ((0, 200),)),
    ):
        with pytest.raises(SparsekitError) as error:
            keys.at(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.long(), r"table \(1, 20\) int64: want int32 \(1, pages\), a row for each sample"),
        (lambda t: t[0], r"table \(20,\) int32"),
        (lambda t: t.expand(2, -1), r"table \(2, 20\) int32"),
        (lambda t: t.to("meta"), r"table with strides \(.*\) on meta: want the last one 1, on cpu like q"),
        (lambda t: t[:, ::2], r"table with strides \(20, 2\) on cpu"),
        (lambda t: t[:, :18], "plan for batch 1, 70 queries, 290 keys; got 1, 70, and 18 pages of 16"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(change: Callable[[Tensor], Tensor], message: str) -> None:
    q, k, v = tensors(CHUNK, torch.float32)
    keys = in_pages(k, v, CHUNK, 16)
    assert keys.table is not None
    with pytest.raises(SparsekitError, match=message):
        attend(q, keys.k, keys.v, dense_plan(CHUNK), table=change(keys.table))


def test_pages_have_no_padding_on_the_left() -> None:
    geometry = Geometry.of(70, batch=2, kv_start=(0, 20))
    q, k, v = tensors(geometry, torch.float32)
    keys = in_pages(k, v, Geometry.of(70, batch=2), 16)
    with pytest.raises(SparsekitError, match=r"kv_start=\(0, 20\): in pages each sample's keys begin at 0"):
        attend(q, keys.k, keys.v, dense_plan(geometry), table=keys.table)


def test_what_the_hopper_form_reads_in_pages() -> None:
    geometry = Geometry.of(300, block_q=128, block_kv=128)
    q, k, v = tensors(geometry, torch.bfloat16, dim=128)
    plan, softmax = rule_plan("triangle", geometry), Softmax(0.1)

    def reasons(keys: Keys, plan: BlockPlan = plan) -> list[str]:
        return host.covers(q, keys, plan, softmax, False)

    for page in PAGES:
        for heads_first in (False, True):
            assert reasons(in_pages(k, v, geometry, page, heads_first=heads_first)) == []
    (reason,) = reasons(in_pages(k, v, geometry, 48))
    assert reason == "pages of 48 tokens: one of 16, 32, 64, 128, 256"
    (reason,) = reasons(in_pages(k, v, geometry, 16), unaligned_plan(geometry, 1))
    assert "tiles that start anywhere in pages" in reason
    assert reasons(Keys(k, v), unaligned_plan(geometry, 1)) == []
    cache = torch.zeros(30, 2, 16, 2 * 128 + 1, dtype=q.dtype)  # a scale beside each key
    (reason, *_) = reasons(Keys(cache[..., :128], cache[..., 128:256], in_pages(k, v, geometry, 16).table))
    assert "k with strides" in reason
    assert choose_call(*(x.float() for x in (q, k, v)), plan, softmax).impl == "torch"


def test_plans_know_whether_their_tiles_are_on_the_grid() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    ruled, some = rule_plan("triangle", geometry), random_plan(geometry, 4)
    for plan in (ruled, some, ruled.with_block_kv(32), ruled.to("cpu"), stack_heads([ruled, some], [0, 0, 1, 1])):
        assert plan.on_grid
        assert plan.entries is not None
        assert not bool(((plan.entries >> 2) % plan.block_kv).any())
    assert not stack_heads([ruled, unaligned_plan(geometry, 1)], [0, 1]).on_grid
    assert tiled_for(Triangle(), geometry, torch.zeros(1, 1, 1, 16)) == geometry


# ---- on a card

LONG = Geometry.of(1000, block_q=128, block_kv=128)
MIDDLE = Geometry.of(300, 1100, q_offset=700, block_q=128, block_kv=128)
RAGGED = Geometry.of(700, batch=3, kv_end=(700, 37, 250), block_q=128, block_kv=128)
PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: rule_plan("dense", LONG),
    "dense chunk": lambda: rule_plan("dense", MIDDLE),
    "triangle": lambda: rule_plan("triangle", LONG, 200),
    "triangle chunk": lambda: rule_plan("triangle", MIDDLE, 200),
    "triangle, ragged": lambda: rule_plan("triangle", RAGGED, 100),
    "dense, ragged": lambda: rule_plan("dense", RAGGED),
    "mixed heads": lambda: mixed_plan(LONG),
    "columns": lambda: with_columns(rule_plan("triangle", MIDDLE, 100), 200),
    "tiles of 64": lambda: random_plan(MIDDLE.with_tile(128, 64), 4),
    "tiles of 32": lambda: random_plan(LONG.with_tile(128, 32), 2),
    "rows of 64": lambda: random_plan(MIDDLE.with_tile(64, 64), 4),
}


def _on_card(geometry: Geometry, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors(geometry, dtype, dim=dim)
    return q.cuda(), k.cuda(), v.cuda()


def _agrees(plan: BlockPlan, inputs: tuple[Tensor, Tensor, Tensor], impl: str, page: int, **options: Any) -> None:
    """The Hopper form computes the same from pages bit for bit; the portable one loads otherwise there, and rounds."""
    if impl == "triton":
        check(plan, inputs, impl, page=page, **options)
        return
    (q, k, v), there = inputs, plan.to("cuda")
    pages = in_pages(k, v, plan.geometry, page, heads_first=page % 32 == 0)
    with poisoned_memory():
        expected = attend(q, k, v, there, impl=impl, return_lse=True, **options)
        got = attend(q, pages.k, pages.v, there, table=pages.table, impl=impl, return_lse=True, **options)
    for one, other in zip(got, expected, strict=True):
        differ = int((one != other).sum())
        assert torch.equal(one, other), f"{differ} of {one.numel()} differ, at most by {(one - other).abs().max()}"


# All page sizes where sinks, a window and the diagonal are; others where boxes or steps are cut otherwise.
CARD = [
    *(("triangle chunk", page) for page in PAGES),
    *(("dense, ragged", page) for page in (16, 256)),
    ("dense", 32),
    ("dense chunk", 64),
    ("triangle", 64),
    ("triangle, ragged", 32),
    ("mixed heads", 16),
    *(("columns", page) for page in (16, 128)),
    *(("tiles of 64", page) for page in (16, 256)),
    ("tiles of 32", 64),
    *(("rows of 64", page) for page in (16, 128)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "page"), CARD)
@pytest.mark.parametrize("impl", ["hopper", "triton"])
def test_card(impl: str, name: str, page: int) -> None:
    plan = PLANS[name]()
    _agrees(plan, _on_card(plan.geometry, torch.bfloat16, 128), impl, page)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("impl", ["hopper", "triton"])
def test_card_head_sizes(impl: str, dim: int, page: int) -> None:
    options = {"softcap": 5.0, "sink_logits": SINKS.cuda()}
    plan = rule_plan("triangle", RAGGED, 200)
    _agrees(plan, _on_card(plan.geometry, torch.float16, dim), impl, page, **options)


@pytest.mark.gpu
def test_card_what_no_box_holds_goes_to_the_portable_form() -> None:
    geometry = Geometry.of(300, 1100, q_offset=700, block_q=128, block_kv=64)
    plan = unaligned_plan(geometry, 2).to("cuda")
    q, k, v = _on_card(geometry, torch.bfloat16, 128)
    keys = in_pages(k, v, geometry, 16)
    choice = choose_call(q, keys.k, keys.v, plan, Softmax(128**-0.5), table=keys.table)
    assert choice.impl == "triton"
    check(unaligned_plan(geometry, 2), (q, k, v), "triton", page=16)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["hopper", "triton"])
def test_card_never_synchronises(impl: str) -> None:
    plan, again = (PLANS["triangle chunk"]().to("cuda") for _ in range(2))
    q, k, v = _on_card(MIDDLE, torch.bfloat16, 128)
    keys = in_pages(k, v, MIDDLE, 16)
    first = attend(q, keys.k, keys.v, plan, table=keys.table, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = attend(q, keys.k, keys.v, again, table=keys.table, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)  # type: ignore[arg-type]

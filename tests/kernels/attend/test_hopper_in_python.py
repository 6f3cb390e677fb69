"""The Hopper form's device code, executed without a card: it computes its plans, and waits for what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gluon_in_python import MARKED, attend_in_python, listed_in_python, nan_in_one_row
from kernel_cases import (
    in_pages,
    loose_plan,
    loose_plans,
    random_plan,
    rule_plan,
    tensors,
    unaligned_plan,
    with_columns,
)
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.attend.correct import anchor_queries
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.hopper import worklist
from sparsekit.kernels.attend.reference import attend_reference
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_rule, stack_heads

NEVER = 2**31 - 1
SCALE = 0.1
STEEP = 4.0  # rise of logits a key: a step lies hundreds above the one before


def _tiled(*args: int, block_kv: int = 128, **options: tuple[int, ...] | int) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=block_kv, **options)


def _window(geometry: Geometry, sinks: int, window: int) -> BlockPlan:
    return plan_from_rule(TokenRule(sinks, window, NEVER), geometry)


def _inputs(geometry: Geometry, dim: int, rise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of some tens, so that maxima rise; those of a key are `rise` above those of the key before."""
    q, k, v = tensors(geometry, torch.float64, dim=dim, heads=2, key_heads=1)
    q = q * 3
    if rise:
        q[..., 0], k[..., 0] = 1, rise / SCALE * torch.arange(k.shape[2])
    return q, k, v


def _check(
    plan: BlockPlan, dim: int, seed: int, softmax: Softmax | None = None, page: int = 0, fixed: bool = True,
    rise: float = 0.0,
) -> int:  # fmt: skip
    """Returns how many items a first launch left to a second one."""
    q, k, v = _inputs(plan.geometry, dim, rise)
    softmax = softmax or Softmax(SCALE, None, None)
    expected, expected_lse = attend_reference(q, k, v, plan, softmax)
    keys = in_pages(k, v, plan.geometry, page) if page else Keys(k, v)
    MARKED.clear()
    out, lse = attend_in_python(q, keys, plan, softmax, seed=seed, fixed=fixed)
    assert float((out - expected).abs().max()) < 1e-9
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert bool(((lse - expected_lse)[seen].abs() < 1e-9).all())
    assert not out[~seen].any()
    return sum(MARKED)


def _items(plan: BlockPlan, dim: int) -> Tensor:
    q, k, _ = _inputs(plan.geometry, dim)
    return torch.cat([work.items for work in worklist._works(plan, q, k)])


# sinks, window, steps of a whole row with half steps, whether the edge is in its second entry
SHORT_CASES = [
    (5, 150, 3, 0),
    (17, 150, 4, 1),
    (0, 300, 4, 0),
    (64, 300, 5, 1),
    (16, 512, 5, 0),
    (17, 700, 8, 1),
]


@pytest.mark.parametrize(("sinks", "window", "count", "second"), SHORT_CASES)
@pytest.mark.parametrize("dim", [64, 128])
def test_half_steps(sinks: int, window: int, count: int, second: int, dim: int) -> None:
    plan = _window(_tiled(300, 1150), sinks, window)
    listed = _items(plan, dim)
    kind = listed[:, item.KIND]
    assert bool((kind & item.SHORT != 0).any())
    assert set(listed[kind & item.SHORT != 0, item.COUNT].tolist()) >= {count}
    assert bool((kind & item.SECOND_EDGE != 0).any()) == bool(second)
    assert _check(plan, dim, seed=sinks + window, fixed=dim == 128) == 0


CALLS: dict[str, Callable[[], tuple[BlockPlan, int]]] = {
    "whole prompt": lambda: (_window(_tiled(700), 5, 300), 128),
    "no multiple of 128": lambda: (_window(_tiled(333, 1000, q_offset=450), 16, 200), 128),
    "left padding": lambda: (_window(_tiled(600, batch=2, kv_start=(0, 137)), 5, 150), 64),
    "right padding": lambda: (_window(_tiled(600, batch=2, kv_end=(600, 337)), 17, 200), 128),
    "size 256": lambda: (_window(_tiled(500), 5, 200), 256),
    "dense": lambda: (dense_plan(_tiled(300)), 128),
    "last rows dense": lambda: (rule_plan("triangle", _tiled(500), 200), 128),
    "tiles of 128 at random": lambda: (random_plan(_tiled(500), 2), 128),
    "tiles of 64 at random": lambda: (random_plan(_tiled(500, block_kv=64), 2), 128),
    "tiles of 32 at random": lambda: (random_plan(_tiled(300, block_kv=32), 2), 64),
    "a rule in tiles of 64": lambda: (_window(_tiled(500, block_kv=64), 5, 200), 128),
    "tiles anywhere": lambda: (unaligned_plan(_tiled(500, block_kv=64), 2), 256),
    "columns": lambda: (with_columns(random_plan(_tiled(400), 2), 150), 128),
    "halves": lambda: (random_plan(Geometry.of(500, block_q=64, block_kv=64), 2), 64),
    "halves at size 128": lambda: (random_plan(Geometry.of(450, 500, block_q=64, block_kv=64), 2), 128),
    "heads that differ": lambda: (
        stack_heads([_window(_tiled(500), 5, 200), dense_plan(_tiled(500))], [1, 0]),
        128,
    ),
}  # fmt: skip


RUNNING = ["size 256", "dense", "tiles of 32 at random", "columns", "halves", "heads that differ"]


@pytest.mark.parametrize(("name", "fixed"), [(name, True) for name in CALLS] + [(name, False) for name in RUNNING])
def test_computes_the_plan(name: str, fixed: bool) -> None:
    """Rows that keep their first step's maximum need no second launch for such logits."""
    plan, dim = CALLS[name]()
    marked = _check(plan, dim, seed=len(name), fixed=fixed)
    assert marked == 0 or dim == 256


def _outgrows(plan: BlockPlan, dim: int, rise: float) -> int:
    """Items whose rows have far greater logits behind their first step, where it is easy to say: those of several
    steps, which go down in dense ones and up in lists. Without sinks they have the running maximum at once."""
    count = 0
    for row in _items(plan, dim).tolist():
        head = row[item.HEAD] % plan.heads
        dense = bool(row[item.KIND] & item.DENSE)
        at_once = not dense and plan.rule is not None and int(plan.rule[0, head % plan.rule.shape[1], 0]) == 0
        count += row[item.COUNT] > 1 and not at_once and dense == (rise < 0)
    return count


RISING = [
    "whole prompt", "size 256", "last rows dense", "tiles of 128 at random", "tiles of 32 at random", "tiles anywhere",
    "columns", "halves", "heads that differ",
]  # fmt: skip
FALLING = ["dense", "whole prompt", "columns", "halves", "heads that differ"]


@pytest.mark.parametrize(("name", "rise"), [(n, STEEP) for n in RISING] + [(n, -STEEP) for n in FALLING])
def test_rows_that_outgrow_their_first_step(name: str, rise: float) -> None:
    plan, dim = CALLS[name]()
    marked = _check(plan, dim, seed=len(name), rise=rise)
    assert marked > 0
    if name not in ("columns", "halves", "size 256"):
        assert marked == _outgrows(plan, dim, rise)


@pytest.mark.parametrize(("name", "rise"), [("no multiple of 128", 0.06), ("dense", -0.06), ("columns", 0.06)])
def test_logits_that_rise_a_little(name: str, rise: float) -> None:
    """Beyond what a running maximum may lag, and within what a fixed one takes."""
    assert _check(*CALLS[name](), seed=len(name), rise=rise) == 0


@pytest.mark.parametrize(("power", "marked"), [(94.9, 0), (96.1, 1)])
@pytest.mark.parametrize("name", ["dense", "tiles"])
def test_how_far_a_sum_may_grow(name: str, power: float, marked: int) -> None:
    """A single key, behind the first step, has a logit above 0: a sum of 2^96 is the most that one launch takes."""
    geometry = _tiled(1, 256)
    whole = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    plan = dense_plan(geometry) if name == "dense" else loose_plan(whole, geometry)
    q, k, v = tensors(geometry, torch.float64, dim=64, heads=1, key_heads=1)
    q[:], k[:] = 0, 0
    q[..., 0], k[:, :, 5 if name == "dense" else 205, 0] = 1, power * math.log(2) / SCALE
    softmax = Softmax(SCALE, None, None)
    expected, _ = attend_reference(q, k, v, plan, softmax)
    MARKED.clear()
    out, _ = attend_in_python(q, Keys(k, v), plan, softmax)
    assert float((out - expected).abs().max()) < 1e-9
    assert sum(MARKED) == marked


def test_dense_rows_of_size_256_need_one_launch() -> None:
    """A step has 64 keys there: a tile's first 64 queries see none of a dense first one."""
    assert _check(dense_plan(_tiled(200)), 256, 0) == 0


def test_steps_that_show_nothing_need_one_launch() -> None:
    """Rows that may see nothing in their first step have the running maximum at once."""
    assert _check(_window(_tiled(400), 0, 150), 128, 0, rise=STEEP) == 0
    geometry = _tiled(400)
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, 0, 0] = True
    plan = with_columns(loose_plan(mask, geometry), 220)
    bits = plan.token_bits
    assert bits is not None
    bits.view(2, 4, -1)[:, 3, :4] = 0  # the last row's 128 first columns
    assert _check(plan, 128, 0) == 0
    alone = torch.zeros(1, 2, 4, 4, dtype=torch.bool)  # a half's tiles are no tiles of the other
    alone[:, :, [0, 2], 0] = alone[:, :, [1, 3], 1] = alone[:, :, [2, 3], [2, 3]] = True
    halves = loose_plan(alone, Geometry.of(256, block_q=64, block_kv=64))
    for dim in (64, 128):
        assert _check(halves, dim, 0, rise=STEEP) == 0


@pytest.mark.parametrize("name", loose_plans(_tiled(600)))
def test_rows_without_a_key(name: str) -> None:
    marked = _check(loose_plans(_tiled(600))[name], 64, 0, rise=STEEP)
    assert marked == 0 or name != "no entry at all"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("last rows dense", 1), ("dense", 3), ("columns", 1), ("halves", 2)],
)
def test_a_query_that_is_not_a_number(name: str, blocks: int) -> None:
    """Its item is done again, alone."""
    plan, dim = CALLS[name]()
    q, k, v = _inputs(plan.geometry, dim)
    q[0, 1, 150] = torch.nan
    softmax = Softmax(SCALE, None, None)
    expected = attend_reference(q, k, v, plan, softmax)
    MARKED.clear()
    got = attend_in_python(q, Keys(k, v), plan, softmax, blocks=blocks, seed=blocks)
    assert sum(MARKED) == 1
    nan_in_one_row(got, expected, (0, 1, 150))


@pytest.mark.parametrize("page", [16, 64, 128])
def test_pages(page: int) -> None:
    _check(_window(_tiled(300, 500), 5, 200), 128, page, page=page)
    _check(random_plan(_tiled(200, 300, block_kv=64), 2), 64, page, page=page, fixed=False)
    assert _check(random_plan(_tiled(200, 300, block_kv=64), 2), 64, page, page=page, rise=STEEP) > 0


def test_logits_capped_and_beside_a_sink() -> None:
    sinks = torch.randn(2, dtype=torch.float64)
    plan = _window(_tiled(500), 5, 200)
    assert _check(plan, 128, 0, Softmax(SCALE, 5.0, sinks)) == 0
    assert _check(plan, 128, 0, Softmax(SCALE, 1000.0, sinks * 500), rise=STEEP) > 0


def test_split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    plan = rule_plan("triangle", _tiled(800), 300)
    assert bool((_items(plan, 128)[:, item.SLOT] >= 0).any())
    _check(plan, 128, 0)
    assert _check(plan, 128, 0, rise=STEEP) > 0


@pytest.mark.parametrize(("rise", "marked"), [(0.0, 0), (-STEEP, 0), (STEEP, 1)])
def test_every_nth_query(rise: float, marked: int) -> None:
    """Steps of such rows go up."""
    plan = dense_plan(_tiled(700).anchors(7))
    q, k, v = _inputs(_tiled(700), 128, rise)
    softmax = Softmax(SCALE, None, None)
    own = anchor_queries(q, plan.geometry)
    expected, _ = attend_reference(own, k, v, plan, softmax)
    for fixed in (False, True):
        MARKED.clear()
        out, _ = attend_in_python(own, Keys(k, v), plan, softmax, fixed=fixed)
        assert float((out - expected).abs().max()) < 1e-9
    assert (sum(MARKED) > 0) == (marked > 0)


@pytest.mark.parametrize(
    "geometry", [_tiled(1150), _tiled(300, 1150), _tiled(1150, batch=2, kv_start=(0, 37))], ids=str
)
@pytest.mark.parametrize(("sinks", "window"), [(sinks, window) for sinks, window, *_ in SHORT_CASES])
def test_device_code_lists_the_same_work(geometry: Geometry, sinks: int, window: int) -> None:
    rules = [TokenRule(sinks, window, span.prompt_tokens - 100) for span in geometry.spans]
    plan = stack_heads([plan_from_rule(rules, geometry), dense_plan(geometry)], [0, 1])
    grid = worklist._grid(
        geometry, tuple(range(geometry.batch)), plan.samples == 1, 2, 2, 2, 128, 1, torch.device("cpu")
    )
    expected = worklist._listed(plan, grid, 128)
    assert bool((expected[0][:, item.KIND] & item.SHORT != 0).any())
    assert all(map(torch.equal, listed_in_python(plan, grid, 128), expected))


@pytest.mark.parametrize(("every", "rise"), [(16, 0.0), (64, 0.0), (64, STEEP)])
def test_corrected_by_anchors(every: int, rise: float) -> None:
    plan = plan_from_rule(TokenRule(5, 200, 600), _tiled(650)).corrected(every)
    anchors = plan.anchors
    assert anchors is not None
    q, k, v = _inputs(plan.geometry, 128, rise)
    dense = attend(anchor_queries(q, anchors.geometry), k, v, anchors, impl="torch", scale=SCALE)
    MARKED.clear()
    softmax = Softmax(SCALE, None, None)
    out, _ = attend_in_python(q, Keys(k, v), plan, softmax, dense.contiguous(), seed=every, fixed=every == 64)
    assert float((out - attend(q, k, v, plan, impl="torch", scale=SCALE)).abs().max()) < 1e-9
    assert (sum(MARKED) > 0) == (rise > 0)

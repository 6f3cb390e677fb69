"""The Hopper FP8 form's device code, executed without a card: but for rounding it computes its plans, and waits for
what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fp8_in_python import attend_fp8_in_python
from gluon_in_python import MARKED, nan_in_one_row
from kernel_cases import loose_plan, random_plan, rule_plan, tensors

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.hopper import worklist
from sparsekit.kernels.attend.reference import attend_reference
from sparsekit.plan import CAUSAL, RULE, BlockPlan, TokenRule, dense_plan, pack, plan_from_rule, stack_heads

NEVER = 2**31 - 1
STEEP = 4.0  # rise of logits a key: a step lies hundreds above the one before
SLOW = 0.08  # P is beyond e4m3 with every step, and float32 never is
SINKS = torch.tensor([0.5, 3.0], dtype=torch.float64)
SOFTMAX = {
    "plain": Softmax(0.1, None, None),
    "capped": Softmax(0.1, 5.0, None),
    "sinks": Softmax(0.1, None, SINKS),
    "capped, sinks": Softmax(0.1, 5.0, SINKS),
}


def _tiled(*args: int, **options: tuple[int, ...] | int) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=128, **options)


def _window(geometry: Geometry, sinks: int, window: int) -> BlockPlan:
    return plan_from_rule(TokenRule(sinks, window, NEVER), geometry)


def _inputs(
    geometry: Geometry, rise: float = 0.0, by_block: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of some tens, so that maxima rise; those of a key are `rise` above those of the key before. by_block: they
    are the same within 128 keys, and rise from there to the next."""
    q, k, v = tensors(geometry, torch.float64, dim=128, heads=2, key_heads=1)
    q = q * 3
    if rise or by_block:
        q[..., 0], k[..., 0] = 1, rise / 0.1 * torch.arange(k.shape[2])
    if by_block:
        k[..., 1:] = 0
        k[..., 0] = rise / 0.1 * (torch.arange(k.shape[2]) // 128)
    return q, k, v


def _check(
    plan: BlockPlan, seed: int, softmax: Softmax = SOFTMAX["plain"], return_lse: bool = True, flush: int = 16,
    blocks: int = 3, fixed: bool = True, rise: float = 0.0, by_block: bool = False,
) -> int:  # fmt: skip
    """Returns how many items a first launch left to a second one."""
    q, k, v = _inputs(plan.geometry, rise, by_block)
    expected, expected_lse = attend_reference(q, k, v, plan, softmax)
    MARKED.clear()
    out, lse = attend_fp8_in_python(
        q, k, v, plan, softmax, return_lse, flush=flush, blocks=blocks, seed=seed, fixed=fixed
    )  # fmt: skip
    assert float((out - expected).abs().max()) < 1e-9
    seen = expected_lse.isfinite()
    assert not out[~seen].any()
    if lse is not None:
        assert torch.equal(lse.isfinite(), seen)
        assert float((lse - expected_lse)[seen].abs().max()) < 1e-9
    return sum(MARKED)


def _items(plan: BlockPlan) -> torch.Tensor:
    q, k, _ = tensors(plan.geometry, torch.float64, dim=128, heads=2, key_heads=1)
    return torch.cat([work.items for work in worklist._works(plan, q, k)])


PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: dense_plan(_tiled(500)),
    "dense, short": lambda: dense_plan(_tiled(77)),
    "dense, left padding": lambda: dense_plan(_tiled(400, batch=2, kv_start=(0, 137))),
    "dense, right padding": lambda: dense_plan(_tiled(400, batch=2, kv_end=(400, 137))),
    "dense, a chunk": lambda: dense_plan(_tiled(200, 700, q_offset=450)),
    "window": lambda: _window(_tiled(800), 5, 200),
    "window, a chunk": lambda: _window(_tiled(333, 1000, q_offset=450), 16, 200),
    "window, left padding": lambda: _window(_tiled(700, batch=2, kv_start=(0, 137)), 5, 150),
    "window, right padding": lambda: _window(_tiled(700, batch=2, kv_end=(700, 337)), 16, 200),
    "window, many sinks": lambda: _window(_tiled(700), 64, 200),
    "triangle": lambda: rule_plan("triangle", _tiled(700), 200),
    "tiles at random": lambda: random_plan(_tiled(900), 2),
    "tiles at random, padded": lambda: random_plan(_tiled(600, batch=2, kv_start=(0, 40)), 2),
    "heads that differ": lambda: stack_heads([_window(_tiled(500), 5, 200), dense_plan(_tiled(500))], [1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_computes_the_plan(name: str, return_lse: bool) -> None:
    assert _check(PLANS[name](), len(name), return_lse=return_lse, fixed=return_lse) == 0


@pytest.mark.parametrize(
    ("name", "rise"),
    [
        ("dense", -STEEP),
        ("window", STEEP),
        ("triangle", STEEP),
        ("tiles at random, padded", STEEP),
        ("heads that differ", STEEP),
    ],
)
def test_weights_beyond_float32(name: str, rise: float) -> None:
    """Items of several steps, which go down in dense ones and up in lists, are done again: no factor helps."""
    plan = PLANS[name]()
    many = _items(plan)[:, item.COUNT] > 1
    dense = _items(plan)[:, item.KIND] & item.DENSE != 0
    assert _check(plan, len(name), rise=rise, flush=2) == int((many & (dense == (rise < 0))).sum())


@pytest.mark.parametrize("flush", [2, 3])
@pytest.mark.parametrize(("name", "rise"), [("dense", -SLOW), ("window", SLOW), ("tiles at random", SLOW)])
def test_weights_that_grow_beyond_e4m3(name: str, rise: float, flush: int) -> None:
    """Rows shrink them, step by step, and no item is done again."""
    assert _check(PLANS[name](), flush, rise=rise, flush=flush) == 0


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("rise", [0.0, 0.4, 0.9, 3.0])
def test_many_weights_that_are_the_same(rise: float, fixed: bool) -> None:
    """16 of them are more than fits, though each does: rows shrink them below a running maximum, too."""
    assert _check(dense_plan(_tiled(600)), 0, rise=-rise, by_block=True, fixed=fixed, flush=2) == 0
    assert _check(PLANS["triangle"](), 0, SOFTMAX["sinks"], rise=rise, by_block=True, fixed=fixed, flush=3) == 0


@pytest.mark.parametrize("name", ["dense", "window", "triangle"])
def test_a_query_that_is_not_a_number(name: str) -> None:
    """Its item is done again, alone."""
    plan = PLANS[name]()
    q, k, v = _inputs(plan.geometry)
    q[0, 1, 150] = torch.nan
    expected = attend_reference(q, k, v, plan, SOFTMAX["plain"])
    MARKED.clear()
    out, lse = attend_fp8_in_python(q, k, v, plan, SOFTMAX["plain"], flush=2)
    assert sum(MARKED) == 1
    assert lse is not None
    nan_in_one_row((out, lse), expected, (0, 1, 150))


def test_rows_without_a_key() -> None:
    """Of a whole item there is nothing to do again; a window without sinks has the running maximum at once."""
    none = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    none[:, :, 0, 0] = True
    assert _check(loose_plan(none, _tiled(300)), 0) == 0
    entries = torch.tensor([pack(0, CAUSAL), pack(0, RULE), pack(0, RULE)], dtype=torch.int32)
    rule = torch.tensor([[[0, 70, NEVER]]], dtype=torch.int32)
    some = BlockPlan(_tiled(300), row_ptr=torch.arange(4, dtype=torch.int32), entries=entries, rule=rule)
    _check(some, 0, rise=STEEP)
    for rise in (0.0, STEEP, -STEEP):
        assert _check(_window(_tiled(500), 0, 150), 0, rise=rise) == 0


def test_what_the_plans_need() -> None:
    """A step of sinks alone is among them, as is a first tile that begins before the first query."""
    assert bool((_items(PLANS["window"]())[:, item.KIND] & item.NARROW != 0).any())
    assert not bool((_items(PLANS["window, many sinks"]())[:, item.KIND] & item.NARROW != 0).any())
    for name in ("dense, a chunk", "window, a chunk"):
        assert bool((_items(PLANS[name]())[:, item.ROW] < 0).any())


# Sums are kept in shared memory after every so many steps: never, once, at an item's last step, and often.
@pytest.mark.parametrize(("steps", "flush"), [(n, 2) for n in range(1, 7)] + [(n, 3) for n in range(3, 9)])
@pytest.mark.parametrize("name", ["dense", "window"])
def test_sums_are_kept(name: str, steps: int, flush: int) -> None:
    if name == "dense":
        plan = dense_plan(_tiled(128, 128 * steps))
    else:
        plan = _window(_tiled(128, 128 * (steps + 2)), 5, max(128 * (steps - 1), 1))
        assert bool((_items(plan)[:, item.KIND] & item.NARROW != 0).all())
    assert _items(plan)[:, item.COUNT].tolist() == [steps, steps]
    _check(plan, 10 * steps + flush, flush=flush)


@pytest.mark.parametrize("flush", [2, 3])
@pytest.mark.parametrize("name", ["dense", "window", "triangle", "tiles at random"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_many_items_a_block(name: str, blocks: int, flush: int) -> None:
    """Buffers, mail and barriers come round, and sums are kept where the output before was staged."""
    for seed in range(3):
        _check(PLANS[name](), seed, flush=flush, blocks=blocks)


@pytest.mark.parametrize("steps", [15, 16, 17, 18, 32, 33, 34])
def test_as_many_steps_as_on_a_card(steps: int) -> None:
    _check(dense_plan(_tiled(100, 128 * steps)), steps)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("return_lse", [False, True])
def test_softmax(softmax: str, return_lse: bool) -> None:
    for name in ("dense", "window", "triangle"):
        _check(PLANS[name](), len(softmax), SOFTMAX[softmax], return_lse, flush=2)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("return_lse", [False, True])
def test_split_rows(softmax: str, return_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    for plan in (rule_plan("triangle", _tiled(1100), 300), dense_plan(_tiled(200, 1100, q_offset=850))):
        assert bool((_items(plan)[:, item.SLOT] >= 0).any())
        _check(plan, 0, SOFTMAX[softmax], return_lse, flush=2, fixed=return_lse)


def test_split_rows_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    plan = rule_plan("triangle", _tiled(800), 300)
    assert bool((_items(plan)[:, item.SLOT] >= 0).any())
    assert _check(plan, 0, SOFTMAX["sinks"], rise=STEEP, flush=2) > 0

"""The Hopper form's device code, executed without a card: it computes its plans, and waits for what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gluon_in_python import attend_in_python, listed_in_python
from kernel_cases import in_pages, random_plan, rule_plan, tensors, unaligned_plan, with_columns
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


def _tiled(*args: int, block_kv: int = 128, **options: tuple[int, ...] | int) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=block_kv, **options)


def _window(geometry: Geometry, sinks: int, window: int) -> BlockPlan:
    return plan_from_rule(TokenRule(sinks, window, NEVER), geometry)


def _inputs(geometry: Geometry, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of some tens, so that maxima rise."""
    q, k, v = tensors(geometry, torch.float64, dim=dim, heads=2, key_heads=1)
    return q * 3, k, v


def _check(plan: BlockPlan, dim: int, seed: int, softmax: Softmax | None = None, page: int = 0) -> None:
    q, k, v = _inputs(plan.geometry, dim)
    softmax = softmax or Softmax(0.1, None, None)
    expected, expected_lse = attend_reference(q, k, v, plan, softmax)
    keys = in_pages(k, v, plan.geometry, page) if page else Keys(k, v)
    out, lse = attend_in_python(q, keys, plan, softmax, seed=seed)
    assert float((out - expected).abs().max()) < 1e-9
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert float((lse - expected_lse)[seen].abs().max()) < 1e-9
    assert not out[~seen].any()


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
    _check(plan, dim, seed=sinks + window)


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


@pytest.mark.parametrize("name", CALLS)
def test_computes_the_plan(name: str) -> None:
    _check(*CALLS[name](), seed=len(name))


@pytest.mark.parametrize("page", [16, 64, 128])
def test_pages(page: int) -> None:
    _check(_window(_tiled(300, 500), 5, 200), 128, page, page=page)
    _check(random_plan(_tiled(200, 300, block_kv=64), 2), 64, page, page=page)


def test_logits_capped_and_beside_a_sink() -> None:
    sinks = torch.randn(2, dtype=torch.float64)
    _check(_window(_tiled(500), 5, 200), 128, 0, Softmax(0.1, 5.0, sinks))


def test_split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    plan = rule_plan("triangle", _tiled(1100), 300)
    assert bool((_items(plan, 128)[:, item.SLOT] >= 0).any())
    _check(plan, 128, 0)


def test_every_nth_query() -> None:
    plan = dense_plan(_tiled(700).anchors(7))
    q, k, v = _inputs(_tiled(700), 128)
    softmax = Softmax(0.1, None, None)
    own = anchor_queries(q, plan.geometry)
    expected, _ = attend_reference(own, k, v, plan, softmax)
    out, _ = attend_in_python(own, Keys(k, v), plan, softmax)
    assert float((out - expected).abs().max()) < 1e-9


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


@pytest.mark.parametrize("every", [16, 64])
def test_corrected_by_anchors(every: int) -> None:
    plan = plan_from_rule(TokenRule(5, 200, 600), _tiled(650)).corrected(every)
    anchors = plan.anchors
    assert anchors is not None
    q, k, v = _inputs(plan.geometry, 128)
    dense = attend(anchor_queries(q, anchors.geometry), k, v, anchors, impl="torch", scale=0.1)
    out, _ = attend_in_python(q, Keys(k, v), plan, Softmax(0.1, None, None), dense.contiguous(), seed=every)
    assert float((out - attend(q, k, v, plan, impl="torch", scale=0.1)).abs().max()) < 1e-9

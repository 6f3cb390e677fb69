"""Pairing rows of 64 queries, and gathering single columns, in Triton's interpreter, against plain Python.
`test_hopper.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import in_pages, tensors
from test_hopper import GEOMETRIES, HALF_PLANS, HEADS, KEY_HEADS

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.kernels import launch
from sparsekit.kernels.attend.hopper import halves, host, worklist
from sparsekit.kernels.attend.hopper.items import list_room
from sparsekit.plan import BlockPlan


def test_it_is_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("make", HALF_PLANS[1:])
def test_both_paths_make_the_same_items(make: Callable[[Geometry], BlockPlan], geometry: Geometry) -> None:
    plan, samples, here = make(geometry.with_tile(64, 64)), tuple(range(geometry.batch)), torch.device("cpu")
    assert plan.entries is not None
    shared = plan.samples == 1
    for step in (64, 128):
        tiles = geometry.with_tile(128, 64)
        grid = worklist._grid(tiles, samples, shared, plan.heads, HEADS, HEADS // KEY_HEADS, step, 1, here)
        rows = halves._rows(plan.geometry, samples, shared, plan.heads, HEADS, here)
        made = []
        for pair in (halves._by_hand, halves._on_gpu):
            count = len(grid.items) * (1 if plan.dense_rows is None else 2)
            items, work = grid.items.new_zeros(count, 8), grid.items.new_zeros(count)
            room = list_room(plan.entries.numel(), plan.samples * plan.heads, plan.rows)
            entries = torch.full((room,), -7, dtype=torch.int32)
            pair(plan, grid.items, grid.rows, rows, items, work, entries, step)
            made.append((items * (items[:, 3:4] > 0), work, entries))  # an item without steps says nothing else
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("ends", [(70, 33), (70, 0)])
def test_single_columns_are_gathered_of_samples_that_have_keys(page: int, ends: tuple[int, int]) -> None:
    """A sample without any has no page: what its table holds is no address."""
    geometry = Geometry.of(70, batch=2, kv_end=ends, block_q=128, block_kv=128)
    _, k, v = tensors(geometry, torch.float32)
    tokens = torch.arange(80, dtype=torch.int32).view(2, 2, 20) * 7 % 90  # some of them behind a sample's last key
    plan: Any = SimpleNamespace(geometry=geometry, heads=2, samples=2, tokens=tokens)
    keys = in_pages(k, v, geometry, page) if page else Keys(k, v)
    for pool, x in zip(host._pool(keys, plan), (k, v), strict=True):
        for b, end in enumerate(ends):
            for head in range(pool.shape[1]):
                rows = x[b, head, tokens[b, head].long().clamp(max=max(end - 1, 0))]
                assert torch.equal(pool[b, head], rows if end else torch.zeros_like(rows))

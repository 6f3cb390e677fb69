"""Pairing rows of 64 queries in Triton's interpreter, against plain Python. `test_hopper.py` runs this file in a
process of its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_hopper import GEOMETRIES, HALF_PLANS, HEADS, KEY_HEADS

from sparsekit.call.geometry import Geometry
from sparsekit.kernels import launch
from sparsekit.kernels.attend.hopper import halves, worklist
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
        grid = worklist._grid(tiles, samples, shared, plan.heads, HEADS, HEADS // KEY_HEADS, step, here)
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

"""Plans whose heads are given to others, and to which: on a CPU, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from join_cases import CHUNK, ODD, PADDED, random_plan

from sparsekit.call.geometry import Geometry
from sparsekit.plan import BlockPlan


class HeadsCase(NamedTuple):
    name: str
    geometry: Geometry
    plan_heads: int
    heads: tuple[int, ...]
    columns: int = 0
    dense: float = 0.0
    tiles: int = 3

    def __str__(self) -> str:
        return self.name

    def plan(self) -> BlockPlan:
        return random_plan(
            self.geometry, 3, heads=self.plan_heads, columns=self.columns, dense=self.dense, spare=9, tiles=self.tiles
        )


HEADS_CASES = [
    HeadsCase("a token", Geometry.of(1, block_q=64, block_kv=64), 2, (1, 0)),
    HeadsCase("turned", ODD, 4, (1, 2, 3, 0)),
    HeadsCase("one for all", ODD, 4, (2, 2, 2, 2), columns=40),
    HeadsCase("by key head", ODD, 2, (3, 3, 0, 1), columns=3, dense=0.3),
    HeadsCase("padded", PADDED, 4, (0, 0, 3, 1), columns=40, dense=0.2),
    HeadsCase("chunk", CHUNK, 2, (1, 1), columns=40),
    HeadsCase("long lists", Geometry.of(20_000, block_q=64, block_kv=32), 3, (2, 0, 0), tiles=60),
]

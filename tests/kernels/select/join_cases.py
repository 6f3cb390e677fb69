"""Plans as dynamic patterns make them, at random; those that are joined on a CPU, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparsekit.call.geometry import Geometry
from sparsekit.patterns import Triangle, static_plan
from sparsekit.plan import CAUSAL, FLAG_BITS, BlockPlan

CPU = torch.device("cpu")
TRIANGLE = Triangle(sink_tokens=8, window_tokens=40, last_tokens=20)


def random_plan(
    geometry: Geometry,
    seed: int,
    *,
    heads: int = 2,
    tiles: int = 3,
    columns: int = 0,
    aligned: bool = False,
    spare: int = 0,
    dense: float = 0.0,
) -> BlockPlan:
    """A plan as a dynamic pattern may make it: tiles on any key, single columns, dense rows, spare room at the end."""
    samples = 1 if geometry.uniform and geometry.batch == 1 else geometry.batch
    rows, width = geometry.rows, geometry.block_kv
    shape = BlockPlan(geometry, samples=samples, heads=heads)
    starts = shape.row_starts()
    counts, entries, needs = [], [], []
    tokens = torch.full((samples, heads, max(columns, 1)), 2**31 - 1, dtype=torch.int32)
    flags = []
    for s, span in enumerate(shape.spans()):
        r = torch.Generator().manual_seed(seed * 10_000 + span.keys * 20 + span.q_first % 20)
        is_dense = torch.rand(heads * rows, generator=r) < dense
        flags.append(is_dense)
        for p in range(heads):
            few = min(columns, span.keys)
            chosen = torch.randperm(max(span.keys, 1), generator=r)[:few].sort().values
            tokens[s, p, : len(chosen)] = chosen.int()
            for i in range(rows):
                low = max(int(starts[s, i]), span.q_first)
                high = min(int(starts[s, i]) + geometry.block_q, span.q_end) - 1
                if high < low or is_dense[p * rows + i]:
                    counts.append(0)
                    needs.append(torch.zeros(max(columns, 1), dtype=torch.bool))
                    continue
                own = list(range(low // width * width, high + 1, width))
                taken = set(own)
                for _ in range(tiles):
                    at = int(torch.randint(0, high + 1, (), generator=r))
                    at = at // width * width if aligned else at
                    if all(abs(at - other) >= width for other in taken):
                        taken.add(at)
                held = torch.zeros(max(columns, 1), dtype=torch.bool)
                for key in sorted(taken):
                    entries.append(key << FLAG_BITS | CAUSAL * (key + width - 1 > low))
                    held |= (tokens[s, p] >= key) & (tokens[s, p] < key + width)
                counts.append(len(taken))
                needs.append(~held & (tokens[s, p] <= high))
    words = -(-max(columns, 1) // 32)
    stacked = torch.stack(needs) if needs else torch.zeros(0, max(columns, 1), dtype=torch.bool)
    bits = torch.nn.functional.pad(stacked, (0, words * 32 - max(columns, 1))).unflatten(1, (words, 32))
    return BlockPlan(
        geometry,
        samples=samples,
        heads=heads,
        row_ptr=torch.tensor([0, *counts]).cumsum(0).int(),
        entries=torch.tensor([*entries, *[12345] * spare], dtype=torch.int32),
        dense_rows=torch.cat(flags) if dense else None,
        tokens=tokens if columns else None,
        token_bits=(bits.long() << torch.arange(32)).sum(-1).int() if columns else None,
    )


class Case(NamedTuple):
    """Plans to join. `members`: heads, tiles a row besides the diagonal's, columns, whether tiles lie on the grid."""

    name: str
    geometry: Geometry
    members: Sequence[tuple[int, int, int, bool]]
    static: bool = True
    dense: float = 0.0

    def __str__(self) -> str:
        return self.name

    def plans(self) -> list[BlockPlan]:
        made = [
            random_plan(self.geometry, i, heads=h, tiles=n, columns=c, aligned=a, spare=i, dense=self.dense)
            for i, (h, n, c, a) in enumerate(self.members)
        ]
        return [*made, static_plan(TRIANGLE, self.geometry, CPU)] if self.static else made


ODD = Geometry.of(300, block_q=64, block_kv=64)
PADDED = Geometry.of(300, batch=3, kv_start=(0, 37, 250), block_q=128, block_kv=64)
CHUNK = Geometry.of(65, 400, q_offset=150, block_q=32, block_kv=32)
CASES = [
    Case("a token", Geometry.of(1, block_q=64, block_kv=64), [(2, 3, 3, False)]),
    Case("triangle", ODD, [(2, 3, 0, False)]),
    Case("columns", ODD, [(2, 3, 40, False)]),
    Case("many columns", ODD, [(1, 3, 250, False)]),
    Case("dense rows", ODD, [(2, 3, 40, False), (1, 4, 0, True)], dense=0.3),
    Case("two", ODD, [(4, 5, 40, False), (2, 5, 3, False)], static=False),
    Case("three", ODD, [(4, 5, 40, False), (2, 5, 33, False), (1, 2, 0, True)]),
    Case("one grid", ODD, [(2, 3, 0, True), (2, 3, 0, True)], static=False),
    Case("padded", PADDED, [(2, 3, 40, False)]),
    Case("chunk", CHUNK, [(2, 5, 40, False)]),
]


def same(got: BlockPlan, expected: BlockPlan) -> None:
    """One plan, but for what lies past the last entry."""
    assert (got.geometry, got.samples, got.heads) == (expected.geometry, expected.samples, expected.heads)
    assert got.tensors.keys() == expected.tensors.keys()
    if expected.row_ptr is None:
        return
    end = int(expected.row_ptr[-1])
    for name, tensor in expected.tensors.items():
        other = got.tensors[name].cpu()
        if name == "entries":
            tensor, other = tensor[:end], other[:end]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name

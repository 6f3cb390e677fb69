"""The oracle: no plan of as many tiles recalls more, and its own recall is that of the tiles it names."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from sparsekit import SparsekitError
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, geometry_for
from sparsekit.lab.bench import bench_dynamic
from sparsekit.lab.bench.inputs import structured
from sparsekit.lab.bench.oracle import oracle
from sparsekit.lab.bench.quality import dense_lse, recall
from sparsekit.patterns import parse_pattern


def test_it_is_the_best_of_all_choices() -> None:
    """Every choice of tiles of a small call, by brute force on the N x N weights."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 14, 8) * 2, torch.randn(1, 1, 14, 8)
    found = oracle(q, k, tile=4)
    logits = (q[0] @ k[0].mT) * 8**-0.5
    weights = logits.masked_fill(~torch.ones(14, 14).tril().bool(), float("-inf")).softmax(-1).double()
    tiles = [(h, r, c) for h in range(2) for r in range(4) for c in range(r + 1)]
    mass = {(h, r, c): float(weights[h, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].sum()) / 28 for h, r, c in tiles}
    diagonal = sum(value for (_, r, c), value in mass.items() if r == c)
    rest = [value for (_, r, c), value in mass.items() if r != c]
    assert found.first == 8 and len(found.recall) == len(tiles) == 20
    for n in (0, 1, 2, 5):
        best = diagonal + max(sum(some) for some in combinations(rest, n))
        assert float(found.recall[7 + n]) == pytest.approx(best, abs=1e-6)
        assert found.tile_density(best - 1e-5) == pytest.approx((8 + n) / 20)
    assert found.tile_density(1.0) == 1.0 and found.tile_density(0.0) == 8 / 20
    with pytest.raises(SparsekitError, match=r"recall = 1\.5"):
        found.tile_density(1.5)


def test_no_pattern_beats_it() -> None:
    one = structured(1500, heads=4, key_heads=2, dim=32)
    best, rows = oracle(one.q, one.k), torch.arange(1500)
    for given in ({"name": "block_topk", "top_k": 4, "block_tokens": 128}, {"name": "xattention", "threshold": 0.7}):
        geometry = geometry_for(one.q, one.k)
        plan = parse_pattern({"dense_below_tokens": 0, **given}).plan(one.q, one.k, geometry, Softmax(scale=32**-0.5))
        _, lse = attend(one.q, one.k, one.v, plan, return_lse=True)
        got = float(recall(lse, dense_lse(one.q, one.k, rows, 32**-0.5)).mean())
        assert best.tile_density(got) <= plan.tile_density() + 1e-9


def test_low_precision_is_that_of_q_and_k_alone() -> None:
    """Logits of up to a hundred, as real models have them: rounded to 16 bits they would be off by a quarter."""
    torch.manual_seed(0)
    q, k = (5 * torch.randn(1, heads, 700, 64, dtype=torch.bfloat16) for heads in (4, 2))
    low, exact = oracle(q, k), oracle(q.float(), k.float())
    assert float((low.recall - exact.recall).abs().max()) < 1e-9


def test_bench_dynamic_tells_it_beside_each_pattern() -> None:
    rows = bench_dynamic(
        methods=["block_topk"], lengths=[700], heads=2, key_heads=1, dim=16, device="cpu", repeat_ms=0, with_oracle=True
    )
    dynamic = [row for row in rows if row["case"] == "dynamic"]
    assert dynamic and all(0 < row["oracle_tile_density"] <= 1 for row in dynamic)

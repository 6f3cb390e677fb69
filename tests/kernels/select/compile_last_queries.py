"""Compiles the kernels of the last queries' sums, of vertical-slash plans and of FlexPrefill's blocks for sm_90, and
prints what each takes. `test_last_queries.py` runs it in a process of its own, whose Triton must compile."""

from __future__ import annotations

import json
from types import SimpleNamespace

import compile_select
import torch
from test_compile import offline

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.select import flexprefill_triton, last_queries_triton, slash_triton
from sparsekit.kernels.select.grid import Budgets, block_grid, slash_grid

CPU = torch.device("cpu")


def main() -> None:
    offline()
    for module in (launch, last_queries_triton):
        module._start = compile_select._compile  # type: ignore[assignment]
    last_queries_triton.capability_of = lambda device: (9, 0)  # type: ignore[assignment]
    last_queries_triton.processors_of = lambda device: 132  # type: ignore[assignment]
    geometry = Geometry.of(4096, block_kv=128)
    sinks = Softmax(0.1, 5.0, torch.zeros(32))
    for dtype, dim, queries, softmax in (
        (torch.bfloat16, 128, 64, Softmax(0.1)),
        (torch.bfloat16, 128, 128, Softmax(0.1)),
        (torch.bfloat16, 64, 64, sinks),
        (torch.float16, 96, 20, sinks),
        (torch.bfloat16, 256, 128, sinks),
        (torch.float32, 128, 64, sinks),
        (torch.float32, 64, 128, sinks),
    ):
        q, k = compile_select._inputs(geometry, dtype, dim)
        last_queries_triton.last_query_sums_triton(q, k, geometry, softmax, queries, 30, 100)
    bits = torch.zeros(2, 1, 32, 4096 // 32, dtype=torch.int32)
    for tile in (64, 128):
        slash_triton.plan_triton(bits, slash_grid(geometry, tile, 500, CPU), 1000, 1 << 28)
    q, k = compile_select._inputs(geometry, torch.bfloat16, 128)
    grid = block_grid(geometry, 128, 1, CPU)
    counts = torch.zeros(3, 1, 32, 4096, dtype=torch.int32)
    means, sums = torch.zeros(1, 8, 32, 128), torch.zeros(2, 1, 32, 4096)
    budgets = Budgets(0.9, 0.1, 8, 100)
    for softmax in (Softmax(0.1), sinks):
        chosen = flexprefill_triton.choose_triton(q, sums, means, geometry, grid, softmax, 128, budgets, counts)
        scores = torch.zeros(1, 32, grid.rows, grid.columns)
        flexprefill_triton.count_map_triton(scores, chosen[2], grid, softmax, 0, counts[2])
        threshold = flexprefill_triton.map_threshold_triton(counts[2], 0.9)
        lines = torch.zeros(2, 1, 32, 1, dtype=torch.int32)
        flexprefill_triton.write_bits_triton(scores, threshold, lines, grid, softmax, 0, grid.rows)
    wide = SimpleNamespace(lengths=grid.lengths, rows=grid.rows, columns=8192)  # 1M tokens
    scores, lines = torch.zeros(1, 1, 1, 8192), torch.zeros(2, 1, 1, 256, dtype=torch.int32)
    flexprefill_triton.count_map_triton(scores, counts[0], wide, sinks, 0, counts[2])  # type: ignore[arg-type]
    flexprefill_triton.write_bits_triton(scores, threshold, lines, wide, sinks, 0, 1)  # type: ignore[arg-type]
    print(json.dumps(compile_select.MADE))


if __name__ == "__main__":
    main()

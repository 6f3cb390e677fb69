"""Compiles the portable kernels for AMD's gfx942 and NVIDIA's sm_100, and prints what each of them takes.
`test_targets.py` runs it in a process of its own, whose Triton must compile. `python compile_targets.py all` compiles
every form, for minutes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from test_compile import Driver, offline, ptxas
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.attend import triton_blocks, triton_correct, triton_ranked
from sparsekit.kernels.select import (
    block_scores_triton,
    blocks_triton,
    flexprefill_triton,
    heads_triton,
    join_triton,
    last_queries_triton,
    mean_keys_triton,
    ranking_triton,
    slash_triton,
    topk_triton,
    totals_triton,
)
from sparsekit.kernels.select.grid import Budgets, Form, block_grid, slash_grid
from sparsekit.kernels.select.segments import segments_of
from sparsekit.patterns import S2O
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_rule, row_bounds

# name -> what `capability_of` says there, and processors: of MI300X and B200
TARGETS = {"AMD gfx942": ((0, 0), 304), "NVIDIA sm_100": ((10, 0), 148)}
# Those that ask for the capability.
ESTIMATORS = (block_scores_triton, mean_keys_triton, last_queries_triton, ranking_triton)
TOKENS = 4096
CPU = torch.device("cpu")
ALL = sys.argv[1:] == ["all"]
MADE: list[dict[str, Any]] = []
FACTS: dict[str, Any] = {}


def _compile(
    kernel: Any, form: object, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any], flags: dict[str, Any]
) -> None:
    """In place of a launch."""
    made = kernel.warmup(*args, grid=grid, **options, **flags)
    row = {**FACTS, "kernel": kernel.__name__, "shared": made.metadata.shared, "warps": made.metadata.num_warps}
    if (text := made.asm.get("amdgcn")) is not None:
        assert made.asm["hsaco"]
        spilled = sum(map(int, re.findall(r"\.vgpr_spill_count: +(\d+)", text)))
        scratch = max(map(int, re.findall(r"\.private_segment_fixed_size: +(\d+)", text)))
        row |= {"matrix": text.count("v_mfma"), "spilled": spilled, "scratch": scratch}
    else:
        text = made.asm["ptx"]
        row["matrix"] = len(re.findall(r"tcgen05\.mma|mma\.sync", text))
        if FACTS["form"] in ("triangle", "antidiagonals"):
            assert ptxas(text, Driver.capability)[1]
    MADE.append(row)


def _inputs(dim: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    q = torch.empty(1, tokens, 32, dim, dtype=dtype).transpose(1, 2)
    return q, torch.empty(1, tokens, 8, dim, dtype=dtype).transpose(1, 2)


def _plan(kind: str) -> BlockPlan:
    geometry = Geometry.of(TOKENS)
    plan = dense_plan(geometry) if kind == "dense" else plan_from_rule(TokenRule(8, 512, TOKENS - 128), geometry)
    if kind == "columns":
        words = torch.zeros(plan.rows, 32, dtype=torch.int32)
        plan = replace(plan, tokens=torch.arange(1024, dtype=torch.int32).view(1, 1, -1), token_bits=words)
    return plan


def _attend(kind: str, dim: int, dtype: torch.dtype) -> None:
    q, k = _inputs(dim, dtype)
    if kind == "dense":  # one head, so few programs that rows are cut over keys
        q, k = q[:, :1], k[:, :1]
    keys = Keys(k, k)
    if kind == "pages":
        pages = torch.empty(300, 8, 16, 2 * dim, dtype=dtype)
        keys = Keys(*pages.split(dim, -1), torch.zeros(1, TOKENS // 16, dtype=torch.int32))
    softmax = Softmax(0.1, 5.0, torch.zeros(32)) if kind == "capped" else Softmax(0.1)
    triton_blocks.attend_triton(q, keys, _plan(kind), softmax, True)


def _ranked(dim: int, dtype: torch.dtype) -> None:
    """Of lists of 512 keys: to compile the sort takes as long as the rest for 2,048."""
    q, k = torch.zeros(1, 1024, 4, dim, dtype=dtype).transpose(1, 2), torch.zeros(1, 1024, 1, dim, dtype=dtype)
    k = k.transpose(1, 2)
    plan = S2O().select(q, k, Geometry.of(1024), Softmax(0.1))
    triton_blocks.attend_triton(q, Keys(k, k), plan, Softmax(0.1), True)
    segments = segments_of(plan.geometry, 512, 4096, CPU)
    means = ranking_triton.mean_queries_triton(q, segments, plan.tensors["ranked.q_index"])
    ranking_triton.rank_keys_triton(means, k, segments, plan.tensors["ranked.keys"])


def _correct(dim: int, dtype: torch.dtype) -> None:
    q, _ = _inputs(dim, dtype)
    triton_correct.add_changes(q, torch.empty(1, 32, TOKENS // 64, dim), _plan("triangle").corrected(64))


def _antidiagonals(dim: int, dtype: torch.dtype) -> None:
    q, k = _inputs(dim, dtype)
    geometry = Geometry.of(TOKENS, block_kv=128)
    grid = block_grid(geometry, 128, 1, CPU)
    block_scores_triton.antidiagonal_mass_triton(q, k, geometry, grid, 128, 16, Softmax(0.1), 0, grid.rows)


def _pooled(dim: int, dtype: torch.dtype) -> None:
    q, k = _inputs(dim, dtype)
    geometry = Geometry.of(TOKENS, block_kv=128)
    grid = block_grid(geometry, 128, 1, CPU)
    for half, exact in ((False, False), (False, True), (True, False)):
        means = block_scores_triton.pooled_means_triton(q, k, geometry, grid, 128, half)
        block_scores_triton.pooled_scores_triton(*means, grid, 128, 0, grid.rows, exact)


def _mean_keys(dim: int, dtype: torch.dtype) -> None:
    q, _ = _inputs(dim, dtype)
    geometry = Geometry.of(TOKENS, block_kv=128)
    grid = block_grid(geometry, 128, 1, CPU)
    means = torch.empty(1, 8, grid.columns, dim)
    mean_keys_triton.query_block_lse_triton(q, means, geometry, grid, 128, Softmax(0.1), 0, grid.rows)


def _last_queries(dim: int, dtype: torch.dtype) -> None:
    q, k = _inputs(dim, dtype)
    for queries in (64, 128) if ALL else (64,):
        last_queries_triton.last_query_sums_triton(
            q, k, Geometry.of(TOKENS, block_kv=128), Softmax(0.1), queries, 30, 100
        )


def _flexprefill(dim: int, dtype: torch.dtype) -> None:
    q, _ = _inputs(dim, dtype)
    geometry = Geometry.of(TOKENS, block_kv=128)
    grid = block_grid(geometry, 128, 1, CPU)
    counts = torch.zeros(3, 1, 32, 4096, dtype=torch.int32)
    means, sums = torch.zeros(1, 8, 32, dim), torch.zeros(2, 1, 32, 4096)
    budgets = Budgets(0.9, 0.1, 8, 100)
    chosen = flexprefill_triton.choose_triton(q, sums, means, geometry, grid, Softmax(0.1), 128, budgets, counts)
    scores = torch.zeros(1, 32, grid.rows, grid.columns)
    flexprefill_triton.count_map_triton(scores, chosen[2], grid, Softmax(0.1), 0, counts[2])
    threshold = flexprefill_triton.map_threshold_triton(counts[2], 0.9)
    lines = torch.zeros(2, 1, 32, 1, dtype=torch.int32)
    flexprefill_triton.write_bits_triton(scores, threshold, lines, grid, Softmax(0.1), 0, grid.rows)


def _lists() -> None:
    """What has neither head size nor element type: bits, lists and their counts."""
    geometry = Geometry.of(TOKENS, block_kv=128)
    grid = block_grid(geometry, 128, 1, CPU)
    bits = torch.zeros(1, 32, grid.rows, -(-grid.columns // 32), dtype=torch.int32)
    blocks_triton.plan_from_bits_triton(bits, grid, 128, 1000, 1000)
    scores, lengths = torch.zeros(2, 1024), torch.ones(2, dtype=torch.int32)
    topk_triton.topk_bits_triton(scores, 100, lengths, True, True)
    topk_triton.top_p_bits_triton(scores, 0.9, lengths, True, True)
    topk_triton.topk_indices_mask_triton(torch.zeros(2, 20000), 100)
    mean_keys_triton.near_top_bits_triton(scores, 2.3, lengths, 2, 4)
    bits = torch.zeros(2, 1, 32, TOKENS // 32, dtype=torch.int32)
    slash_triton.plan_triton(bits, slash_grid(geometry, 64, 500, CPU), 1000, 1 << 28)
    ranking_triton.bit_positions_triton(torch.zeros(4, 100, dtype=torch.int32), 50)
    plan = _plan("columns")
    assert plan.row_ptr is not None and plan.entries is not None
    first, last, _, _ = row_bounds(plan.geometry, plan.samples, CPU)
    form = Form(plan.samples, plan.heads, plan.rows)
    row_ptr, entries = join_triton.merge_triton(plan, plan, form, first, last, plan.dense_rows)
    totals_triton.sums_triton(plan)
    join_triton.drop_columns_triton(row_ptr, entries, plan.tokens, plan.token_bits, form, plan.geometry)
    heads_triton.copy_lists_triton(plan, torch.tensor([0, 0]), plan.row_ptr, int(plan.row_ptr[-1]))


KERNELS = {
    "dense": _attend,
    "triangle": _attend,
    "columns": _attend,
    "pages": _attend,
    "capped": _attend,
    "ranked": _ranked,
    "correct": _correct,
    "antidiagonals": _antidiagonals,
    "pooled": _pooled,
    "mean keys": _mean_keys,
    "last queries": _last_queries,
    "flexprefill": _flexprefill,
}
SIZES = (16, 64, 80, 128, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What takes NVIDIA's compiler no other way than on sm_90 and sm_80, for which other tests compile it.
AS_BEFORE = {"columns", "pages", "capped", "correct", "flexprefill"}  # and `_lists`


def _forms(target: str) -> Iterator[tuple[str, int, torch.dtype]]:
    """(kernel, head size, element type). bfloat16 and float16 take the same memory, so they take turns."""
    if ALL:
        yield from product(KERNELS, SIZES, (BF16, FP16, FP32))
        return
    amd = target == "AMD gfx942"
    for i, name in enumerate(KERNELS):
        if name != "columns" and (amd or name not in AS_BEFORE):
            yield name, 64 if i % 2 else 128, BF16 if i % 4 < 2 else FP16
    yield "triangle", 128, FP16
    if amd:  # whose tiles these two decide
        yield from (("columns", 256, BF16), ("columns", 256, FP32))


def main() -> None:
    offline()
    for module in (launch, triton_blocks, triton_ranked, ranking_triton, last_queries_triton):
        module._start = _compile  # type: ignore[attr-defined]
    for target, (capability, processors) in TARGETS.items():
        Driver.amd, Driver.capability = "" if capability[0] else target.split()[1], 10 * capability[0] + capability[1]
        for module in (launch, triton_blocks, triton_ranked, *ESTIMATORS):
            module.capability_of = lambda device, found=capability: found  # type: ignore[attr-defined]
        for module in (triton_blocks, last_queries_triton):
            module.processors_of = lambda device, found=processors: found  # type: ignore[attr-defined]
        for name, dim, dtype in _forms(target):
            FACTS.update(target=target, form=name, dim=dim, dtype=str(dtype).removeprefix("torch."))
            kernel = KERNELS[name]
            kernel(*([name] if kernel is _attend else []), dim, dtype)
        if ALL or target == "AMD gfx942":
            FACTS.update(form="lists", dim=0, dtype="")
            _lists()
    print(json.dumps(MADE))


if __name__ == "__main__":
    main()

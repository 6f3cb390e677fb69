"""Compiles the kernels of selection and block scores for sm_90, and prints what each takes. `test_select.py` runs it in
a process of its own, whose Triton must compile."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from test_compile import offline, ptxas

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.select import block_scores_triton, blocks_triton, mean_keys_triton, ranking_triton, topk_triton
from sparsekit.kernels.select.grid import block_grid
from sparsekit.kernels.select.segments import segments_of

MADE: list[dict[str, Any]] = []
CPU = torch.device("cpu")


def _compile(
    kernel: Any, form: object, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any], flags: dict[str, Any]
) -> None:
    """In place of a launch."""
    made = kernel.warmup(*args, grid=grid, **options, **flags)
    ptx = made.asm["ptx"]
    said, _ = ptxas(ptx, 90)
    MADE.append(
        {
            "kernel": kernel.__name__,
            "shuffles": ptx.count("shfl.sync"),
            "shared": made.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "tma": ptx.count("cp.async.bulk.tensor"),
            "serialised": said.count("(C75"),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        }
    )


def _inputs(geometry: Geometry, dtype: torch.dtype, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(1, geometry.q_len, 32, dim, dtype=dtype).transpose(1, 2)
    return q, torch.empty(1, geometry.kv_len, 8, dim, dtype=dtype).transpose(1, 2)


def main() -> None:
    offline()
    launch._start = _compile  # type: ignore[assignment]
    mean_keys_triton.capability_of = lambda device: (9, 0)  # type: ignore[assignment]
    block_scores_triton.capability_of = lambda device: (9, 0)  # type: ignore[assignment]
    geometry = Geometry.of(4096, block_kv=128)
    for dtype, dim, stride, cap in (
        (torch.bfloat16, 128, 16, None),
        (torch.bfloat16, 64, 8, 5.0),
        (torch.bfloat16, 80, 4, None),
        (torch.float32, 128, 16, None),
        (torch.float64, 64, 16, None),
    ):
        q, k = _inputs(geometry, dtype, dim)
        grid = block_grid(geometry, 128, 1, CPU)
        for tma in (False, True) if stride == 16 else (True,):
            block_scores_triton._has_tma = lambda device, tma=tma: tma  # type: ignore[assignment]
            softmax = Softmax(0.1, cap, None if cap is None else torch.zeros(32))
            block_scores_triton.antidiagonal_mass_triton(q, k, geometry, grid, 128, stride, softmax, 0, grid.rows)
    for block_tokens in (64, 128):
        q, k = _inputs(geometry, torch.bfloat16, 128)
        grid = block_grid(geometry, block_tokens, 1, CPU)
        for half in (False, True):
            means = block_scores_triton.pooled_means_triton(q, k, geometry, grid, block_tokens, half)
            for exact in (False, True):
                block_scores_triton.pooled_scores_triton(*means, grid, block_tokens, 0, grid.rows, exact)
        bits = torch.zeros(1, 32, grid.rows, -(-grid.columns // 32), dtype=torch.int32)
        blocks_triton.plan_from_bits_triton(bits, grid, block_tokens, 1000, 1000)
    for dtype, dim, cap in (
        (torch.bfloat16, 128, None),
        (torch.bfloat16, 64, 5.0),
        (torch.bfloat16, 80, None),
        (torch.bfloat16, 256, None),
        (torch.float32, 128, None),
        (torch.float32, 256, None),
        (torch.float64, 128, None),
    ):
        q, k = _inputs(geometry, dtype, dim)
        grid = block_grid(geometry, 128, 1, CPU)
        means = torch.empty(1, 8, grid.columns, dim)
        mean_keys_triton.query_block_lse_triton(q, means, geometry, grid, 128, Softmax(0.1, cap), 0, grid.rows)
    for columns in (100, 1024, 16384):  # of 100, rows begin at any number
        scores, lengths = torch.zeros(2, columns), torch.ones(2, dtype=torch.int32)
        topk_triton.topk_bits_triton(scores, 100, lengths, True, True)
        topk_triton.top_p_bits_triton(scores, 0.9, lengths, True, True)
        topk_triton.top_p_bits_triton(scores, 0.9, lengths, False, False, True)
        mean_keys_triton.near_top_bits_triton(scores, 2.3, lengths, 2, 4)
    topk_triton.topk_indices_mask_triton(torch.zeros(2, 20000), 100)
    ranking_triton.capability_of = lambda device: (9, 0)  # type: ignore[assignment]
    segments = segments_of(Geometry.of(16384, block_kv=64), 512, 4096, CPU)
    means, (_, k) = torch.empty(1, 32, 32, 128, dtype=torch.bfloat16), _inputs(segments.geometry, torch.bfloat16, 128)
    ranking_triton.rank_keys_triton(means, k, segments, torch.zeros(1, 32, segments.room, dtype=torch.int32))
    print(json.dumps(MADE))


if __name__ == "__main__":
    main()

"""Compiles ranked execution for cards that are not here, and prints what each kernel takes. `test_ranked.py` runs it in
a process of its own, whose Triton must compile."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from test_compile import SHARED, Driver, offline, ptxas
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.attend import triton_ranked
from sparsekit.kernels.select import ranking_triton
from sparsekit.kernels.select.segments import segments_of
from sparsekit.patterns import S2O
from sparsekit.plan import BlockPlan

FORMS = (
    (torch.bfloat16, 128, Softmax(0.1)),
    (torch.float32, 256, Softmax(0.1)),
    (torch.bfloat16, 64, Softmax(0.1, 5.0, torch.zeros(4))),
    (torch.float16, 96, Softmax(0.1)),
    (torch.bfloat16, 256, Softmax(0.1)),
    (torch.float32, 64, Softmax(0.1)),
)
MADE: list[dict[str, Any]] = []
FACTS: dict[str, Any] = {}


def _compile(
    kernel: Any, form: object, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any], flags: dict[str, Any]
) -> None:
    """In place of a launch."""
    made = kernel.warmup(*args, grid=grid, **options, **flags)
    ptx, capability = made.asm["ptx"], Driver.capability
    said, _ = ptxas(ptx, capability)
    MADE.append(
        {
            "kernel": kernel.__name__,
            "capability": capability,
            **FACTS,
            "shared": made.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "mma": ptx.count("mma.sync"),
            "ahead": ptx.count("cp.async.c"),
            "serialised": said.count("(C75"),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        }
    )


def _rank(q: Tensor, k: Tensor, plan: BlockPlan) -> None:
    """Lists of 512 keys."""
    assert plan.ranked is not None
    segments = segments_of(plan.geometry, 512, 4096, q.device)
    means = ranking_triton.mean_queries_triton(q, segments, plan.ranked.q_index)
    ranking_triton.rank_keys_triton(means, k, segments, plan.ranked.keys)


def _lists() -> None:
    """The longest lists that one program makes."""
    segments = segments_of(Geometry.of(20480), 512, ranking_triton.LONGEST, torch.device("cpu"))
    k = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 1, 20480, 64)
    ranking_triton.rank_keys_triton(k[:, :, :40], k, segments, torch.zeros(1, 1, segments.room, dtype=torch.int32))


def _double() -> None:
    """float64, which torch executes on a card: it is ranked by Triton there."""
    geometry = Geometry.of(1024)
    q = torch.zeros(1, 1, 1024, 64, dtype=torch.float64)
    segments = segments_of(geometry, 512, 4096, q.device)
    means = ranking_triton.mean_queries_triton(q, segments, torch.zeros(1, 1, 2, 512, dtype=torch.int32))
    ranking_triton.rank_keys_triton(means, q, segments, torch.zeros(1, 1, segments.room, dtype=torch.int32))


def main() -> None:
    offline()
    launch._start = triton_ranked._start = ranking_triton._start = _compile  # type: ignore[assignment]
    geometry = Geometry.of(1024)
    for capability, limit in ((8, 0), SHARED[8, 9]), ((8, 9), SHARED[8, 9]), ((9, 0), SHARED[9, 0]):
        Driver.capability = capability[0] * 10 + capability[1]
        for module in (triton_ranked, ranking_triton):
            module.capability_of = lambda device, found=capability: found  # type: ignore[attr-defined]
        # 8.9 has the tiles and the instructions of 8.0, and less shared memory, which 8.0 is held to.
        for dtype, dim, softmax in FORMS[:2] if capability == (8, 9) else FORMS:
            q = torch.zeros(1, 1024, 4, dim, dtype=dtype).transpose(1, 2)
            k = torch.zeros(1, 1024, 1, dim, dtype=dtype).transpose(1, 2)
            plan = S2O().select(q, k, geometry, softmax)
            assert plan.ranked is not None
            FACTS.update(dim=dim, dtype=str(dtype), block_q=plan.block_q, limit=limit)
            triton_ranked.attend_ranked_triton(q, Keys(k, k), plan, plan.ranked, softmax, True)
            _rank(q, k, plan)
        ranking_triton.bit_positions_triton(torch.zeros(4, 100, dtype=torch.int32), 50)
    FACTS.update(dim=64, dtype="torch.bfloat16")
    _lists()
    FACTS.update(dtype="torch.float32")  # what float64 is ranked in
    _double()
    print(json.dumps(MADE))


if __name__ == "__main__":
    main()

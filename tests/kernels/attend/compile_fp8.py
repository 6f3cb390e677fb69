"""Compiles the FP8 form for sm_90, and prints what each of the given cases takes. `test_hopper_fp8.py` runs it in a
process of its own, whose Triton must compile."""

from __future__ import annotations

import json
import re
import sys
import warnings
from typing import Any

import torch
from compile_hopper import _disassembled
from test_compile import offline, ptxas

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend import triton_e4m3
from sparsekit.kernels.attend.hopper import fp8 as host
from sparsekit.plan import TokenRule, dense_plan, plan_from_block_mask, plan_from_rule

QGMMA_A_STEP = 8  # 32 deep each: 4 for Q K^T at head size 128, 4 for P V over 128 keys
SHUFFLES_A_STEP = 4  # of row maxima


def _compile(kind: str, more: str) -> dict[str, Any]:
    geometry = Geometry.of(2048, block_q=128, block_kv=128)
    plan = {
        "dense": lambda: dense_plan(geometry),
        "triangle": lambda: plan_from_rule(TokenRule(8, 512, 1920), geometry),
        "tiles": lambda: plan_from_block_mask(torch.ones(1, 8, 16, 16, dtype=torch.bool), geometry),
    }[kind]()
    q, k = (torch.empty(1, heads, 2048, 128, dtype=torch.bfloat16) for heads in (8, 2))
    softmax = Softmax(0.1, 20.0 if "cap" in more else None, torch.zeros(8) if "sinks" in more else None)
    assert host.covers(q, Keys(k, k), plan, softmax, "lse" in more) == []
    kernel = host.compile_form(q, Keys(k, k), plan, softmax, "lse" in more)
    said, cubin = ptxas(kernel.asm["ptx"], 90)
    sass = _disassembled(cubin)
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)]
    jumps = [(int(to[1], 16), at) for at, what in code if (to := re.search("BRA.*?0x([0-9a-f]+)", what))]
    loops = [[what for at, what in code if first <= at <= last] for first, last in jumps if first < last]
    steps = [loop for loop in loops if sum("QGMMA" in what for what in loop) == QGMMA_A_STEP]
    return {
        "shared": kernel.metadata.shared,
        "steps": len(steps),
        "bytes_moved": sum("PRMT" in what for loop in steps for what in loop),
        "shuffles": [sum("SHFL" in what for what in loop) for loop in steps],
        "spilled": sum(bool(re.search(r"STL|LDL", what)) for loop in steps for what in loop),
        "late": [_exponentials_behind_the_wait(loop) for loop in steps],
        "said": said,
    }


def _compile_before(name: str, page: int) -> dict[str, Any]:
    """`in_common` or `quantise`, over keys in one piece or in pages."""
    heads, blocks = 8, 64
    k = torch.empty(1, heads, blocks * 128, 128, dtype=torch.bfloat16)
    bounds, table = torch.empty(1, 2, dtype=torch.int32), torch.empty(1, 2, dtype=torch.int32) if page else None
    common, scales = torch.empty(1, heads, 2, 128, dtype=torch.bfloat16), torch.empty(1, heads, blocks, 2)
    given, steps = (k, k, table, bounds, common), (1, 1, 1, 1, 1, 1, 1 if page else None)
    options = {"D": 128, "PAGE": page, "num_warps": 8, "grid": (1,)}
    if name == "in_common":
        sampled = {"SAMPLED": triton_e4m3.SAMPLED, "STEP": 256, "COLUMNS": triton_e4m3.COLUMNS, "OF_KEYS": True}
        kernel = triton_e4m3.in_common.warmup(*given, heads, *steps, **options, **sampled)
    else:
        written = (k.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), scales)
        kernel = triton_e4m3.quantise.warmup(*given, *written, heads, blocks, *steps, **options, BN=128, IN_ORDER=False)
    return {"shared": kernel.metadata.shared, "said": ptxas(kernel.asm["ptx"], 90)[0]}


def _exponentials_behind_the_wait(loop: list[str]) -> int:
    """How many of a step's come when P V of the step before must be done."""
    wait = next(i for i, what in enumerate(loop) if re.search(r"DEPBAR\.LE gsb0, 0x0", what))
    return sum("MUFU.EX2" in what for what in loop[wait:])


def main() -> None:
    warnings.simplefilter("ignore")
    offline()
    cases = json.loads(sys.argv[1])
    print(json.dumps([_compile_before(*case) if isinstance(case[1], int) else _compile(*case) for case in cases]))


if __name__ == "__main__":
    main()

"""Compiles the Hopper form for sm_90, and prints what each of the given cases takes. `test_hopper.py` runs it in a
process of its own, whose Triton must compile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_compile import offline, ptxas
from triton.backends.nvidia.compiler import get_ptxas

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend.hopper import host
from sparsekit.plan import TokenRule, dense_plan, plan_from_block_mask, plan_from_rule

PER_STEP = {64: 12, 128: 16, 256: 20}  # instructions of Q K^T and P V, 16 deep each, by head size; or of half a step


def _compile(dim: int, kind: str, sinks: str, lse: str, block_kv: int, more: str) -> dict[str, Any]:
    dtype, columns, halves = getattr(torch, kind), "columns" in more, "halves" in more
    q, k = torch.empty(1, 8, 2048, dim, dtype=dtype), torch.empty(1, 2, 2048, dim, dtype=dtype)
    plan = plan_from_rule(TokenRule(8, 512, 1920), Geometry.of(2048, block_q=128, block_kv=block_kv))
    if "dense" in more:
        plan = dense_plan(plan.geometry)
    if "lists" in more:
        plan = plan_from_block_mask(torch.ones(1, 8, 16, 16, dtype=torch.bool), plan.geometry)
    if halves:
        every = torch.ones(1, 1, 32, 32, dtype=torch.bool)
        plan = plan_from_block_mask(every, Geometry.of(2048, block_q=64, block_kv=64))
    if columns:
        tokens, bits = torch.zeros(1, 1, 100, dtype=torch.int32), torch.zeros(plan.rows, 4, dtype=torch.int32)
        plan = replace(plan, rule=None, tokens=tokens, token_bits=bits)
    if every := re.search(r"every(\d+)", more):
        plan = dense_plan(plan.geometry.anchors(int(every[1])))
        q = torch.empty(1, 8, plan.geometry.q_rows, dim, dtype=dtype)
    softmax = Softmax(0.1, None, torch.zeros(8) if sinks else None)
    keys = Keys(k, k)
    if page := re.search(r"page(\d+)", more):
        size = int(page[1])
        k_pages, v_pages = torch.empty(300, 2, size, 2 * dim, dtype=dtype).split(dim, -1)
        keys = Keys(k_pages, v_pages, torch.zeros(1, 2048 // size, dtype=torch.int32))
        assert host.covers(q, keys, plan, softmax, bool(lse)) == []
    dense = torch.empty(1, 8, 32, dim, dtype=dtype) if "corrected" in more else None
    plan = plan.corrected(64 if dense is not None else None)
    kernel = host.compile_form(q, keys, plan, softmax, bool(lse), dense)
    said, cubin = ptxas(kernel.asm["ptx"], 90)
    sass = _disassembled(cubin)
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)]
    jumps = [(int(to[1], 16), at) for at, what in code if (to := re.search("BRA.*?0x([0-9a-f]+)", what))]
    ends = [(to, at) for to, at in jumps if to < at]
    loops = [[what for at, what in code if first <= at <= last] for first, last in ends]
    # Of a rule's tiles of 128 keys a loop has two steps, one of them for half of the keys.
    half_steps = dim < 256 and block_kv == 128 and not re.search("dense|lists|every", more)
    per_loop = PER_STEP[dim] * (2 if half_steps else 1)
    steps = [loop for loop in loops if sum("HGMMA" in what for what in loop) == per_loop]
    return {
        "shared": kernel.metadata.shared,
        "hgmma": sass.count("HGMMA"),
        "steps": len(steps),
        "spilled": sum(bool(re.search(r"STL|LDL", what)) for loop in steps for what in loop),
        "said": said,
    }


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        dump = Path(get_ptxas(90).path).with_name("cuobjdump")
        return subprocess.run([dump, "--dump-sass", file], capture_output=True, text=True, check=True).stdout


def main() -> None:
    warnings.simplefilter("ignore")
    offline()
    print(json.dumps([_compile(*case) for case in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()

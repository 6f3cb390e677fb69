"""Compiles the portable FP8 form, and where that spills the 16-bit form, for cards that are not here, and prints what
each case takes. `test_triton_fp8.py` runs it in a process of its own, whose Triton must compile."""

from __future__ import annotations

import json
import re
import sys
import warnings
from typing import Any

import torch
from test_compile import Driver, offline, ptxas

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend import fp8, triton_blocks, triton_e4m3
from sparsekit.plan import TokenRule, dense_plan, plan_from_block_mask, plan_from_rule

TOKENS = 4096


def _compile(capability: tuple[int, int], kind: str, dim: int, more: str) -> dict[str, Any]:
    Driver.capability = capability[0] * 10 + capability[1]
    triton_blocks._has_tma = lambda device: capability[0] >= 9  # type: ignore[assignment]
    triton_blocks.processors_of = lambda device: 1  # type: ignore[assignment]
    block = 64 if kind == "tiles of 64" else 128
    geometry = Geometry.of(TOKENS, block_q=block, block_kv=block)
    plan = {
        "dense": lambda: dense_plan(geometry),
        "triangle": lambda: plan_from_rule(TokenRule(8, 512, TOKENS - 128), geometry),
        "tiles of 64": lambda: plan_from_block_mask(torch.ones(1, 32, 64, 64, dtype=torch.bool), geometry),
    }[kind]()
    q, k = (torch.empty(1, TOKENS, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8))
    softmax = Softmax(0.1, 5.0 if "cap" in more else None, torch.zeros(32) if "sinks" in more else None)
    lse = torch.empty(1, 32, TOKENS) if "lse" in more else None
    assert fp8.covers(q, Keys(k, k), plan, softmax, lse is not None) == []
    k8 = torch.empty(1, 8, TOKENS, dim, dtype=torch.float8_e4m3fn)
    rounded = torch.empty(1, 8, TOKENS // 128, 2), torch.empty(1, 8, 2, dim, dtype=torch.bfloat16)
    made = _form(capability, q, Keys(k8, k8.view(1, 8, dim, TOKENS)), plan, softmax, lse, rounded)
    products = re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S*", made.asm["ptx"])
    narrow = [one for one in products if ".e4m3.e4m3" in one or "kind::f8f6f4" in one]
    said, in_16_bits = ptxas(made.asm["ptx"], Driver.capability)[0], 0
    spilled = _spilled(said)
    if spilled or capability == (12, 0):  # for which no other test compiles the 16-bit form
        wide = _form(capability, q, Keys(k, k), plan, softmax, lse, (None, None))
        in_16_bits = _spilled(ptxas(wide.asm["ptx"], Driver.capability)[0])
    return {
        "shared": made.metadata.shared,
        "products": len(products),
        "of e4m3": len(narrow),
        "sums": _sums(made.asm["ttir"]),
        "spilled": spilled,
        "spilled in 16 bits": in_16_bits,
        "serialised": said.count("(C75"),
    }


def _form(capability: tuple[int, int], q: Any, keys: Keys, plan: Any, softmax: Softmax, lse: Any, rounded: Any) -> Any:
    short = triton_blocks._rows_are_short(plan)
    tile = triton_blocks.tile_for(capability, q.shape[3], keys.k.dtype, short)
    launch = triton_blocks._make_launch(q, keys, plan, tile, capability)
    _, args, flags = launch.arguments(q, keys, torch.empty_like(q), lse, softmax, rounded)
    return triton_blocks._attend.warmup(*args, grid=(1,), **launch.options, **flags)


def _spilled(said: str) -> int:
    """Bytes stored and loaded for want of registers."""
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


def _sums(ttir: str) -> list[str]:
    """What each product is added to in the tensor cores: "nothing", or the name of a sum."""
    zeros = set(re.findall(r"(%\S+) = arith\.constant dense<0\.0", ttir))
    added_to = re.findall(r"tt\.dot %\S+, %\S+, (%[^\s,]+)", ttir)
    return ["nothing" if name in zeros else name for name in added_to]


def _compile_before(capability: tuple[int, int], name: str, dim: int, page: int) -> dict[str, Any]:
    """`in_common` or `quantise`, over keys in one piece or in pages."""
    Driver.capability = capability[0] * 10 + capability[1]
    heads, blocks = 8, 64
    k = torch.empty(1, heads, blocks * 128, dim, dtype=torch.bfloat16)
    bounds, table = torch.empty(1, 2, dtype=torch.int32), torch.empty(1, 2, dtype=torch.int32) if page else None
    common, scales = torch.empty(1, heads, 2, dim, dtype=torch.bfloat16), torch.empty(1, heads, blocks, 2)
    given, steps = (k, k, table, bounds, common), (1, 1, 1, 1, 1, 1, 1 if page else None)
    options = {"D": dim, "PAGE": page, "num_warps": max(dim // 16, 8), "grid": (1,)}
    if name == "in_common":
        sampled = {"SAMPLED": triton_e4m3.SAMPLED, "STEP": 256, "COLUMNS": triton_e4m3.COLUMNS, "OF_KEYS": True}
        kernel = triton_e4m3.in_common.warmup(*given, heads, *steps, **options, **sampled)
    else:
        k8 = k.to(torch.float8_e4m3fn)
        written = (k8, k8, scales, heads, blocks)
        kernel = triton_e4m3.quantise.warmup(*given, *written, *steps, **options, BN=128, IN_ORDER=True)
    said = ptxas(kernel.asm["ptx"], Driver.capability)[0]
    return {"shared": kernel.metadata.shared, "spilled": _spilled(said)}


def main() -> None:
    warnings.simplefilter("ignore")
    offline()
    cases = json.loads(sys.argv[1])
    made = [(_compile if isinstance(case[3], str) else _compile_before)(tuple(case[0]), *case[1:]) for case in cases]
    print(json.dumps(made))


if __name__ == "__main__":
    main()

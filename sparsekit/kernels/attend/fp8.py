"""FP8: what its forms share, and what the portable one covers: triton_blocks.py over keys and values in e4m3."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend.covers import sixteen_bits
from sparsekit.kernels.device import capability_of
from sparsekit.plan import BlockPlan

__all__ = ["BLOCK_KEYS", "against", "asked_for", "covers", "key_blocks", "missing", "tile"]

BLOCK_KEYS = 128  # that share a scale
BLOCKS_KV = (32, 64, 128)  # of plans: a product of e4m3 is 32 deep, and keys of a tile share a scale
OLDEST = (8, 9)  # compute capability
# Of the softmax: products of e4m3 are multiplied by it and by two scales, 2e-15 each where q and k are zeros. Masked
# ones, of -inf, would be NaN were that 0 in float32.
LEAST_SCALE = 1e-8


def asked_for(asked: bool) -> str:
    """Why an FP8 form does not run, or "". It rounds to three bits, so nobody gets it who did not ask."""
    return "" if asked else "it rounds q, k and v to e4m3, and runs where it is asked for"


def missing(device: torch.device, asked: bool) -> str:
    """Why the portable form does not run on a device that runs Triton, or ""."""
    if device.type == "cuda" and torch.version.cuda is None:
        return "it needs an NVIDIA device: e4m3 is another format on some of AMD's"
    if device.type == "cuda" and (found := capability_of(device)) < OLDEST:
        return f"products of e4m3 need compute capability 8.9 or newer, this device has {found[0]}.{found[1]}"
    return asked_for(asked)


def tile(q: Tensor | None, narrow: bool) -> tuple[int, int]:
    """128 x 128, as the form for Hopper has it: a plan runs in either."""
    return 128, BLOCK_KEYS


def covers(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> list[str]:
    """Why the portable form cannot run this call, each reason in a clause; none where it runs it."""
    return list(_against(q, keys, plan, softmax))


def _against(q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax) -> Iterator[str]:
    yield from sixteen_bits(q)
    if plan.ranked is not None:
        yield "ranked keys with an early stop"
    if plan.geometry.block_kv not in BLOCKS_KV:
        yield f"tiles of {plan.geometry.block_kv} keys: one of {', '.join(map(str, BLOCKS_KV))}"
    yield from against(plan, softmax)
    for name, x in (("k", keys.k), ("v", keys.v)):
        if x.stride(3) != 1 or any(n > 1 and s % 8 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)):
            yield f"{name} with strides {x.stride()}: the last one 1, and the others multiples of 8"


def against(plan: BlockPlan, softmax: Softmax) -> Iterator[str]:
    """What no FP8 form takes of a plan and a softmax."""
    if softmax.scale < LEAST_SCALE:
        yield f"scale {softmax.scale:g}: {LEAST_SCALE:g} or more"
    if plan.row_ptr is not None and not plan.on_grid:
        yield f"tiles that start anywhere: {BLOCK_KEYS} keys, counted from the first, share a scale"
    if plan.tokens is not None:
        yield "single key columns"
    if plan.geometry.q_step > 1:
        yield f"every {plan.geometry.q_step}th query alone"
    if plan.correct_every:
        yield f"outputs corrected by every {plan.correct_every}th row"


def key_blocks(g: Geometry) -> int:
    """Blocks of keys that share a scale, of the longest sample; 1 without keys, for the copy engine takes no 0 rows."""
    return max(-(-max(end - start for start, end in zip(g.kv_start, g.kv_end, strict=True)) // BLOCK_KEYS), 1)

"""The Hopper FP8 form's device code in plain Python (gluon_in_python.py), with scales, but without rounding."""

from __future__ import annotations

import torch
from gluon_in_python import device_code, hosted, launched, results
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.attend.fp8 import BLOCK_KEYS, key_blocks
from sparsekit.kernels.attend.hopper import fp8
from sparsekit.plan import BlockPlan

ORDER = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])  # of the keys of each 16 in V


def _valid(x: Tensor, g: Geometry) -> Tensor:
    """(B, G, N, D): each sample's valid rows, then zeros, to the end of a block that shares scales."""
    made = x.new_zeros(*x.shape[:2], key_blocks(g) * BLOCK_KEYS, x.shape[3])
    for b, (start, end) in enumerate(zip(g.kv_start, g.kv_end, strict=True)):
        made[b, :, : end - start] = x[b, :, start:end]
    return made


def scaled(k: Tensor, v: Tensor, g: Geometry, shifted: bool, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `triton_e4m3.quantised` gives, in float64, with scales and what is in common drawn at random: any do.

    Scales differ 16-fold from a block to the next, so that one at a wrong place shows.
    """
    draw = torch.Generator().manual_seed(seed)
    (batch, heads, _, dim), blocks = k.shape, key_blocks(g)
    logs = 4 * torch.rand(batch, heads, blocks, 2, generator=draw, dtype=k.dtype)
    logs += 4 * (torch.arange(blocks)[:, None] % 2) - 4
    scales = torch.stack((logs[..., 0].exp2(), logs[..., 1]), -1)
    common = torch.randn(batch, heads, 2, dim, generator=draw, dtype=k.dtype)
    if not shifted:
        common[:, :, 0] = 0
    there = _valid(torch.ones_like(k), g)
    k, v = ((_valid(x, g) - common[:, :, i, None]) * there for i, x in enumerate((k, v)))
    by_key = logs.exp2().repeat_interleave(BLOCK_KEYS, 2)
    v = (v / by_key[..., 1:]).unflatten(2, (-1, 16))[:, :, :, ORDER].flatten(2, 3)
    return k / by_key[..., :1], v.mT.contiguous(), scales, common


def attend_fp8_in_python(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool = True, *, flush: int = 16,
    blocks: int = 3, seed: int = 0, fixed: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out, lse) of `fp8.attend_fp8`, in float64 on the CPU, where rounding to e4m3 does nothing.

    flush: steps that the tensor cores may sum. blocks: of a launch, at most. seed: who runs when.
    fixed: rows keep the maximum of their first step as long as their weights fit.
    """
    code = device_code("fp8_device", FLUSH=flush)
    with hosted(fp8, code):
        out, lse = results(q, plan.geometry.padded)
        own_lse = lse if return_lse else None
        rounded = scaled(k, v, plan.geometry, softmax.softcap is None, seed)
        for launch in fp8._prepare(q, k, plan, softmax, return_lse):
            arguments, workspace = launch.fill(q, rounded, out, own_lse, softmax.sink_logits)
            launched(
                code, launch.work, arguments, workspace, out, own_lse, softmax.sink_logits, blocks, seed,
                fp8.MODE_ARGUMENT, fixed,
            )  # fmt: skip
        return out, own_lse

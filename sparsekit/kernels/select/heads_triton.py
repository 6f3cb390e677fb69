"""The Triton side of `heads.py`: the lists of a head lie end to end, and several programs copy them as one piece."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import launch, on_device
from sparsekit.plan import BlockPlan

__all__ = ["copy_lists_triton"]

ENTRIES = 2048  # that one program copies at a time
PROGRAMS = 16  # of a head


@triton.jit(do_not_specialize=["rows", "heads", "heads_there"])
@no_type_check
def _copy_lists(
    p_ptr, p_entry, p_number, p_out_ptr, p_out, rows, heads, heads_there, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copies a part of the entries of one (sample, head): every PROGRAMS-th block of them."""
    i_block = tl.program_id(0) % PROGRAMS
    i_all = tl.program_id(0) // PROGRAMS  # sample * heads + head
    head = tl.load(p_number + i_all % heads)
    row = ((i_all // heads) * heads_there + head) * rows
    begin = tl.load(p_ptr + row).to(tl.int64)
    to = tl.load(p_out_ptr + i_all.to(tl.int64) * rows).to(tl.int64)
    count = (tl.load(p_ptr + row + rows).to(tl.int64) - begin).to(tl.int32)
    at = i_block * BLOCK
    while at < count:
        o_entry = at + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = o_entry < count
        entry = tl.load(p_entry + begin + o_entry, mask=inside, other=0)
        tl.store(p_out + to + o_entry, entry, mask=inside)
        at += PROGRAMS * BLOCK


def copy_lists_triton(plan: BlockPlan, number: Tensor, row_ptr: Tensor, room: int) -> Tensor:
    """int32 (room,): the entries of heads `number` (H,) of each sample, laid out by `row_ptr` (S*H*R + 1,)."""
    assert plan.row_ptr is not None and plan.entries is not None
    heads = len(number)
    out = torch.empty(room, dtype=torch.int32, device=plan.entries.device)
    args = (plan.row_ptr, plan.entries, number, row_ptr, out, plan.rows, heads, plan.heads)
    with on_device(out.device):
        launch(
            _copy_lists,
            plan.samples * heads * PROGRAMS,
            args,
            {"PROGRAMS": PROGRAMS, "BLOCK": ENTRIES, "num_warps": 4},
        )
    return out

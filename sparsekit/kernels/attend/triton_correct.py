"""Every output row plus its anchor's change, in place: one read and one write of the output."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import _padded, launch, on_device, steps_of
from sparsekit.kernels.primitives import _offset
from sparsekit.plan import BlockPlan, span_numbers

__all__ = ["add_changes"]

ROWS = 32  # queries a program
# Strides are specialised on, so that rows are read 16 bytes at a time.
_NUMBERS = ["tiles", "heads", "q_offset", "every", "rows", "samples", "rule_sample", "rule_head"]


def add_changes(out: Tensor, change: Tensor, plan: BlockPlan) -> None:
    """out (B, H, Q, D) += change (B, H, M, D) of each row's anchor, but for rows that the plan says are dense."""
    batch, heads, _, dim = out.shape
    g, rule, dense = plan.geometry, plan.rule, plan.dense_rows
    tiles = max(-(-(span.q_end - span.q_first) // ROWS) for span in g.spans)
    steps, of_rule = steps_of(out, change), (0, 0) if rule is None else steps_of(rule)[:2]
    args = (
        out, change, span_numbers(g, g.batch, out.device), dense if dense is None else dense.view(torch.uint8), rule,
        *steps, tiles, heads, g.q_offset, plan.correct_every, plan.rows, plan.samples, *of_rule,
    )  # fmt: skip
    options = {
        "GROUP": heads // plan.heads, "BQ": plan.block_q, "ROWS": ROWS, "D": dim, "DP": _padded(dim), "num_warps": 4,
    }  # fmt: skip
    with on_device(out.device):
        launch(_add, batch * heads * tiles, args, options, steps)


@triton.jit(do_not_specialize=_NUMBERS)
@no_type_check
def _add(
    p_out, p_change, p_span, p_dense, p_rule, o_batch, o_head, o_token, c_batch, c_head, c_token, tiles, heads,
    q_offset, every, rows, samples, rule_sample, rule_head,
    GROUP: tl.constexpr, BQ: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    # The heads of a row lie side by side, so consecutive programs walk them.
    i_program = tl.program_id(0)
    i_head = i_program % heads
    i_tile = i_program // heads % tiles
    i_batch = i_program // heads // tiles
    q_first = tl.load(p_span + i_batch * 4)
    q_end = tl.load(p_span + i_batch * 4 + 1)
    start = tl.load(p_span + i_batch * 4 + 3)
    pos = q_first + i_tile * ROWS + tl.arange(0, ROWS)
    needed = pos < q_end
    i_sample = tl.where(samples > 1, i_batch, 0)
    i_plan_head = i_head // GROUP
    if p_dense is not None:
        tile = pos // BQ - q_first // BQ
        p_row = p_dense + (i_sample * (heads // GROUP) + i_plan_head).to(tl.int64) * rows
        needed = needed & (tl.load(p_row + tile, mask=needed, other=1) == 0)
    if p_rule is not None:
        needed = needed & (pos < tl.load(p_rule + i_sample * rule_sample + i_plan_head * rule_head + 2))
    owner = pos // every - q_first // every
    d = tl.arange(0, DP)
    inside = needed[:, None] & (d < D)[None, :]
    p_from = p_change + _offset(i_batch, i_head, 0, c_batch, c_head, c_token) + owner.to(tl.int64)[:, None] * c_token
    p_to = p_out + _offset(i_batch, i_head, 0, o_batch, o_head, o_token)
    p_to = p_to + (pos + start - q_offset).to(tl.int64)[:, None] * o_token + d[None, :]
    more = tl.load(p_from + d[None, :], mask=inside, other=0.0)
    now = tl.load(p_to, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_to, (now + more).to(p_out.dtype.element_ty), mask=inside)

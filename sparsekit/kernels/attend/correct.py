"""Outputs corrected by dense rows (Delta Attention, arXiv 2505.11254): the definition, in torch.

    out[i] = sparse[i] + dense[a] - sparse[a],   a the last anchor at or before i

A call's anchors are the first of its queries in each block of `plan.correct_every` positions. Rows that the plan says
are dense stay as they are: what they lack is nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.kernels.choose import runs_triton
from sparsekit.plan import BlockPlan, anchor_positions, upload

__all__ = ["anchor_queries", "correct"]

# Outputs that are corrected in one go, in float32 as many bytes again.
BYTES_AT_ONCE = 1 << 26


def anchor_queries(q: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, M, D), laid out (B, M, H, D): of q (B, H, Q, D) the anchors, a copy. Row 0 stands where a sample has none.

    Args:
        geometry: of the anchors, with their `q_step`.
    """
    batch, row = _anchor_rows(geometry, q.device)
    return q.transpose(1, 2)[batch, row].transpose(1, 2)


@per_geometry
def _anchor_rows(g: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 (B, 1) and (B, M): the samples, and the row of the whole call's q that each anchor is."""
    position = anchor_positions(g, g.batch)
    start = torch.tensor(g.kv_start, dtype=torch.int64, device="cpu")[:, None]
    row = torch.where(position < 0, 0, position + start - g.q_offset)
    return upload(torch.arange(g.batch, device="cpu")[:, None], device), upload(row, device)


def correct(out: Tensor, dense: Tensor, plan: BlockPlan, impl: str | None = None) -> None:
    """Corrects out (B, H, Q, D) where it lies, whatever its strides. The host does not wait.

    Args:
        dense: (B, H, M, D), what `plan.anchors` gives.
        impl: "torch" or a form of the kernel; None: what the device runs.
    """
    anchors = plan.anchors
    assert anchors is not None
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    change = anchor_queries(out, anchors.geometry).to(wide).neg_().add_(dense)
    if runs_triton(out.device, impl):
        from sparsekit.kernels.attend.triton_correct import add_changes

        add_changes(out, change, plan)
        return
    g, every = plan.geometry, plan.correct_every
    at_once = max(BYTES_AT_ONCE // (out.shape[1] * out.shape[3] * every * wide.itemsize), 1)
    for b, span in enumerate(g.spans):
        same = plan.dense_queries(b if plan.samples > 1 else 0)
        for first in range(0, span.tiles(every), at_once):
            low, end = span.anchor(first, every), min(span.anchor(first + at_once, every), span.q_end)
            owner = torch.arange(low, end, device=out.device) // every - span.q_first // every
            more = change[b].index_select(1, owner)
            if same is not None:
                here = same[:, low - span.q_first : end - span.q_first]
                more = more.masked_fill(here.repeat_interleave(out.shape[1] // len(here), 0)[..., None], 0)
            rows = out[b, :, g.q_index(b, low) : g.q_index(b, low) + end - low]
            rows.copy_(rows.to(wide) + more)

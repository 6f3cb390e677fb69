"""Plans to and from PyTorch FlexAttention's BlockMask. What does not fit is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError
from sparsekit.plan.build import dense_plan, plan_from_block_mask
from sparsekit.plan.entries import CAUSAL, RULE
from sparsekit.plan.plan import BlockPlan
from sparsekit.plan.rule import TokenRule

__all__ = ["from_flex", "to_flex"]


def to_flex(plan: BlockPlan) -> BlockMask:
    """The BlockMask (S, P, Q, K) that computes exactly the plan's pairs.

    Raises:
        SparsekitError: tiles off FlexAttention's grid, single key columns, or padding on the left, which a BlockMask
            cannot hold.
    """
    g = plan.geometry
    if plan.ranked is not None:
        raise SparsekitError("to_flex: a ranked plan stops while it is executed; a BlockMask cannot say that.")
    if plan.correct_every:
        raise SparsekitError("to_flex: the plan's outputs are corrected afterwards; a BlockMask cannot say that.")
    if g.q_step > 1:
        raise SparsekitError(f"to_flex: the plan is of every {g.q_step}th query; a BlockMask has a row for each.")
    if plan.tokens is not None:
        raise SparsekitError("to_flex: the plan has single key columns, which a BlockMask cannot hold.")
    if any(g.kv_start) or g.q_offset % g.block_q:
        raise SparsekitError(
            f"to_flex: kv_start={g.kv_start}, q_offset={g.q_offset}: a BlockMask counts tiles from key 0 and query 0; "
            f"padding on the left and offsets off the grid of {g.block_q} do not fit."
        )
    columns, device = -(-g.kv_len // g.block_kv), _device_of(plan)
    flags = torch.full((plan.samples, plan.heads, plan.rows, columns), -1, dtype=torch.int32, device=device)
    key = torch.arange(columns, device=device) * g.block_kv
    for s, span in enumerate(plan.spans()):
        for row, head, flag, start in plan.entry_blocks(s):
            if bool((start % g.block_kv).any()):
                raise SparsekitError(f"to_flex: a tile starts off the grid of {g.block_kv} keys.")
            flags[s, head.to(device), row.to(device), (start // g.block_kv).to(device)] = flag.int().to(device)
        dense = range(plan.heads * plan.rows) if plan.all_dense else plan.rows_of(plan.dense_rows, s).tolist()
        starts = plan.row_starts(device)[s]
        for index in dense:
            head_index, r = divmod(index, plan.rows)
            low, high = starts[r].clamp(min=span.q_first), (starts[r] + g.block_q).clamp(max=span.q_end) - 1
            whole = (key + g.block_kv - 1 <= low).int() - 1  # 0 where whole, -1 where not
            flags[s, head_index, r] = torch.where(key <= high, torch.where(whole == 0, 0, CAUSAL), -1).int()
    # FlexAttention's query tiles run to the end of q; ours, to the last valid query.
    missing = -(-g.q_len // g.block_q) - plan.rows
    flags = torch.nn.functional.pad(flags, (0, 0, 0, missing), value=-1)

    limits = _limits(plan, device)
    ends = torch.tensor([[span.q_end, span.keys] for span in plan.spans()], dtype=torch.int64, device=device)
    q_offset, block_q, block_kv = g.q_offset, g.block_q, g.block_kv

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        s, p = b.clamp(max=plan.samples - 1), h.clamp(max=plan.heads - 1)
        position = q_idx + q_offset
        rule = TokenRule(limits[s, p, 0], limits[s, p, 1], limits[s, p, 2]).holds(position, kv_idx)
        # Uncompiled FlexAttention ignores the tile lists and asks this function alone.
        tile = flags[s, p, q_idx // block_q, kv_idx // block_kv]
        visited = (tile >= 0) & (rule | (tile & RULE == 0))
        return (kv_idx <= position) & (kv_idx < ends[s, 1]) & (position < ends[s, 0]) & visited

    partial, whole = flags > 0, flags == 0
    return BlockMask.from_kv_blocks(
        *_packed(partial),
        *_packed(whole),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        seq_lengths=(g.q_len, g.kv_len),
    )


def from_flex(mask: BlockMask, *, rule: TokenRule | None = None, geometry: Geometry | None = None) -> BlockPlan:
    """The plan of a causal BlockMask (one sample); queries are the last keys unless `geometry` says otherwise.

    Args:
        mask: partial tiles must be cut by causality alone, or by causality and `rule`.

    Raises:
        SparsekitError: a tile that is cut in another way, or that looks into the future; a geometry with padding on the
            left, or off the mask's tiles.
    """
    samples, heads = mask.kv_num_blocks.shape[:2]
    q_len, kv_len = mask.seq_lengths
    block_q, block_kv = mask.BLOCK_SIZE
    if samples != 1:
        raise SparsekitError(f"from_flex: BlockMask of {samples} samples; convert one sample at a time.")
    geometry = geometry or Geometry.of(q_len, kv_len, block_q=block_q, block_kv=block_kv)
    if (geometry.q_len, geometry.kv_len) != (q_len, kv_len):
        raise SparsekitError(
            f"from_flex: BlockMask of {q_len} queries and {kv_len} keys, geometry of {geometry.q_len} and "
            f"{geometry.kv_len}."
        )
    if rule is not None:
        rule = rule.checked(geometry.spans[0])
    if any(geometry.kv_start):
        raise SparsekitError(
            f"from_flex: kv_start={geometry.kv_start}: a BlockMask counts tiles from key 0, so padding on the left "
            f"does not fit."
        )
    if geometry.q_offset % block_q or (geometry.block_q, geometry.block_kv) != (block_q, block_kv):
        raise SparsekitError(
            f"from_flex: q_offset={geometry.q_offset} and tile must fit BLOCK_SIZE {(block_q, block_kv)}."
        )
    columns = -(-kv_len // block_kv)
    partial = _unpacked(mask.kv_num_blocks, mask.kv_indices, columns)
    whole = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        whole = _unpacked(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    base = plan_from_block_mask(partial | whole, geometry)
    if int(base.row_ptr[-1] if base.row_ptr is not None else 0) != int((partial | whole).sum()):
        raise SparsekitError("from_flex: the mask holds tiles in the future of their queries; it is not causal.")
    entries, needs_rule = base.entries, torch.zeros_like(base.entries, dtype=torch.bool)  # type: ignore[arg-type]
    at = 0
    for row, head, flags, start in base.entry_blocks(0):
        for i in range(len(row)):
            tile = int(head[i]), int(row[i]), int(start[i])
            cut = bool(partial[0, tile[0], tile[1], tile[2] // block_kv])
            needs_rule[at + i] = _is_ruled(mask, geometry, tile, cut, int(flags[i]), rule)
        at += len(row)
    assert entries is not None
    limits = None if rule is None else torch.tensor([[list(rule)]], dtype=torch.int32, device=entries.device)
    if not bool(needs_rule.any()) and base.kept_pairs() == heads * geometry.spans[0].causal_pairs:
        return dense_plan(geometry)
    return BlockPlan(
        geometry,
        heads=heads,
        row_ptr=base.row_ptr,
        entries=entries | needs_rule.int() * RULE,
        rule=limits,
        order=base.order,
        on_grid=True,
    )


def _is_ruled(
    mask: BlockMask, geometry: Geometry, tile: tuple[int, int, int], cut: bool, flags: int, rule: TokenRule | None
) -> bool:
    """Whether a tile (head, row, first key) needs the rule; an error where neither it nor causality explains it."""
    head, row, key = tile
    bq, span = geometry.block_q, geometry.spans[0]
    q_index = torch.arange(row * bq, min(row * bq + bq, geometry.q_len), device="cpu")
    k_pos = torch.arange(key, min(key + geometry.block_kv, span.keys), device="cpu")
    q_pos = (q_index + geometry.q_offset)[:, None]
    causal = k_pos <= q_pos
    if not cut:
        kept = torch.ones_like(causal)
    else:
        one = torch.zeros((), dtype=torch.int64, device="cpu")
        kept = torch.stack([mask.mask_mod(one, one + head, i, k_pos) for i in q_index]).expand_as(causal)
    if bool((kept == causal).all()):
        return False
    if rule is not None and bool((kept == rule.keep(q_pos, k_pos)).all()):
        return True
    raise SparsekitError(
        f"from_flex: the tile of head {head}, queries {row * bq}.. and keys {key}.. is cut neither by causality nor by "
        f"rule={rule}; a plan has no flag for it."
    )


def _device_of(plan: BlockPlan) -> torch.device:
    return next((t.device for t in plan.tensors.values()), torch.device("cpu"))


def _limits(plan: BlockPlan, device: torch.device) -> Tensor:
    rule: Any = plan.rule if plan.rule is not None else torch.tensor([[[0, 1, 0]]], dtype=torch.int32, device=device)
    return rule.expand(plan.samples, plan.heads, 3)


def _packed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's (count, indices) of boolean tiles (S, P, R, C)."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32), order.to(torch.int32)


def _unpacked(count: Tensor, indices: Tensor, columns: int) -> Tensor:
    used = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    out = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=indices.device)
    out.scatter_(-1, torch.where(used, indices.long(), columns), True)
    return out[..., :columns]

"""Plans made from rules and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry, Span
from sparsekit.errors import SparsekitError
from sparsekit.plan.plan import CAUSAL, FLAG_BITS, LONG, RULE, BlockPlan, TokenRule, _row_ptr, heaviest_first

__all__ = ["dense_plan", "plan_from_block_mask", "plan_from_rule"]


def dense_plan(geometry: Geometry) -> BlockPlan:
    """All causal pairs. No tensor."""
    return BlockPlan(geometry, samples=1 if geometry.uniform else geometry.batch)


def plan_from_rule(
    rules: TokenRule | Sequence[TokenRule], geometry: Geometry, device: torch.device | str = "cpu"
) -> BlockPlan:
    """The exact plan of a token rule (one, or one per sample), by arithmetic in O(rows + entries); shared by all heads.

    Rows in which the rule keeps every causal key are DENSE by bounds, so a window or a sink as wide as the prompt costs
    no memory. Only a row that `dense_from` cuts in two lists all its tiles.
    """
    if isinstance(rules, TokenRule):
        rules = [rules] * geometry.batch
    shared = geometry.uniform and len(set(rules)) == 1
    spans = geometry.spans[:1] if shared else geometry.spans
    parts = [_rule_rows(rule, span, geometry) for rule, span in zip(rules, spans, strict=False)]
    dense = torch.cat([part[0] for part in parts])
    if bool(dense.all()):
        return dense_plan(geometry)
    counts, entries = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    work = torch.cat([part[3] for part in parts])
    limits = torch.tensor([[[min(v, 2**31 - 1) for v in rule]] for rule in rules[: len(spans)]], dtype=torch.int32)
    plan = BlockPlan(
        geometry,
        samples=len(spans),
        row_ptr=_row_ptr(counts),
        entries=entries.to(torch.int32),
        rule=limits,
        dense_rows=dense,
        order=torch.argsort(work, descending=True, stable=True).to(torch.int32),
        long_rows=int((work > LONG * work.double().mean()).sum()),
    )
    return plan if torch.device(device).type == "cpu" else plan.to(device)


def _rule_rows(rule: TokenRule, span: Span, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dense?, entry count, entries, tiles visited) of a span's rows, padded to the geometry's row count."""
    bq, bk = geometry.block_q, geometry.block_kv
    start = (torch.arange(geometry.rows) + span.q_first // bq) * bq
    low = start.clamp(min=span.q_first)  # first and last query of the row
    high = (start + bq).clamp(max=span.q_end) - 1
    empty = high < low
    tiles = high // bk + 1
    dense = (low >= rule.dense_from) | (high < rule.sink + rule.window) | empty
    lists_all = (high >= rule.dense_from) & ~dense

    sink_tiles = torch.minimum(torch.tensor(-(-rule.sink // bk)), tiles)
    window_tile = torch.maximum((low - rule.window + 1).clamp(min=0) // bk, sink_tiles)
    window_tile = torch.where(lists_all, sink_tiles, window_tile)
    counts = torch.where(dense, 0, sink_tiles + tiles - window_tile)

    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    tile = torch.where(place < sink_tiles[row], place, place - sink_tiles[row] + window_tile[row])
    key, end = tile * bk, tile * bk + bk
    causal = end - 1 > low[row]
    kept_whole = (end <= rule.sink) | (key > high[row] - rule.window)
    flags = causal * CAUSAL + ~kept_whole * RULE
    work = torch.where(empty, 0, torch.where(dense, tiles, counts))
    return dense, counts, key << FLAG_BITS | flags, work


def plan_from_block_mask(mask: Tensor, geometry: Geometry) -> BlockPlan:
    """A plan of whole tiles, causal inside the diagonal's.

    Args:
        mask: bool (S, P, R, C): which tiles of `block_kv` keys each row of `block_q` queries visits. S is 1 or the
        batch.
            Tiles in the future are dropped.
    """
    bk = geometry.block_kv
    samples, heads, rows, columns = mask.shape
    if samples not in (1, geometry.batch) or (samples == 1 and not geometry.uniform) or rows != geometry.rows:
        raise SparsekitError(
            f"block mask {tuple(mask.shape)}: want (samples, heads, {geometry.rows} query tiles, key tiles), with one "
            f"sample for each of {geometry.batch} unless all are alike."
        )
    device = mask.device
    plan = BlockPlan(geometry, samples=samples, heads=heads)
    start = plan.row_starts(device)
    first = torch.tensor([s.q_first for s in plan.spans()], device=device)[:, None]
    end = torch.tensor([s.q_end for s in plan.spans()], device=device)[:, None]
    low, high = torch.maximum(start, first), torch.minimum(start + geometry.block_q, end) - 1
    key = torch.arange(columns, device=device) * bk
    kept = mask & (key <= high[:, None, :, None]) & (low <= high)[:, None, :, None]
    flags = (key + bk - 1 > low[:, None, :, None]).long() * CAUSAL
    entries = (key << FLAG_BITS | flags).expand_as(kept)[kept]
    counts = kept.sum(-1)
    return BlockPlan(
        geometry,
        samples=samples,
        heads=heads,
        row_ptr=_row_ptr(counts.flatten()),
        entries=entries.to(torch.int32),
        order=heaviest_first(counts),
    )

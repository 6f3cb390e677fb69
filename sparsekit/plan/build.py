"""Plans made from rules and masks. Here they are checked, whoever asks: every query keeps itself, none looks ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry, Span
from sparsekit.errors import SparsekitError
from sparsekit.plan.bounds import row_bounds
from sparsekit.plan.entries import CAUSAL, RULE, pack
from sparsekit.plan.plan import BlockPlan, heaviest_first, pointers
from sparsekit.plan.rule import TokenRule

__all__ = ["dense_plan", "plan_from_block_mask", "plan_from_rule"]

# Tiles of a row against the mean, above which it counts as long. Triangle's last rows are 150 times the mean at 128K.
LONG = 8


def dense_plan(geometry: Geometry) -> BlockPlan:
    """All causal pairs. No tensor."""
    return BlockPlan(geometry, samples=1 if geometry.uniform else geometry.batch, on_grid=True)


def plan_from_rule(
    rules: TokenRule | Sequence[TokenRule], geometry: Geometry, device: torch.device | str = "cpu"
) -> BlockPlan:
    """The exact plan of a token rule (one, or one per sample), by arithmetic in O(rows + entries); shared by all heads.

    Rows in which the rule keeps every causal key are DENSE by bounds, so a window or a sink as wide as the prompt costs
    no memory. Only a row that `dense_from` cuts in two lists all its tiles.

    Raises:
        SparsekitError: a rule by which some query does not keep itself, or whose fields are no whole numbers; not one
            rule for each sample; a rule that drops something, for a geometry of anchors alone.
    """
    each = [rules] * geometry.batch if isinstance(rules, TokenRule) else list(rules)
    if len(each) != geometry.batch:
        raise SparsekitError(f"{len(each)} token rules: one, or one for each of {geometry.batch} samples.")
    each = [rule.checked(span) for rule, span in zip(each, geometry.spans, strict=True)]
    if geometry.q_step > 1 and any(r.dense_from > s.q_first for r, s in zip(each, geometry.spans, strict=True)):
        raise SparsekitError(f"plan of every {geometry.q_step}th query: only a dense one can be.")
    shared = geometry.uniform and len(set(each)) == 1
    spans = geometry.spans[:1] if shared else geometry.spans
    parts = [_rule_rows(rule, span, geometry) for rule, span in zip(each, spans, strict=False)]
    if not any(part[2] for part in parts):
        return dense_plan(geometry)
    dense, work = _joined([part[0] for part in parts]), _joined([part[1] for part in parts])
    plan = BlockPlan(
        geometry,
        samples=len(spans),
        row_ptr=pointers(work.masked_fill(dense, 0)),
        entries=_joined([entries for part in parts for entries in part[2]]),
        rule=torch.tensor([[rule] for rule in each[: len(spans)]], dtype=torch.int32, device="cpu"),
        dense_rows=dense,
        order=torch.argsort(work, descending=True, stable=True).to(torch.int32),
        long_rows=int((work > LONG * int(work.sum()) / len(work)).sum()),
        on_grid=True,
    )
    return plan if torch.device(device).type == "cpu" else plan.to(device)


# Of a span's rows: which are dense, bool (R,); the tiles that each visits, int64 (R,); what the others list, int32.
_Rows = tuple[Tensor, Tensor, list[Tensor]]


def _rule_rows(rule: TokenRule, span: Span, geometry: Geometry) -> _Rows:
    """Rows of one span, as many as the geometry has.

    Rows short enough to keep all they see come first, then rows with a sink and a window, perhaps one that lists all
    its tiles because `dense_from` cuts it, and rows from there on. Which is which follows from integers, and of the
    rows in the middle each (or each few, of tiles wider than rows) is the one before it, moved.
    """
    bq, bk = geometry.block_q, geometry.block_kv
    base, ahead = span.q_first // bq, rule.sink + rule.window
    end = base + span.tiles(bq)
    short = end if span.q_end <= ahead else max(ahead // bq, base)
    late = min(max(base if rule.dense_from <= span.q_first else -(-rule.dense_from // bq), short), end)
    inner = late - (min(late * bq, span.q_end) > rule.dense_from)
    period = max(bk // bq, 1)
    first = max(-(-max(-(-rule.sink // bk) * bk + rule.window - 1, span.q_first) // bq), short)
    moved = max(min(inner, span.q_end // bq) - first, 0) // period
    first = min(first, inner)
    after = first + moved * period

    dense = torch.ones(geometry.rows, dtype=torch.bool, device="cpu")
    work = _causal_tiles(span, geometry)
    if late <= short:
        return dense, work, []
    dense[short - base : late - base] = False
    before_rows = [_listed(rule, span, m, bq, bk) for m in range(short, first)]
    moving_rows = [_listed(rule, span, m, bq, bk) for m in range(first, first + period)] if moved else []
    after_rows = [_listed(rule, span, m, bq, bk) for m in range(after, inner)]
    entries = []
    for start, rows in ((short, before_rows), (after, after_rows)):
        if rows:
            work[start - base : start - base + len(rows)] = _int32([*map(len, rows)])
    if before_rows:
        entries.append(_int32([e for row in before_rows for e in row]))
    if moved:
        work[first - base : after - base].view(moved, period)[:] = _int32([*map(len, moving_rows)])
        step, fixed = pack(period * bq, 0), -(-rule.sink // bk)
        steps = [0 if i < fixed else step for row in moving_rows for i in range(len(row))]
        times = torch.arange(moved, dtype=torch.int32, device="cpu")[:, None]
        entries.append((_int32([e for row in moving_rows for e in row]) + times * _int32(steps)).flatten())
    if after_rows:
        entries.append(_int32([e for row in after_rows for e in row]))
    if late > inner:
        entries.append(_all_tiles(rule, span, inner, bq, bk))
    return dense, work, entries


def _causal_tiles(span: Span, geometry: Geometry) -> Tensor:
    """int64 (R,): tiles that dense attention visits."""
    bq, bk, base = geometry.block_q, geometry.block_kv, span.q_first // geometry.block_q
    ends = torch.arange((base + 1) * bq, (base + geometry.rows + 1) * bq, bq, dtype=torch.int64, device="cpu")
    tiles = (ends.clamp(max=span.q_end) + (bk - 1)) // bk
    tiles[span.tiles(bq) :] = 0
    return tiles


def _edges(rule: TokenRule, span: Span, row: int, bq: int, bk: int) -> tuple[int, int, int, int]:
    """(last query's tile, first tiles with RULE, the first without it after those, the first with CAUSAL)."""
    low, high = max(row * bq, span.q_first), min(row * bq + bq, span.q_end) - 1
    return high // bk, rule.sink // bk, max(-(-(high - rule.window + 1) // bk), 0), max(-(-(low - bk + 2) // bk), 0)


def _listed(rule: TokenRule, span: Span, row: int, bq: int, bk: int) -> list[int]:
    """Entries of a row: tiles of the sinks, and those from its first query's window to its last query."""
    last, ruled, whole, causal = _edges(rule, span, row, bq, bk)
    sinks = -(-rule.sink // bk)
    first = max((max(row * bq, span.q_first) - rule.window + 1) // bk, sinks)
    return [
        pack(tile * bk, (RULE if ruled <= tile < whole else 0) | (CAUSAL if tile >= causal else 0))
        for tile in (*range(sinks), *range(first, last + 1))
    ]


def _all_tiles(rule: TokenRule, span: Span, row: int, bq: int, bk: int) -> Tensor:
    """int32: all tiles of a row that `dense_from` cuts."""
    last, ruled, whole, causal = _edges(rule, span, row, bq, bk)
    entries = torch.arange(0, pack((last + 1) * bk, 0), pack(bk, 0), dtype=torch.int32, device="cpu")
    entries[ruled : max(whole, ruled)] |= RULE
    entries[causal:] |= CAUSAL
    return entries


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def plan_from_block_mask(mask: Tensor, geometry: Geometry) -> BlockPlan:
    """A plan of whole tiles, causal inside the diagonal's. Waits for a GPU, since the mask says how much is listed.

    Args:
        mask: bool (S, P, R, C): which tiles of `block_kv` keys each row of `block_q` queries visits. S is 1 or the
        batch.
            Tiles in the future are dropped.

    Raises:
        SparsekitError: a mask of another shape or type, or in which some query does not keep itself.
    """
    bk = geometry.block_kv
    samples, heads, rows, columns = mask.shape if mask.ndim == 4 else (0, 0, 0, 0)
    needed = -(-max(span.q_end for span in geometry.spans) // bk)
    fits = samples in (1, geometry.batch) and (samples > 1 or geometry.batch == 1 or geometry.uniform)
    if not fits or heads < 1 or rows != geometry.rows or columns < needed or mask.dtype != torch.bool:
        raise SparsekitError(
            f"block mask {tuple(mask.shape)} {mask.dtype}: want bool (samples, heads, {geometry.rows} query tiles, at "
            f"least {needed} key tiles), with one sample for each of {geometry.batch} unless all are alike."
        )
    device = mask.device
    low, end, _, _ = (bound[:, None, :, None] for bound in row_bounds(geometry, samples, device))
    key = torch.arange(columns, dtype=torch.int64, device=device) * bk
    visible = (key < end) & (low < end)
    forgotten = visible & (key + bk > low) & ~mask
    if bool(forgotten.any()):
        sample, head, row, column = forgotten.nonzero()[0].tolist()
        query = max(int(low[sample, 0, row, 0]), column * bk)
        raise SparsekitError(
            f"block mask: query {query} of sample {sample}, head {head} does not keep itself: its own tile, keys "
            f"{column * bk}.., is off."
        )
    kept = mask & visible
    flags = (key + bk - 1 > low).long() * CAUSAL
    counts = kept.sum(-1)
    return BlockPlan(
        geometry,
        samples=samples,
        heads=heads,
        row_ptr=pointers(counts.flatten()),
        entries=pack(key, flags).expand_as(kept)[kept].to(torch.int32),
        order=heaviest_first(counts),
        on_grid=True,
    )

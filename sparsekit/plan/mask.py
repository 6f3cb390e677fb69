"""What a plan means: its token mask, the definition by which kernels and counts are judged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from sparsekit.call.geometry import TILES, Geometry, Span
from sparsekit.plan.bounds import anchor_positions, row_bounds, row_starts, segment_bounds
from sparsekit.plan.entries import CAUSAL, RULE, unpack
from sparsekit.plan.rows import PlanRows, Ranked

__all__ = ["dense_queries", "first_without_itself", "multiplicity", "out_of_range"]

_Pairs = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]


def multiplicity(plan: PlanRows) -> Tensor:
    """int32 (B, P, Q, K): how often each pair is computed. Anything above 1 is a broken plan."""
    g = plan.geometry
    if g.q_step > 1:
        return _anchor_pairs(g).expand(-1, plan.heads, -1, -1).int()
    out = torch.zeros(g.batch, plan.heads, g.q_len, g.kv_len, dtype=torch.int32, device="cpu")
    one = torch.ones((), dtype=torch.int32, device="cpu")
    for b in range(g.batch):
        s = b if plan.samples > 1 else 0
        span = g.spans[b]
        if span.q_first == span.q_end:
            continue
        q0, k0 = g.q_index(b, span.q_first), g.kv_start[b]
        view = out[b, :, q0 : q0 + span.q_end - span.q_first, k0 : k0 + span.keys]
        for head, q_pos, k_pos, kept in _pairs(plan, s):
            kept = kept & (k_pos < span.keys)
            head, q_row, key = (x.expand_as(kept)[kept] for x in (head, q_pos - span.q_first, k_pos))
            view.index_put_((head, q_row, key), one, accumulate=True)
    return out


def _anchor_pairs(g: Geometry) -> Tensor:
    """bool (B, 1, q_rows, K): all causal pairs of a call's anchors."""
    position = anchor_positions(g, g.batch)[:, None, :, None]
    key = _arange(g.kv_len) - torch.tensor(g.kv_start, dtype=torch.int64, device="cpu")[:, None, None, None]
    return (key >= 0) & (key <= position)


def first_without_itself(plan: PlanRows) -> tuple[int, int, int] | None:
    """(plan sample, plan head, position) of the first query with no tile or column of its own key, or None.

    Linear in the plan's entries; what a rule cuts from a tile is left aside. For plans on the CPU: it reads them.
    """
    if plan.row_ptr is None or plan.entries is None:
        return None
    bounds = row_bounds(plan.geometry, plan.samples, plan.row_ptr.device)[:2]
    low, high = (bound[:, None].expand(-1, plan.heads, -1).flatten() for bound in bounds)
    pointers = plan.row_ptr.long()
    owner = torch.repeat_interleave(torch.arange(len(low), device=low.device), pointers.diff())
    first, _ = unpack(plan.entries[: len(owner)].long())
    own = (torch.minimum(high[owner], first + plan.block_kv) - torch.maximum(low[owner], first)).clamp(min=0)
    lacking = torch.zeros_like(low).index_add_(0, owner, own) < high - low
    if plan.dense_rows is not None:
        lacking &= ~plan.dense_rows
    for row in lacking.nonzero().flatten().tolist():
        sample, head, tile = row // plan.rows // plan.heads, row // plan.rows % plan.heads, row % plan.rows
        query = torch.arange(int(low[row]), int(high[row]), device=low.device)
        tiles = first[int(pointers[row]) : int(pointers[row + 1])]
        held = ((query[:, None] >= tiles) & (query[:, None] < tiles + plan.block_kv)).any(1)
        if plan.tokens is not None:
            held |= torch.isin(query, plan.tokens[sample, head][plan.columns_of(sample, head, tile)].long())
        if not bool(held.all()):
            return sample, head, int(query[~held][0])
    return None


def dense_queries(plan: PlanRows, sample: int) -> Tensor | None:
    """bool (P, q_end - q_first) on the plan's device: the queries of a plan sample that keep every key by what the plan
    says of them, as rows that are dense by bounds or from their rule's `dense_from` on; None where it says of none."""
    span, found = plan.spans()[sample], None
    lead, count = span.q_first % plan.block_q, span.q_end - span.q_first
    if plan.dense_rows is not None:
        rows = plan.dense_rows.view(plan.samples, plan.heads, -1)[sample]
        found = rows.repeat_interleave(plan.block_q, 1)[:, lead : lead + count]
    if plan.rule is not None:
        dense_from = plan.rule[sample if len(plan.rule) > 1 else 0, :, 2:]
        late = torch.arange(span.q_first, span.q_end, device=dense_from.device) >= dense_from
        found = late.expand(plan.heads, -1) if found is None else found | late
    return found


def out_of_range(plan: PlanRows) -> str:
    """What of a plan's rows points past its entries, its keys or a row's own queries, in a clause; "" for none.

    Linear in the entries. Of plans on the CPU alone: a GPU's would have to be waited for.
    """
    if plan.row_ptr is None or plan.entries is None or plan.row_ptr.device.type != "cpu":
        return ""
    pointers = plan.row_ptr.long()
    if int(pointers[0]) < 0 or bool((pointers.diff() < 0).any()) or int(pointers[-1]) > len(plan.entries):
        return f"row_ptr has to ascend within 0..{len(plan.entries)}, the number of entries"
    low, _, _, keys = (
        bound[:, None].expand(-1, plan.heads, -1).flatten()
        for bound in row_bounds(plan.geometry, plan.samples, plan.row_ptr.device)
    )
    owner = torch.repeat_interleave(torch.arange(len(low), device="cpu"), pointers.diff())
    first, flags = unpack(plan.entries[int(pointers[0]) : int(pointers[-1])].long())
    last = first + plan.block_kv - 1
    causal = flags & CAUSAL > 0
    # A masked tile may begin behind the last key, as the parts of a coarser one do; another is kept whole.
    wrong = (first < 0) | (first >= keys[owner] + TILES[-1]) | (~causal & (last > low[owner]))
    if not bool(wrong.any()):
        return ""
    at = int(wrong.nonzero()[0])
    tile, row = f"{int(first[at])} to {int(last[at])}", int(owner[at])
    return (
        f"the tile of keys {tile} lies outside the {int(keys[row])} keys, or ahead of query {int(low[row])} without a "
        "causal mask"
    )


def _pairs(plan: PlanRows, sample: int) -> _Pairs:
    """Broadcastable (head, query position, key position, computed?) of one plan sample, some rows at a time."""
    visited, span = plan.visited, plan.spans()[sample]
    plan = plan.to("cpu")
    starts = row_starts(plan.geometry, plan.samples)[sample]
    lane, keys = _arange(plan.block_q), _arange(plan.block_kv)
    for row, head, flags, key in plan.entry_blocks(sample):
        q_pos = starts[row, None, None] + lane[None, :, None]
        k_pos = key[:, None, None] + keys
        kept = (q_pos >= span.q_first) & (q_pos < span.q_end)
        kept = kept & ((flags[:, None, None] & CAUSAL == 0) | ((k_pos <= q_pos) & (k_pos < span.keys)))
        if plan.rule is not None:
            ruled = plan.rule_of(sample, head[:, None, None]).holds(q_pos, k_pos)
            kept = kept & ((flags[:, None, None] & RULE == 0) | ruled)
        yield head[:, None, None], q_pos, k_pos, kept
    if plan.ranked is not None:
        yield from _ranked_pairs(plan, plan.ranked, visited, sample)
    dense = _arange(plan.heads * plan.rows) if plan.all_dense else plan.rows_of(plan.dense_rows, sample)
    for row in dense.tolist():
        q_pos = starts[row % plan.rows] + lane
        q_pos = q_pos[(q_pos >= span.q_first) & (q_pos < span.q_end)][:, None]
        k_pos = _arange(span.keys)[None]
        yield _head(row // plan.rows), q_pos, k_pos, k_pos <= q_pos
    if plan.tokens is not None and plan.token_bits is not None:
        for head_index in range(plan.heads):
            yield from _column_pairs(plan, sample, head_index, starts, lane, span)


def _column_pairs(plan: PlanRows, sample: int, head: int, starts: Tensor, lane: Tensor, span: Span) -> _Pairs:
    assert plan.tokens is not None
    k_pos = plan.tokens[sample, head].long()[None]
    for r in range(plan.rows):
        needed = plan.columns_of(sample, head, r)[None]
        q_pos = starts[r] + lane
        q_pos = q_pos[(q_pos >= span.q_first) & (q_pos < span.q_end)][:, None]
        yield _head(head), q_pos, k_pos, needed & (k_pos <= q_pos)


def _ranked_pairs(plan: PlanRows, ranked: Ranked, visited: Tensor | None, sample: int) -> _Pairs:
    firsts = segment_bounds(plan.geometry, plan.samples, ranked.segment_tokens, torch.device("cpu"))[0][sample]
    ptr = ranked.key_ptr[sample].tolist()
    tiles = ranked.q_index.shape[3] // plan.block_q
    for head, at, tile in product(range(plan.heads), range(ranked.q_index.shape[2]), range(tiles)):
        q_pos = ranked.q_index[sample, head, at].long()[tile * plan.block_q : (tile + 1) * plan.block_q, None]
        q_pos, first = q_pos[q_pos[:, 0] >= 0], int(firsts[at])
        own = torch.arange(first, first + ranked.segment_tokens, device="cpu")[None]
        yield _head(head), q_pos, own, own <= q_pos
        stop = ptr[at + 1]
        if visited is not None:
            stop = min(ptr[at] + int(visited[sample, head, at, tile]) * plan.block_kv, stop)
        earlier = torch.cat([_arange(min(plan.block_kv, first)), ranked.keys[sample, head, ptr[at] : stop].long()])
        yield _head(head), q_pos, earlier[None], (earlier < first) & (q_pos >= 0)


def _arange(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _head(index: int) -> Tensor:
    return torch.tensor([[index]], dtype=torch.int64, device="cpu")

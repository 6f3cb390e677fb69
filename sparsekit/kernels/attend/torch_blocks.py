"""A plan executed with batched torch ops: for CPUs, and any device without Triton.

Rows that list equally many tiles run in one call: their keys are gathered side by side, their query tiles become the
batch, and PyTorch's own attention does the arithmetic. Triangle takes a handful of calls at any length, with one mask
for all its inner rows. Rows that are dense by bounds read K and V where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels.attend.torch_ranked import attend_ranked
from sparsekit.plan import CAUSAL, RULE, BlockPlan, anchor_positions, unpack, upload
from sparsekit.plan.memo import MASKS

__all__ = ["attend_torch"]

# Gathered key columns x tile rows in one call: 32M pairs are 64 MiB of bfloat16 mask where rows share none.
PAIRS_AT_ONCE = 1 << 25
# Rows of a dense stretch that share one mask of (rows, keys): 512 x 128K bfloat16 is 128 MiB.
DENSE_ROWS_AT_ONCE = 512
# Masks up to this size stay with the plan; per-head dynamic plans run once, and rebuild theirs.
MEMO_BYTES = 1 << 26


@dataclass(frozen=True)
class _Batch:
    """Rows run in one call. heads, rows (n,): plan head, query tile; keys (n, W): positions; mask (n|1, 1, bq, W);
    empty (n, 1, bq, 1): queries of the call that keep nothing, if there are any."""

    heads: Tensor
    rows: Tensor
    keys: Tensor
    mask: Tensor
    empty: Tensor | None = None


def attend_torch(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pairs of `plan`.

    Args:
        q: (B, H, Q, D), any strides. keys: K and V are never repeated; those in pages are copied together.
        out: (B, H, Q, D), any strides.

    Returns:
        `out`, or a new (B, H, Q, D), laid out as (B, Q, H, D), and lse (B, H, Q) float32 where asked for.
    """
    k, v, _ = keys.gathered(plan.geometry)
    if plan.ranked is not None:
        return attend_ranked(q, k, v, plan, plan.ranked, softmax, return_lse, out)
    batch, heads, q_len, _ = q.shape
    g = plan.geometry
    padded = g.padded
    out = output(q, out, padded)
    lse = q.new_full((batch, heads, q_len), float("-inf"), dtype=torch.float32) if return_lse else None
    if g.q_step > 1:
        _run_anchors(q, k, v, g, softmax, out, lse)
        return out, lse
    for b in range(batch):
        span = g.spans[b]
        if span.q_first == span.q_end:
            continue
        runner = _Sample(q[b], k[b], v[b], plan, softmax, b, return_lse)
        runner.run()
        lead = span.q_first % plan.block_q  # rows of the first tile that come before the first query
        rows = slice(lead, lead + span.q_end - span.q_first)
        at = g.q_index(b, span.q_first)
        out[b, :, at : at + span.q_end - span.q_first] = runner.out.flatten(1, 2)[:, rows]
        if lse is not None and runner.lse is not None:
            lse[b, :, at : at + span.q_end - span.q_first] = runner.lse.flatten(1, 2)[:, rows]
    return out, lse


class _Sample:
    """One sample: its queries on the plan's tile grid, (H, R, block_q, D), and the same for what comes out."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, index: int, want_lse: bool
    ) -> None:
        g, span = plan.geometry, plan.geometry.spans[index]
        bq, rows = plan.block_q, plan.rows
        start = g.kv_start[index]
        self.plan, self.softmax = plan, softmax
        self.sample, self.span = (index if plan.samples > 1 else 0), span
        self.k, self.v = k[:, start : start + span.keys], v[:, start : start + span.keys]
        lead = span.q_first % bq
        at = g.q_index(index, span.q_first)
        q = q[:, at : at + span.q_end - span.q_first]
        self.q = pad(q, (0, 0, lead, rows * bq - lead - q.shape[1])).unflatten(1, (rows, bq))
        heads, dim = q.shape[0], q.shape[-1]
        # What a row without entries gives.
        self.out = q.new_zeros(rows, bq, heads, dim).permute(2, 0, 1, 3)
        self.lse = q.new_full((heads, rows, bq), float("-inf"), dtype=torch.float32) if want_lse else None

    def run(self) -> None:
        plan = self.plan
        if plan.all_dense:
            used = -(-self.span.q_end // plan.block_q) - self.span.q_first // plan.block_q
            for head in range(plan.heads):
                self._run_dense(head, 0, used)
            return
        for head, first, last in _dense_runs(plan, self.sample):
            self._run_dense(head, first, last)
        for batch in _batches(plan, self.sample, self.q.dtype, self.q.device):
            self._run_listed(batch)

    def _run_listed(self, batch: _Batch) -> None:
        heads, key_heads, per = self.q.shape[0], self.k.shape[0], self.plan.heads
        n, width = batch.keys.shape
        if per == 1:
            first, last = int(batch.rows[0]), int(batch.rows[-1]) + 1
            rows = slice(first, last) if last - first == n else batch.rows
            q = self.q[:, rows].transpose(0, 1)
            flat = batch.keys.flatten()
            k, v = (x.index_select(1, flat).view(key_heads, n, width, -1).transpose(0, 1) for x in (self.k, self.v))
        else:
            q = self.q.unflatten(0, (per, heads // per))[batch.heads, :, batch.rows]
            owner = (batch.heads * key_heads // per)[:, None]
            k, v = (x[owner, batch.keys][:, None] for x in (self.k, self.v))
        out, lse = _softmax_attention(q, k, v, batch.mask, self._softmax_for(batch), self.lse is not None)
        if batch.empty is not None:
            out = out.masked_fill(batch.empty, 0)
            lse = None if lse is None else lse.masked_fill(batch.empty[..., 0], float("-inf"))
        if per == 1:
            self.out[:, rows] = out.transpose(0, 1)
            if self.lse is not None and lse is not None:
                self.lse[:, rows] = lse.transpose(0, 1)
        else:
            self.out.unflatten(0, (per, heads // per))[batch.heads, :, batch.rows] = out
            if self.lse is not None and lse is not None:
                self.lse.unflatten(0, (per, heads // per))[batch.heads, :, batch.rows] = lse

    def _softmax_for(self, batch: _Batch) -> Softmax:
        """The softmax with its sink logits laid beside the heads of each batch row."""
        sinks = self.softmax.sink_logits
        if sinks is None:
            return self.softmax
        per = self.plan.heads
        sinks = sinks[None] if per == 1 else sinks.view(per, -1)[batch.heads]
        return Softmax(self.softmax.scale, self.softmax.softcap, sinks)

    def _run_dense(self, plan_head: int, first: int, last: int) -> None:
        """Query tiles [first, last) of one plan head, over all their causal keys."""
        plan, span, bq = self.plan, self.span, self.plan.block_q
        q_heads, k_heads = self.q.shape[0] // plan.heads, max(self.k.shape[0] // plan.heads, 1)
        h0, k0 = plan_head * q_heads, plan_head * self.k.shape[0] // plan.heads
        hs, ks = slice(h0, h0 + q_heads), slice(k0, k0 + k_heads)
        sinks = self.softmax.sink_logits
        softmax = Softmax(self.softmax.scale, self.softmax.softcap, None if sinks is None else sinks[None, hs])
        base = span.q_first // bq * bq
        plain = softmax.softcap is None and sinks is None and self.lse is None
        if base + first * bq == 0 and plain:
            end = min(last * bq, span.q_end)
            q = self.q[hs, :last].flatten(1, 2)[None, :, :end]
            k, v = self.k[None, ks, :end], self.v[None, ks, :end]
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax.scale, enable_gqa=True)
            self.out[hs, :last].flatten(1, 2)[:, :end] = out[0]
            return
        step = max(DENSE_ROWS_AT_ONCE // bq, 1)
        for r in range(first, last, step):
            rows = slice(r, min(r + step, last))
            q_pos = torch.arange(base + rows.start * bq, base + rows.stop * bq, device=self.q.device)
            end = min(base + rows.stop * bq, span.q_end)
            mask = torch.arange(end, device=self.q.device) <= q_pos[:, None]
            q = self.q[hs, rows].flatten(1, 2)[None]
            k, v = self.k[None, ks, :end], self.v[None, ks, :end]
            out, lse = _softmax_attention(q, k, v, _additive(mask, q.dtype), softmax, self.lse is not None)
            self.out[hs, rows] = out[0].unflatten(1, (-1, bq))
            if self.lse is not None and lse is not None:
                self.lse[hs, rows] = lse[0].unflatten(1, (-1, bq))


def _run_anchors(
    q: Tensor, k: Tensor, v: Tensor, g: Geometry, softmax: Softmax, out: Tensor, lse: Tensor | None
) -> None:
    """The anchors of a call, q (B, H, M, D), over all their causal keys, into out and lse."""
    sinks, positions = softmax.sink_logits, upload(anchor_positions(g, g.batch), q.device)
    softmax = Softmax(softmax.scale, softmax.softcap, None if sinks is None else sinks[None])
    for b, span in enumerate(g.spans):
        count = span.tiles(g.q_step)
        for first in range(0, count, DENSE_ROWS_AT_ONCE):
            rows = slice(first, min(first + DENSE_ROWS_AT_ONCE, count))
            end = span.anchor(rows.stop - 1, g.q_step) + 1
            mask = torch.arange(end, device=q.device) <= positions[b, rows, None]
            some_k, some_v = (x[b, None, :, g.kv_start[b] : g.kv_start[b] + end] for x in (k, v))
            made, own = _softmax_attention(
                q[b, None, :, rows], some_k, some_v, _additive(mask, q.dtype), softmax, lse is not None
            )
            out[b, :, rows] = made[0]
            if lse is not None and own is not None:
                lse[b, :, rows] = own[0]


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax: Softmax, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q (n, h, bq, D) over k, v (n, g, W, D) under an additive mask that broadcasts to (n, h, bq, W)."""
    if softmax.softcap is None and softmax.sink_logits is None and not want_lse:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax.scale, enable_gqa=True)
        return out, None
    repeat = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (k.shape[1], repeat)).to(wide)
    scores = softmax.logits((grouped @ k.to(wide).transpose(-1, -2)[:, :, None]).flatten(1, 2)) + mask
    lse = softmax.join(scores.logsumexp(-1))
    weights = torch.exp(scores - lse[..., None]).unflatten(1, (k.shape[1], repeat))
    out = (weights @ v.to(wide)[:, :, None]).flatten(1, 2)
    return out.to(q.dtype), lse


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _dense_runs(plan: BlockPlan, sample: int) -> list[tuple[int, int, int]]:
    """(plan head, first tile, one past the last) of neighbouring rows that are dense by bounds."""
    runs: list[tuple[int, int, int]] = []
    if plan.dense_rows is None:
        return runs
    g, span = plan.geometry, plan.spans()[sample]
    used = -(-span.q_end // g.block_q) - span.q_first // g.block_q
    for row in plan.rows_of(plan.dense_rows, sample).tolist():
        head, r = divmod(row, plan.rows)
        if r >= used:
            continue
        if runs and runs[-1][0] == head and runs[-1][2] == r:
            runs[-1] = (head, runs[-1][1], r + 1)
        else:
            runs.append((head, r, r + 1))
    return runs


def _batches(plan: BlockPlan, sample: int, dtype: torch.dtype, device: torch.device) -> Iterator[_Batch]:
    """The listed rows of a plan sample, kept in the plan's memo as long as their masks are small."""
    key = (MASKS, sample, dtype, device)
    kept: list[_Batch] | None = plan.memo.get(key)
    if kept is not None:
        yield from kept
        return
    made, size = [], 0
    for batch in _make_batches(plan, sample, dtype, device):
        size += batch.mask.nbytes
        if size <= MEMO_BYTES:
            made.append(batch)
        yield batch
    if size <= MEMO_BYTES:
        plan.memo.keep(key, made)


def _make_batches(plan: BlockPlan, sample: int, dtype: torch.dtype, device: torch.device) -> Iterator[_Batch]:
    assert plan.row_ptr is not None and plan.entries is not None
    rows = plan.heads * plan.rows
    ptr = plan.row_ptr[sample * rows : (sample + 1) * rows + 1].long()
    counts = ptr.diff()
    needs = _column_counts(plan, sample)
    busy = counts > 0 if needs is None else (counts > 0) | (needs > 0)
    for count in counts[busy].unique().tolist():
        same = (busy & (counts == count)).nonzero().flatten()
        columns = 0 if needs is None else int(needs[same].max())
        width = count * plan.block_kv + columns
        step = max(PAIRS_AT_ONCE // (width * plan.block_q), 1)
        for part in same.split(step):
            yield from _split_by_mask(_lay_out(plan, sample, part, ptr[part], count, columns), dtype)


def _column_counts(plan: BlockPlan, sample: int) -> Tensor | None:
    if plan.tokens is None:
        return None
    counts = [plan.columns_of(sample, p, r).sum() for p in range(plan.heads) for r in range(plan.rows)]
    return torch.stack(counts)


def _lay_out(plan: BlockPlan, sample: int, part: Tensor, ptr: Tensor, count: int, columns: int) -> _Batch:
    """Rows `part` (head * R + r), which all list `count` tiles, as one batch with a boolean mask."""
    assert plan.entries is not None
    span, device = plan.spans()[sample], part.device
    head, row = part // plan.rows, part % plan.rows
    q_pos = plan.row_starts(device)[sample, row, None, None] + torch.arange(plan.block_q, device=device)[:, None]
    key, flags = unpack(plan.entries[ptr[:, None] + torch.arange(count, device=device)].long())
    keys = (key[..., None] + torch.arange(plan.block_kv, device=device)).flatten(1)
    flags = flags.repeat_interleave(plan.block_kv, 1)[:, None]
    k_pos = keys[:, None]
    mask = (flags & CAUSAL == 0) | ((k_pos <= q_pos) & (k_pos < span.keys))
    if plan.rule is not None:
        rule = plan.rule_of(sample, head[:, None, None])
        mask = mask & ((flags & RULE == 0) | rule.holds(q_pos, k_pos))
    if columns:
        more, needed = _columns(plan, sample, head, row, columns)
        keys = torch.cat([keys, more], 1)
        mask = torch.cat([mask, needed[:, None] & (more[:, None] <= q_pos)], 2)
    # An empty row would be NaN. Those of a tile outside this call attend to anything: they are cut off afterwards; what
    # a plan lets keep nothing does too, and is put right.
    empty = ~mask.any(-1, keepdim=True)
    mask = mask | empty
    empty &= (q_pos >= span.q_first) & (q_pos < span.q_end)
    some = empty[:, None] if bool(empty.any()) else None
    return _Batch(head, row, keys.clamp(max=span.keys - 1), mask[:, None], some)


def _columns(plan: BlockPlan, sample: int, head: Tensor, row: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(positions (n, columns), needed?): the single columns that each row still needs, packed to the left."""
    assert plan.tokens is not None
    bits = torch.stack([plan.columns_of(sample, h, r) for h, r in zip(head.tolist(), row.tolist(), strict=True)])
    needed, at = bits.to(torch.int8).sort(dim=1, descending=True, stable=True)
    positions = plan.tokens[sample, head].long().gather(1, at)
    return positions[:, :columns], needed[:, :columns].bool()


def _split_by_mask(batch: _Batch, dtype: torch.dtype) -> Iterator[_Batch]:
    """One mask for neighbouring rows whose masks are equal, where that leaves few pieces; else a mask for each row."""
    mask = batch.mask
    changes = (mask[1:] != mask[:-1]).flatten(1).any(1).nonzero().flatten() + 1
    if len(changes) > 3:
        yield replace(batch, mask=_additive(mask, dtype))
        return
    edges = [0, *changes.tolist(), len(mask)]
    for a, b in pairwise(edges):
        empty = None if batch.empty is None else batch.empty[a:b]
        yield _Batch(batch.heads[a:b], batch.rows[a:b], batch.keys[a:b], _additive(mask[a : a + 1], dtype), empty)

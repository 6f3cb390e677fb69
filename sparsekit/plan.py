"""BlockPlan: which query-key pairs are computed, as tensors. Every pattern ends in one, every kernel starts from one.

CSR over rows; a row is (plan sample, plan head, query tile). A plan sample or plan head dimension of 1 is shared by
all. All token numbers in a plan are POSITIONS (geometry.py): kernels add `kv_start[b]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.geometry import Geometry, Span

__all__ = [
    "CAUSAL",
    "RULE",
    "BlockPlan",
    "TokenRule",
    "dense_plan",
    "plan_from_block_mask",
    "plan_from_rule",
    "stack_heads",
]

CAUSAL = 1  # entry flag: apply the causal mask, and the valid key length
RULE = 2  # entry flag: apply the token rule
FLAG_BITS = 2

# Entries looked at in one go by counts and masks: 64K entries x 128 rows of int64 are 64 MiB.
ENTRIES_AT_ONCE = 1 << 16
# Tiles of a row against the mean, above which it counts as long. Triangle's last rows are 150 times the mean at 128K.
LONG = 8


class TokenRule(NamedTuple):
    """Query i keeps key j <= i iff `j < sink` or `i - j < window` or `i >= dense_from`; all in tokens.

    `window` counts the query itself. This is what a static pattern hands to the kernel, exact to the token.
    """

    sink: int
    window: int
    dense_from: int

    def keep(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The rule itself, causality included, on broadcastable positions."""
        rule = (k_pos < self.sink) | (q_pos - k_pos < self.window) | (q_pos >= self.dense_from)
        return (k_pos <= q_pos) & rule

    def union(self, other: TokenRule) -> TokenRule:
        """What either rule keeps. Exact: each of the three terms only grows."""
        return TokenRule(
            max(self.sink, other.sink), max(self.window, other.window), min(self.dense_from, other.dense_from)
        )


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one attention call computes.

    With S plan samples (1 or the batch), P plan heads (1, the key heads, or the query heads) and R query tiles of
    `geometry.block_q` tokens, row `(s * P + p) * R + r` is the r-th query tile of sample s. Tiles lie on the grid that
    starts at position 0, so the first one may begin before this call's first query.

    A row is LISTED, its tiles being `entries[row_ptr[row]:row_ptr[row + 1]]`, or DENSE by bounds (`dense_rows`): all
    causal keys, no entries. A plan without `row_ptr` is dense everywhere and holds no tensor at all.

    Attributes:
        row_ptr: int32 (int64 past 2^31 entries), (S*P*R + 1,).
        entries: int32 (nnz,), `position of the tile's first key * 4 + flags`. Flag CAUSAL: apply the causal and valid
            length mask; RULE: apply the token rule; 0: every pair of the tile is kept. A tile starts on any key; no
            pair is in two tiles.
        rule: int32 (S, P, 3), either may be 1: sink, window, dense_from of tiles flagged RULE.
        dense_rows: bool (S*P*R,).
        tokens: int32 (S, P, T), ascending: single key columns. Unused places at the end hold the largest int32.
        token_bits: int32 (S*P*R, ceil(T / 32)): bit t % 32 of word t // 32 says that the row still needs column t, that
            is, no tile of the row holds it. Causality holds for columns.
        order: int32 (S*R,): launch order of (sample, tile) = s * R + r, heaviest first, the heads of a row together.
        long_rows: host count of rows, the first of `order`, that visit more than `LONG` times the mean: on few heads
            they alone decide the finish, so kernels may cut them over keys. 0 where not known.
        memo: what an executor derived from this plan (schedules, masks), kept as long as the plan.
    """

    geometry: Geometry
    samples: int = 1
    heads: int = 1
    row_ptr: Tensor | None = None
    entries: Tensor | None = None
    rule: Tensor | None = None
    dense_rows: Tensor | None = None
    tokens: Tensor | None = None
    token_bits: Tensor | None = None
    order: Tensor | None = None
    long_rows: int = 0
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def block_q(self) -> int:
        return self.geometry.block_q

    @property
    def block_kv(self) -> int:
        return self.geometry.block_kv

    @property
    def all_dense(self) -> bool:
        return self.row_ptr is None

    @property
    def rows(self) -> int:
        """Query tiles a plan sample and head has."""
        return self.geometry.rows

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = ("row_ptr", "entries", "rule", "dense_rows", "tokens", "token_bits", "order")
        return {name: value for name in named if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's own tensors; a dense plan has none."""
        return sum(t.nbytes for t in self.tensors.values())

    def to(self, device: torch.device | str) -> BlockPlan:
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors.items()}
        return BlockPlan(self.geometry, self.samples, self.heads, long_rows=self.long_rows, **moved)

    def spans(self) -> tuple[Span, ...]:
        """The span of each plan sample."""
        return self.geometry.spans[: self.samples]

    def row_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 (S, R): position at which each query tile starts."""
        firsts = torch.tensor([span.q_first // self.block_q for span in self.spans()], device=device)
        return (firsts[:, None] + torch.arange(self.rows, device=device)) * self.block_q

    # ---- what it means: the token mask, and how much of it there is

    def to_mask(self) -> Tensor:
        """bool (B, P, Q, K): the pairs that are computed. Quadratic: for tests, pictures and the reference."""
        return self.multiplicity() > 0

    def multiplicity(self) -> Tensor:
        """int32 (B, P, Q, K): how often each pair is computed. Anything above 1 is a broken plan."""
        g = self.geometry
        out = torch.zeros(g.batch, self.heads, g.q_len, g.kv_len, dtype=torch.int32)
        for b in range(g.batch):
            s = b if self.samples > 1 else 0
            span = g.spans[b]
            if span.q_first == span.q_end:
                continue
            q0, k0 = g.q_index(b, span.q_first), g.kv_start[b]
            view = out[b, :, q0 : q0 + span.q_end - span.q_first, k0 : k0 + span.keys]
            for head, q_pos, k_pos, kept in self._pairs(s):
                kept = kept & (k_pos < span.keys)
                head, q_row, key = (x.expand_as(kept)[kept] for x in (head, q_pos - span.q_first, k_pos))
                view.index_put_((head, q_row, key), torch.ones((), dtype=torch.int32), accumulate=True)
        return out

    def _pairs(self, sample: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Broadcastable (head, query position, key position, computed?) of one plan sample, some rows at a time."""
        span, plan = self.spans()[sample], self.to("cpu")
        starts = self.row_starts()[sample]
        lane = torch.arange(self.block_q)
        for row, head, flags, key in plan._entry_blocks(sample):
            q_pos = starts[row, None, None] + lane[None, :, None]
            k_pos = key[:, None, None] + torch.arange(self.block_kv)
            kept = (q_pos >= span.q_first) & (q_pos < span.q_end)
            kept = kept & ((flags[:, None, None] & CAUSAL == 0) | ((k_pos <= q_pos) & (k_pos < span.keys)))
            if plan.rule is not None:
                sink, window, dense_from = plan._rule_of(sample, head)[..., None, None].unbind(0)
                ruled = (k_pos < sink) | (q_pos - k_pos < window) | (q_pos >= dense_from)
                kept = kept & ((flags[:, None, None] & RULE == 0) | ruled)
            yield head[:, None, None], q_pos, k_pos, kept
        dense = torch.arange(self.heads * self.rows) if plan.all_dense else self._rows_of(plan.dense_rows, sample)
        for row in dense.tolist():
            q_pos = starts[row % self.rows] + lane
            q_pos = q_pos[(q_pos >= span.q_first) & (q_pos < span.q_end)][:, None]
            k_pos = torch.arange(span.keys)[None]
            yield torch.tensor([[row // self.rows]]), q_pos, k_pos, k_pos <= q_pos
        if plan.tokens is not None and plan.token_bits is not None:
            for head_index in range(self.heads):
                yield from self._column_pairs(plan, sample, head_index, starts, lane, span)

    def _column_pairs(
        self, plan: BlockPlan, sample: int, head: int, starts: Tensor, lane: Tensor, span: Span
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        k_pos = plan.tokens[sample, head].long()[None]  # type: ignore[index]
        for r in range(self.rows):
            needed = plan.columns_of(sample, head, r)[None]
            q_pos = starts[r] + lane
            q_pos = q_pos[(q_pos >= span.q_first) & (q_pos < span.q_end)][:, None]
            yield torch.tensor([[head]]), q_pos, k_pos, needed & (k_pos <= q_pos)

    def columns_of(self, sample: int, head: int, row: int) -> Tensor:
        """bool (T,): the single columns that a row still needs."""
        assert self.tokens is not None and self.token_bits is not None
        words = self.token_bits[(sample * self.heads + head) * self.rows + row]
        bits = (words[:, None] >> torch.arange(32, device=words.device)) & 1
        return bits.flatten()[: self.tokens.shape[-1]].bool()

    def _rows_of(self, flags: Tensor | None, sample: int) -> Tensor:
        """Rows of one plan sample (head * R + r) whose flag is set."""
        if flags is None:
            return torch.zeros(0, dtype=torch.int64)
        return flags.view(self.samples, -1)[sample].nonzero().flatten().cpu()

    def _rule_of(self, sample: int, head: Tensor) -> Tensor:
        """int64 (3, *head.shape): the rule of plan heads `head`."""
        assert self.rule is not None
        rule = self.rule[sample if self.rule.shape[0] > 1 else 0].long()
        return rule[head if rule.shape[0] > 1 else torch.zeros_like(head)].movedim(-1, 0)

    def _entry_blocks(self, sample: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(row in 0..R, head, flags, first key position) of one plan sample's entries, each int64 (n,)."""
        if self.row_ptr is None or self.entries is None:
            return
        per_sample = self.heads * self.rows
        ptr = self.row_ptr[sample * per_sample : (sample + 1) * per_sample + 1].long().cpu()
        owner = torch.repeat_interleave(torch.arange(per_sample), ptr.diff())
        first = int(ptr[0])
        for at in range(0, len(owner), ENTRIES_AT_ONCE):
            part = owner[at : at + ENTRIES_AT_ONCE]
            entry = self.entries[first + at : first + at + len(part)].long().cpu()
            yield part % self.rows, part // self.rows, entry & 3, entry >> FLAG_BITS

    def kept_pairs(self) -> int:
        """Query-key pairs computed, over all samples and plan heads. Counted by arithmetic, nothing quadratic."""
        if "kept_pairs" not in self.memo:
            per_sample = [self._kept_in(s) for s in range(self.samples)]
            self.memo["kept_pairs"] = sum(per_sample) * (self.geometry.batch if self.samples == 1 else 1)
        return int(self.memo["kept_pairs"])

    def _kept_in(self, sample: int) -> int:
        span = self.spans()[sample]
        starts, lane = self.row_starts()[sample], torch.arange(self.block_q)
        total = 0
        for row, head, flags, key in self._entry_blocks(sample):
            q_pos = starts[row, None] + lane
            low, flags = key[:, None], flags[:, None]
            high = torch.where(flags & CAUSAL > 0, (q_pos + 1).clamp(max=span.keys), span.keys)
            high = torch.minimum(high, low + self.block_kv)
            count = (high - low).clamp(min=0)
            if self.rule is not None:
                sink, window, dense_from = self._rule_of(sample, head.to(self.rule.device)).cpu()[..., None].unbind(0)
                near = torch.maximum(low, q_pos - window + 1)
                sinks = (torch.minimum(high, sink) - low).clamp(min=0)
                both = (torch.minimum(high, sink) - near).clamp(min=0)
                ruled = torch.where(q_pos >= dense_from, count, sinks + (high - near).clamp(min=0) - both)
                count = torch.where(flags & RULE > 0, ruled, count)
            total += int(count[(q_pos >= span.q_first) & (q_pos < span.q_end)].sum())
        if self.all_dense:
            return self.heads * span.causal_pairs
        for row in self._rows_of(self.dense_rows, sample).tolist():
            low_q = max(int(starts[row % self.rows]), span.q_first)
            high_q = min(int(starts[row % self.rows]) + self.block_q, span.q_end)
            total += max((high_q * (high_q + 1) - low_q * (low_q + 1)) // 2, 0)
        for _, _, _, kept in self._all_columns(sample, span):
            total += int(kept.sum())
        return total

    def _all_columns(self, sample: int, span: Span) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        if self.tokens is None:
            return
        plan, starts, lane = self.to("cpu"), self.row_starts()[sample], torch.arange(self.block_q)
        for head in range(self.heads):
            yield from self._column_pairs(plan, sample, head, starts, lane, span)

    def density(self) -> float:
        """Pairs kept / causal pairs, over the valid queries of all samples and heads."""
        causal = self.heads * sum(span.causal_pairs for span in self.geometry.spans)
        return self.kept_pairs() / causal if causal else 1.0

    def _causal_tiles(self, sample: int) -> Tensor:
        """int64 (R,): tiles of `block_kv` keys that dense attention visits in each row; 0 past a sample's last row."""
        span, starts = self.spans()[sample], self.row_starts()[sample]
        ends = (starts + self.block_q).clamp(max=span.q_end)
        alive = (ends > starts) & (ends > span.q_first)
        return torch.where(alive, -(-ends // self.block_kv), 0)

    def visited_tiles(self) -> float:
        """Tiles the kernel multiplies, over all samples and plan heads; `block_kv` single columns are one tile."""
        total = 0.0
        for s in range(self.samples):
            causal = self._causal_tiles(s).repeat(self.heads)
            if self.all_dense:
                total += int(causal.sum())
                continue
            assert self.row_ptr is not None
            rows = self.heads * self.rows
            total += int(self.row_ptr[(s + 1) * rows] - self.row_ptr[s * rows])
            total += int(causal[self._rows_of(self.dense_rows, s)].sum())
            if self.tokens is not None:
                bits = [self.columns_of(s, p, r).sum() for p in range(self.heads) for r in range(self.rows)]
                total += int(torch.stack(bits).sum()) / self.block_kv
        return total * (self.geometry.batch if self.samples == 1 else 1)

    def tile_density(self) -> float:
        """Visited tiles / tiles of dense causal attention."""
        tiles = sum(int(self._causal_tiles(s).sum()) for s in range(self.samples))
        causal = self.heads * tiles * (self.geometry.batch if self.samples == 1 else 1)
        return self.visited_tiles() / causal if causal else 1.0


# ---- builders


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
        order=_heaviest_first(counts),
    )


def stack_heads(plans: Sequence[BlockPlan], plan_of_head: Sequence[int]) -> BlockPlan:
    """One plan for a layer whose heads differ: query head h runs `plans[plan_of_head[h]]`.

    A plan whose head dimension is 1 serves every head given to it; one with as many heads as `plan_of_head` serves
    head h with its own head h. Single columns are kept.
    """
    geometry, heads = plans[0].geometry, len(plan_of_head)
    if any(plan.geometry != geometry for plan in plans):
        raise SparsekitError("plans of one layer must share their geometry and tile.")
    if any(plan.heads not in (1, heads) for plan in plans):
        raise SparsekitError(f"plans of one layer have 1 or {heads} heads, got {[plan.heads for plan in plans]}.")
    used = sorted(set(plan_of_head))
    if all(plans[i].all_dense for i in used):
        return dense_plan(geometry)
    if len(used) == 1 and plans[used[0]].heads in (1, heads):
        return plans[used[0]]
    samples = max(plan.samples for plan in plans)
    rows = geometry.rows
    device = next(t.device for i in used for t in plans[i].tensors.values())
    pieces = [_head_rows(plans[i], h, s, device) for s in range(samples) for h, i in enumerate(plan_of_head)]
    counts = torch.cat([piece[0] for piece in pieces])
    dense = torch.cat([piece[2] for piece in pieces])
    rule = torch.stack([piece[3] for piece in pieces]).view(samples, heads, 3)
    tokens, bits = _stack_columns([piece[4] for piece in pieces], rows, device)
    plan = BlockPlan(geometry, samples=samples, heads=heads)
    causal = torch.stack([plan._causal_tiles(s) for s in range(samples)]).to(device)
    work = torch.where(dense.view(samples, heads, rows), causal[:, None], counts.view(samples, heads, rows))
    return BlockPlan(
        geometry,
        samples=samples,
        heads=heads,
        row_ptr=_row_ptr(counts),
        entries=torch.cat([piece[1] for piece in pieces]),
        rule=rule,
        dense_rows=dense,
        tokens=None if tokens is None else tokens.view(samples, heads, -1),
        token_bits=bits,
        order=_heaviest_first(work),
        long_rows=max(plans[i].long_rows for i in used),
    )


_Columns = tuple[Tensor, Tensor] | None


def _head_rows(
    plan: BlockPlan, head: int, sample: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, _Columns]:
    """(counts, entries, dense?, rule, columns) of one head of one sample, whatever the plan shares."""
    rows = plan.rows
    p, s = (head if plan.heads > 1 else 0), (sample if plan.samples > 1 else 0)
    if plan.row_ptr is None or plan.entries is None:
        nothing = torch.zeros(rows, dtype=torch.int64, device=device)
        no_rule = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
        return nothing, nothing[:0].int(), torch.ones(rows, dtype=torch.bool, device=device), no_rule, None
    at = slice((s * plan.heads + p) * rows, (s * plan.heads + p + 1) * rows)
    ptr = plan.row_ptr[at.start : at.stop + 1]
    dense = torch.zeros(rows, dtype=torch.bool, device=device) if plan.dense_rows is None else plan.dense_rows[at]
    rule = torch.tensor([0, 2**31 - 1, 0], dtype=torch.int32, device=device)
    if plan.rule is not None:
        rule = plan.rule[min(s, plan.rule.shape[0] - 1), min(p, plan.rule.shape[1] - 1)]
    columns = None
    if plan.tokens is not None and plan.token_bits is not None:
        columns = (plan.tokens[s, p], plan.token_bits[at])
    return ptr.diff().long(), plan.entries[int(ptr[0]) : int(ptr[-1])], dense, rule, columns


def _stack_columns(columns: list[_Columns], rows: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    width = max((c[0].shape[0] for c in columns if c is not None), default=0)
    if not width:
        return None, None
    words = -(-width // 32)
    tokens = torch.full((len(columns), width), 2**31 - 1, dtype=torch.int32, device=device)
    bits = torch.zeros(len(columns), rows, words, dtype=torch.int32, device=device)
    for i, column in enumerate(columns):
        if column is not None:
            tokens[i, : column[0].shape[0]] = column[0]
            bits[i, :, : column[1].shape[1]] = column[1]
    return tokens, bits.view(-1, words)


def _row_ptr(counts: Tensor) -> Tensor:
    total = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # numel bounds the sum without reading it back from a GPU: a row lists at most 2^31 / rows tiles in practice.
    large = counts.device.type == "cpu" and int(total[-1]) >= 2**31
    return total if large else total.to(torch.int32)


def _heaviest_first(work: Tensor) -> Tensor:
    """int32 (S*R,): launch order from tiles per (sample, head, row)."""
    return torch.argsort(work.sum(1).flatten(), descending=True, stable=True).to(torch.int32)

"""BlockPlan: which query-key pairs are computed, as tensors. Every pattern ends in one, every kernel starts from one.

CSR over rows; a row is (plan sample, plan head, query tile). A plan sample or plan head dimension of 1 is shared by
all. All token numbers in a plan are POSITIONS (geometry.py): kernels add `kv_start[b]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.call.geometry import TILES, Geometry, Span
from sparsekit.errors import SparsekitError

__all__ = [
    "CAUSAL",
    "RULE",
    "BlockPlan",
    "Ranked",
    "TokenRule",
    "heaviest_first",
    "row_bounds",
    "segment_bounds",
    "upload",
]

CAUSAL = 1  # entry flag: apply the causal mask, and the valid key length
RULE = 2  # entry flag: apply the token rule
FLAG_BITS = 2
# Entries looked at in one go by counts and masks: 64K entries x 128 rows of int64 are 64 MiB.
ENTRIES_AT_ONCE = 1 << 16
# Entries, or bits of single columns, summed in one go: a dozen int64 of each are 100 MiB.
SUMMED_AT_ONCE = 1 << 20
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
class Ranked:
    """How a plan is walked in order of importance, and stopped early.

    Positions are cut into segments of `segment_tokens`. A query keeps its own segment up to itself, and the sink tile:
    the first `block_kv` keys, where they are of an earlier segment. Then come the segment's ranked keys, all of earlier
    segments, a tile of `block_kv` at a time, until `patience` tiles in a row have each added less than `stop_tau` of
    the softmax denominator, themselves included, to every query of the query tile. With 0 nothing stops.

    A sample has n segments, counted from its first query's, and a segment `T = ceil(segment_tokens / block_q)` query
    tiles, filled from the left: after a segment's last query in this call come places that hold -1.

    Attributes:
        segment_tokens: at least `block_kv`.
        q_index: int32 (S, P, n, T * block_q): the queries' positions, in the order in which tiles hold them.
        keys: int32 (S, P, L): ranked positions, segment after segment, the most important first; none of the sink tile.
        key_ptr: int64 (S, n + 1): where each segment's keys start, the same for all heads.
        stop_tau, patience: the stopping rule.
        visited: int32 (S, P, n, T): ranked tiles that each query tile visited, which an execution fills in. -1 until
            then: all of them, the upper bound.
    """

    segment_tokens: int
    q_index: Tensor
    keys: Tensor
    key_ptr: Tensor
    stop_tau: float
    patience: int
    visited: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"q_index": self.q_index, "keys": self.keys, "key_ptr": self.key_ptr, "visited": self.visited}

    def to(self, device: torch.device | str) -> Ranked:
        q_index, keys, key_ptr, visited = (upload(t, device) for t in self.tensors.values())
        return replace(self, q_index=q_index, keys=keys, key_ptr=key_ptr, visited=visited)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one attention call computes.

    With S plan samples (1 or the batch), P plan heads (1, the key heads, or the query heads) and R query tiles of
    `geometry.block_q` tokens, row `(s * P + p) * R + r` is the r-th query tile of sample s. Tiles lie on the grid that
    starts at position 0, so the first one may begin before this call's first query.

    A row is LISTED, its tiles being `entries[row_ptr[row]:row_ptr[row + 1]]`, or DENSE by bounds (`dense_rows`): all
    causal keys, no entries. A plan without `row_ptr` is dense everywhere and holds no tensor at all, unless it is
    RANKED: then `ranked` says all that it computes, and what it keeps is known only after it was executed.

    Attributes:
        row_ptr: int32 (int64 past 2^31 entries), (S*P*R + 1,).
        entries: int32 (nnz,), `position of the tile's first key * 4 + flags`. Flag CAUSAL: apply the causal and valid
            length mask; RULE: apply the token rule; 0: every pair of the tile is kept. A tile starts on any key; a
            row's tiles ascend, and no pair is in two of them. Room after the last row's holds anything.
        rule: int32 (S, P, 3), either may be 1: sink, window, dense_from of tiles flagged RULE.
        dense_rows: bool (S*P*R,).
        tokens: int32 (S, P, T), ascending: single key columns. Unused places at the end hold the largest int32.
        token_bits: int32 (S*P*R, ceil(T / 32)): bit t % 32 of word t // 32 says that the row still needs column t, that
            is, no tile of the row holds it. Causality holds for columns.
        order: int32 (S*R,): launch order of (sample, tile) = s * R + r, heaviest first, the heads of a row together.
        long_rows: host count of rows, the first of `order`, that visit more than `LONG` times the mean: on few heads
            they alone decide the finish, so kernels may cut them over keys. 0 where not known.
        ranked: keys in order of importance with an early stop, in place of rows; one plan sample a sample.
        workspace: int32 (n,), whatever it holds: room in which an execution may list this plan's entries its own way,
            so that attention allocates none. Counted in `nbytes`, and left behind by `to`.
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
    ranked: Ranked | None = None
    workspace: Tensor | None = field(default=None, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def block_q(self) -> int:
        return self.geometry.block_q

    @property
    def block_kv(self) -> int:
        return self.geometry.block_kv

    @property
    def all_dense(self) -> bool:
        return self.row_ptr is None and self.ranked is None

    @property
    def rows(self) -> int:
        """Query tiles a plan sample and head has."""
        return self.geometry.rows

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = ("row_ptr", "entries", "rule", "dense_rows", "tokens", "token_bits", "order")
        tensors = {name: value for name in named if (value := getattr(self, name)) is not None}
        if self.ranked is not None:
            tensors |= {f"ranked.{name}": value for name, value in self.ranked.tensors.items()}
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's own tensors; a dense plan has none."""
        room = 0 if self.workspace is None else self.workspace.nbytes
        return room + sum(t.nbytes for t in self.tensors.values())

    def to(self, device: torch.device | str) -> BlockPlan:
        rows = replace(self, ranked=None)
        moved: dict[str, Any] = {name: upload(t, device) for name, t in rows.tensors.items()}
        ranked = None if self.ranked is None else self.ranked.to(device)
        return BlockPlan(self.geometry, self.samples, self.heads, long_rows=self.long_rows, ranked=ranked, **moved)

    def with_block_kv(self, block_kv: int) -> BlockPlan:
        """The same pairs in tiles of fewer keys. Kept with this plan; the host does not wait.

        Each tile becomes `self.block_kv / block_kv`, with its flags: one that ends up in its row's future is masked.

        Raises:
            SparsekitError: `block_kv` is no tile, or does not divide this plan's; or the plan is ranked.
        """
        if block_kv == self.block_kv:
            return self
        if self.ranked is not None:
            raise SparsekitError(f"block_kv={block_kv}: a ranked plan stops by tiles of its own {self.block_kv} keys.")
        if block_kv not in TILES or self.block_kv % block_kv:
            raise SparsekitError(f"block_kv={block_kv}: want a tile that divides this plan's {self.block_kv} keys.")
        key = ("block_kv", block_kv)
        if key not in self.memo:
            finer: dict[str, Any] = {}
            if self.row_ptr is not None and self.entries is not None:
                parts, step = self.block_kv // block_kv, block_kv << FLAG_BITS
                places = torch.arange(0, parts * step, step, dtype=torch.int32, device=self.entries.device)
                finer["entries"] = (self.entries[:, None] + places).flatten()
                large = finer["entries"].numel() >= 2**31
                finer["row_ptr"] = (self.row_ptr.long() if large else self.row_ptr) * parts
            geometry = self.geometry.with_tile(self.block_q, block_kv)
            self.memo[key] = replace(self, geometry=geometry, workspace=None, memo={}, **finer)
        finer_plan: BlockPlan = self.memo[key]
        return finer_plan

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
        if plan.ranked is not None:
            yield from self._ranked_pairs(plan.ranked, sample)
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

    def _ranked_pairs(self, ranked: Ranked, sample: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        firsts = segment_bounds(self.geometry, self.samples, ranked.segment_tokens, torch.device("cpu"))[0][sample]
        ptr = ranked.key_ptr[sample].tolist()
        for head, at, tile in product(*map(range, ranked.visited.shape[1:])):
            q_pos = ranked.q_index[sample, head, at].long()[tile * self.block_q : (tile + 1) * self.block_q, None]
            q_pos, first = q_pos[q_pos[:, 0] >= 0], int(firsts[at])
            own = torch.arange(first, first + ranked.segment_tokens)[None]
            yield torch.tensor([[head]]), q_pos, own, own <= q_pos
            seen = int(ranked.visited[sample, head, at, tile])
            listed = ptr[at + 1] - ptr[at]
            stop = ptr[at] + (listed if seen < 0 else min(seen * self.block_kv, listed))
            earlier = torch.cat(
                [torch.arange(min(self.block_kv, first)), ranked.keys[sample, head, ptr[at] : stop].long()]
            )
            yield torch.tensor([[head]]), q_pos, earlier[None], (earlier < first) & (q_pos >= 0)

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

    def sums(self) -> Tensor:
        """int64 (3,): pairs, tiles and single columns computed, over all plan samples and heads.

        On the plan's device, by arithmetic on entries and bits; kept with the plan, and the host does not wait. Of a
        ranked plan: what the last execution visited; before the first, all that it may visit.
        """
        if self.ranked is not None:
            return self._ranked_sums(self.ranked)
        if "sums" not in self.memo:
            self.memo["sums"] = self._dense_sums() if self.row_ptr is None else self._listed_sums(self.row_ptr)
        sums: Tensor = self.memo["sums"]
        return sums

    def _dense_sums(self) -> Tensor:
        pairs = sum(span.causal_pairs for span in self.spans())
        tiles = sum(int(self._causal_tiles(s).sum()) for s in range(self.samples))
        return torch.tensor([self.heads * pairs, self.heads * tiles, 0])

    def _ranked_sums(self, ranked: Ranked) -> Tensor:
        bounds = segment_bounds(self.geometry, self.samples, ranked.segment_tokens, ranked.visited.device)
        first, low, high = (x[:, None, :, None] for x in bounds)  # (S, 1, n, 1), as below (S, P, n, T)
        lane = torch.arange(ranked.visited.shape[-1], device=first.device) * self.block_q
        queries = (high - low - lane).clamp(0, self.block_q)
        listed = ranked.key_ptr.diff()[:, None, :, None]
        tiles = torch.where(ranked.visited < 0, -(-listed // self.block_kv), ranked.visited)
        keys = torch.minimum(tiles * self.block_kv, listed) + first.clamp(max=self.block_kv)
        own = self.heads * (_triangle(high - first) - _triangle(low - first)).sum()
        last = ranked.q_index.unflatten(-1, (-1, self.block_q)).amax(-1)
        own_tiles = torch.where(queries > 0, (last - first) // self.block_kv + 1, 0).sum()
        visited = ((queries > 0) * (tiles + (first > 0))).sum() + own_tiles
        return torch.stack([own + (queries * keys).sum(), visited, torch.zeros_like(visited)])

    def _listed_sums(self, row_ptr: Tensor) -> Tensor:
        bounds = row_bounds(self.geometry, self.samples, row_ptr.device)
        first, last, tiles, keys = (x[:, None].expand(-1, self.heads, -1).flatten() for x in bounds)
        pairs = columns = row_ptr.new_zeros((), dtype=torch.int64)
        visited = row_ptr[-1].long()
        if self.dense_rows is not None:
            visited = visited + (tiles * self.dense_rows).sum()
            pairs = pairs + ((_triangle(last) - _triangle(first)) * self.dense_rows).sum()
        for at in range(0, self.entries.numel() if self.entries is not None and len(first) else 0, SUMMED_AT_ONCE):
            pairs = pairs + self._kept_from(row_ptr, at, first, last, keys).sum()
        if self.tokens is not None and self.token_bits is not None:
            at_once = max(SUMMED_AT_ONCE // self.tokens.shape[-1], 1)
            of_head = self.tokens.long().flatten(0, 1)
            lanes = torch.arange(32, dtype=torch.int32, device=row_ptr.device)
            for rows in torch.arange(len(first), device=row_ptr.device).split(at_once):
                bits = (self.token_bits[rows][..., None] >> lanes & 1).flatten(1)[:, : self.tokens.shape[-1]]
                seeing = last[rows, None] - torch.maximum(first[rows, None], of_head[rows // self.rows])
                pairs, columns = pairs + (bits * seeing.clamp(min=0)).sum(), columns + bits.sum()
        return torch.stack([pairs, visited, columns])

    def _kept_from(self, row_ptr: Tensor, at: int, first: Tensor, last: Tensor, keys: Tensor) -> Tensor:
        """int64 (n,): pairs kept by the next entries from `at` on; 0 for places that no row uses.

        A query q sees `clamp(q + 1 - key, 0, width)` of the `width` keys from `key` on, and the rule takes from it what
        lies `window` back but for the sinks: sums of clamped runs, in closed form.
        """
        assert self.entries is not None
        entry = self.entries[at : at + SUMMED_AT_ONCE].long()
        place = torch.arange(at, at + len(entry), dtype=row_ptr.dtype, device=entry.device)
        row = (torch.searchsorted(row_ptr, place, right=True) - 1).clamp(max=len(first) - 1)
        key, flags, low, high = entry >> FLAG_BITS, entry & 3, first[row], last[row]
        whole = (high - low) * (keys[row] - key).clamp(0, self.block_kv)
        causal = _clamped_run(low - key, high - key, self.block_kv)
        kept = torch.where(flags & CAUSAL > 0, causal, whole)
        if self.rule is not None:
            rules = self.rule.long().expand(self.samples, self.heads, 3).flatten(0, 1)
            sink, window, dense_from = rules[row // self.rows].unbind(-1)
            cut = torch.minimum(dense_from.clamp(min=0).maximum(low), high)
            far = low - key - window, cut - key - window
            sinks = (sink - key).clamp(0, self.block_kv)
            ruled = causal - _clamped_run(*far, self.block_kv) + _clamped_run(*far, sinks)
            kept = torch.where(flags & RULE > 0, ruled, kept)
        return kept * (place < row_ptr[-1])

    def totals(self) -> PlanTotals:
        """What is computed in all, without the plan's own tensors; the host does not wait until a number is read."""
        repeats = self.geometry.batch if self.samples == 1 else 1
        pairs = self.heads * sum(span.causal_pairs for span in self.geometry.spans)
        tiles = self.heads * repeats * sum(int(self._causal_tiles(s).sum()) for s in range(self.samples))
        return PlanTotals(self.sums(), repeats, self.block_kv, pairs, tiles, self.nbytes)

    def kept_pairs(self) -> int:
        """Query-key pairs computed, over all samples and plan heads. Counted by arithmetic, nothing quadratic."""
        return self.totals().kept_pairs()

    def visited_tiles(self) -> float:
        """Tiles the kernel multiplies, over all samples and plan heads; `block_kv` single columns are one tile."""
        return self.totals().visited_tiles()

    def density(self) -> float:
        """Pairs kept / causal pairs, over the valid queries of all samples and heads."""
        return self.totals().density()

    def tile_density(self) -> float:
        """Visited tiles / tiles of dense causal attention."""
        return self.totals().tile_density()

    def _causal_tiles(self, sample: int) -> Tensor:
        """int64 (R,): tiles of `block_kv` keys that dense attention visits in each row; 0 past a sample's last row."""
        span, starts = self.spans()[sample], self.row_starts()[sample]
        ends = (starts + self.block_q).clamp(max=span.q_end)
        alive = (ends > starts) & (ends > span.q_first)
        return torch.where(alive, -(-ends // self.block_kv), 0)


@dataclass(frozen=True, eq=False)
class PlanTotals:
    """A plan's totals, when it is gone itself. Reading a number waits for the device.

    Attributes:
        sums: `BlockPlan.sums()`.
        repeats: samples that share each plan sample.
        causal_pairs, causal_tiles: of dense attention, over all samples and plan heads.
        nbytes: of the plan's tensors.
    """

    sums: Tensor
    repeats: int
    block_kv: int
    causal_pairs: int
    causal_tiles: int
    nbytes: int

    def kept_pairs(self) -> int:
        return int(self.sums[0]) * self.repeats

    def visited_tiles(self) -> float:
        _, tiles, columns = self.sums.tolist()
        return float((tiles + columns / self.block_kv) * self.repeats)

    def density(self) -> float:
        return self.kept_pairs() / self.causal_pairs if self.causal_pairs else 1.0

    def tile_density(self) -> float:
        return self.visited_tiles() / self.causal_tiles if self.causal_tiles else 1.0


@lru_cache(maxsize=64)
def row_bounds(geometry: Geometry, samples: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64 (S, R) each: a row's first query, one past its last, the tiles and the keys that dense attention visits."""
    plan = BlockPlan(geometry, samples=samples)
    first = torch.tensor([[span.q_first] for span in plan.spans()])
    end = torch.tensor([[span.q_end] for span in plan.spans()])
    keys = torch.tensor([[span.keys] for span in plan.spans()]).expand(samples, geometry.rows)
    start = plan.row_starts()
    low = torch.maximum(start, first)
    high = torch.minimum(start + geometry.block_q, end).maximum(low)
    tiles = torch.stack([plan._causal_tiles(s) for s in range(samples)])
    return tuple(upload(x, device) for x in (low, high, tiles, keys))  # type: ignore[return-value]


@lru_cache(maxsize=64)
def segment_bounds(
    geometry: Geometry, samples: int, segment_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 (S, n) each: a segment's first position, its first query in this call, one past the last (equal: none)."""
    spans = BlockPlan(geometry, samples=samples).spans()
    begins = torch.tensor([span.q_first // segment_tokens for span in spans])[:, None]
    ends = torch.tensor([-(-span.q_end // segment_tokens) for span in spans])[:, None]
    first = (begins + torch.arange(max(int((ends - begins).max()), 1))) * segment_tokens
    low = torch.maximum(first, torch.tensor([[span.q_first] for span in spans]))
    high = torch.minimum(first + segment_tokens, torch.tensor([[span.q_end] for span in spans])).maximum(low)
    return upload(first, device), upload(low, device), upload(high, device)


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`. From the CPU to a card from pinned memory, since a pageable copy makes the host wait."""
    if values.device.type != "cpu" or torch.device(device).type != "cuda":
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)


def _triangle(n: Tensor) -> Tensor:
    return n * (n + 1) // 2


def _clamped_run(low: Tensor, high: Tensor, width: Tensor | int) -> Tensor:
    """sum over low < y <= high of clamp(y, 0, width)."""

    def up_to(y: Tensor) -> Tensor:
        y = y.clamp(min=0)
        within = y.clamp(max=width) if isinstance(width, int) else torch.minimum(y, width)
        return _triangle(within) + (y - within) * width

    return up_to(high) - up_to(low)


def _row_ptr(counts: Tensor) -> Tensor:
    total = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # numel bounds the sum without reading it back from a GPU: a row lists at most 2^31 / rows tiles in practice.
    large = counts.device.type == "cpu" and int(total[-1]) >= 2**31
    return total if large else total.to(torch.int32)


def heaviest_first(work: Tensor) -> Tensor:
    """int32 (S*R,): launch order from tiles per (sample, head, row)."""
    return torch.argsort(work.sum(1).flatten(), descending=True, stable=True).to(torch.int32)

"""How much a plan computes: pairs, tiles and single columns, by arithmetic on entries and bits; nothing quadratic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry, Span
from sparsekit.plan.bounds import causal_tiles, row_bounds, segment_bounds
from sparsekit.plan.entries import CAUSAL, RULE, unpack
from sparsekit.plan.rows import PlanRows, Ranked

__all__ = ["PlanTotals", "causal_totals", "plan_sums", "totals_of"]

# Entries, or bits of single columns, summed in one go: a dozen int64 of each are 100 MiB.
SUMMED_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class PlanTotals:
    """A plan's totals, when it is gone itself. Reading a number waits for the device.

    Attributes:
        sums: `BlockPlan.sums()`.
        anchors: pairs and tiles of the rows by which the others are corrected, over all samples and plan heads.
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
    anchors: tuple[int, int] = (0, 0)

    def kept_pairs(self) -> int:
        return int(self.sums[0]) * self.repeats + self.anchors[0]

    def visited_tiles(self) -> float:
        _, tiles, columns = self.sums.tolist()
        return float((tiles + columns / self.block_kv) * self.repeats) + self.anchors[1]

    def keeps_all(self) -> bool:
        """Whether every causal pair is kept, before any correction."""
        return int(self.sums[0]) * self.repeats == self.causal_pairs

    def density(self) -> float:
        return self.kept_pairs() / self.causal_pairs if self.causal_pairs else 1.0

    def tile_density(self) -> float:
        return self.visited_tiles() / self.causal_tiles if self.causal_tiles else 1.0


def totals_of(plan: PlanRows, sums: Tensor) -> PlanTotals:
    """A plan's totals without its tensors; the host does not wait."""
    g = plan.geometry
    repeats, anchors = g.batch if plan.samples == 1 else 1, (0, 0)
    if plan.correct_every:
        anchors = causal_totals(replace(g, q_step=plan.correct_every), plan.heads)
    pairs, tiles = causal_totals(g, plan.heads)
    return PlanTotals(sums, repeats, plan.block_kv, pairs, tiles, plan.nbytes, anchors)


def causal_totals(g: Geometry, heads: int) -> tuple[int, int]:
    """Pairs and tiles of dense attention, of all samples and `heads` heads; of the anchors alone with a `q_step`."""
    samples = 1 if g.uniform else g.batch
    tiles = int(causal_tiles(g, samples).sum()) * (g.batch // samples)
    return heads * sum(_causal_pairs(g, span) for span in g.spans), heads * tiles


def _causal_pairs(g: Geometry, span: Span) -> int:
    return span.causal_pairs if g.q_step == 1 else span.anchor_pairs(g.q_step)


def plan_sums(plan: PlanRows) -> Tensor:
    """int64 (3,): pairs, tiles and single columns computed, over all plan samples and heads, on the plan's device."""
    if plan.ranked is not None:
        return _ranked_sums(plan, plan.ranked)
    return _dense_sums(plan) if plan.row_ptr is None else _listed_sums(plan, plan.row_ptr)


def _dense_sums(plan: PlanRows) -> Tensor:
    pairs = sum(_causal_pairs(plan.geometry, span) for span in plan.spans())
    tiles = int(causal_tiles(plan.geometry, plan.samples).sum())
    return torch.tensor([plan.heads * pairs, plan.heads * tiles, 0], dtype=torch.int64, device="cpu")


def _ranked_sums(plan: PlanRows, ranked: Ranked) -> Tensor:
    bounds = segment_bounds(plan.geometry, plan.samples, ranked.segment_tokens, ranked.keys.device)
    first, low, high = (x[:, None, :, None] for x in bounds)  # (S, 1, n, 1), as below (S, P, n, T)
    lane = torch.arange(ranked.q_index.shape[-1] // plan.block_q, device=first.device) * plan.block_q
    queries = (high - low - lane).clamp(0, plan.block_q)
    listed = ranked.key_ptr.diff()[:, None, :, None]
    tiles = -(-listed // plan.block_kv) if plan.visited is None else plan.visited
    tiles = tiles.expand(-1, plan.heads, -1, len(lane))
    keys = torch.minimum(tiles * plan.block_kv, listed) + first.clamp(max=plan.block_kv)
    own = plan.heads * (_triangle(high - first) - _triangle(low - first)).sum()
    last = ranked.q_index.unflatten(-1, (-1, plan.block_q)).amax(-1)
    own_tiles = torch.where(queries > 0, (last - first) // plan.block_kv + 1, 0).sum()
    visited = ((queries > 0) * (tiles + (first > 0))).sum() + own_tiles
    return torch.stack([own + (queries * keys).sum(), visited, torch.zeros_like(visited)])


def _listed_sums(plan: PlanRows, row_ptr: Tensor) -> Tensor:
    bounds = row_bounds(plan.geometry, plan.samples, row_ptr.device)
    first, last, tiles, keys = (x[:, None].expand(-1, plan.heads, -1).flatten() for x in bounds)
    pairs = columns = row_ptr.new_zeros((), dtype=torch.int64)
    visited = row_ptr[-1].long()
    if plan.dense_rows is not None:
        visited = visited + (tiles * plan.dense_rows).sum()
        pairs = pairs + ((_triangle(last) - _triangle(first)) * plan.dense_rows).sum()
    for at in range(0, plan.entries.numel() if plan.entries is not None and len(first) else 0, SUMMED_AT_ONCE):
        pairs = pairs + _kept_from(plan, row_ptr, at, first, last, keys).sum()
    if plan.tokens is not None and plan.token_bits is not None:
        at_once = max(SUMMED_AT_ONCE // plan.tokens.shape[-1], 1)
        of_head = plan.tokens.long().flatten(0, 1)
        lanes = torch.arange(32, dtype=torch.int32, device=row_ptr.device)
        for rows in torch.arange(len(first), device=row_ptr.device).split(at_once):
            bits = (plan.token_bits[rows][..., None] >> lanes & 1).flatten(1)[:, : plan.tokens.shape[-1]]
            seeing = last[rows, None] - torch.maximum(first[rows, None], of_head[rows // plan.rows])
            pairs, columns = pairs + (bits * seeing.clamp(min=0)).sum(), columns + bits.sum()
    return torch.stack([pairs, visited, columns])


def _kept_from(plan: PlanRows, row_ptr: Tensor, at: int, first: Tensor, last: Tensor, keys: Tensor) -> Tensor:
    """int64 (n,): pairs kept by the next entries from `at` on; 0 for places that no row uses.

    A query q sees `clamp(q + 1 - key, 0, width)` of the `width` keys from `key` on, and the rule takes from it what
    lies `window` back but for the sinks: sums of clamped runs, in closed form.
    """
    assert plan.entries is not None
    entry = plan.entries[at : at + SUMMED_AT_ONCE].long()
    place = torch.arange(at, at + len(entry), dtype=row_ptr.dtype, device=entry.device)
    row = (torch.searchsorted(row_ptr, place, right=True) - 1).clamp(max=len(first) - 1)
    (key, flags), low, high = unpack(entry), first[row], last[row]
    whole = (high - low) * (keys[row] - key).clamp(0, plan.block_kv)
    causal = _clamped_run(low - key, high - key, plan.block_kv)
    kept = torch.where(flags & CAUSAL > 0, causal, whole)
    if plan.rule is not None:
        rules = plan.rule.long().expand(plan.samples, plan.heads, 3).flatten(0, 1)
        sink, window, dense_from = rules[row // plan.rows].unbind(-1)
        cut = torch.minimum(dense_from.clamp(min=0).maximum(low), high)
        far = low - key - window, cut - key - window
        sinks = (sink - key).clamp(0, plan.block_kv)
        ruled = causal - _clamped_run(*far, plan.block_kv) + _clamped_run(*far, sinks)
        kept = torch.where(flags & RULE > 0, ruled, kept)
    return kept * (place < row_ptr[-1])


def _triangle(n: Tensor) -> Tensor:
    return n * (n + 1) // 2


def _clamped_run(low: Tensor, high: Tensor, width: Tensor | int) -> Tensor:
    """sum over low < y <= high of clamp(y, 0, width)."""

    def up_to(y: Tensor) -> Tensor:
        y = y.clamp(min=0)
        within = y.clamp(max=width) if isinstance(width, int) else torch.minimum(y, width)
        return _triangle(within) + (y - within) * width

    return up_to(high) - up_to(low)

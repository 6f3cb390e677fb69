"""BlockPlan: which query-key pairs are computed. Every pattern ends in one, every kernel starts from one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import TILES, Geometry
from sparsekit.errors import SparsekitError
from sparsekit.plan.entries import FLAG_BITS
from sparsekit.plan.mask import dense_queries, multiplicity
from sparsekit.plan.memo import CORRECTED, FINER, SUMS
from sparsekit.plan.rows import PlanRows
from sparsekit.plan.totals import PlanTotals, plan_sums, totals_of

__all__ = ["BlockPlan", "heaviest_first", "pointers"]


@dataclass(frozen=True, eq=False)
class BlockPlan(PlanRows):
    """What one attention call computes: the rows of `PlanRows`, the pairs that they mean, and how many these are."""

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
        key = (FINER, block_kv)
        finer_plan: BlockPlan | None = self.memo.get(key)
        if finer_plan is None:
            finer: dict[str, Any] = {}
            if self.row_ptr is not None and self.entries is not None:
                parts, step = self.block_kv // block_kv, block_kv << FLAG_BITS
                places = torch.arange(0, parts * step, step, dtype=torch.int32, device=self.entries.device)
                finer["entries"] = (self.entries[:, None] + places).flatten()
                large = finer["entries"].numel() >= 2**31
                finer["row_ptr"] = (self.row_ptr.long() if large else self.row_ptr) * parts
            geometry = self.geometry.with_tile(self.block_q, block_kv)
            finer_plan = self.memo.keep(key, replace(self, geometry=geometry, **finer))
        return finer_plan

    def corrected(self, every: int | None) -> BlockPlan:
        """The same pairs, whose outputs are corrected by every n-th row, n = `every`; kept with this plan.

        Itself where `every` is None, and where all rows are dense, since they lack nothing. 0: not corrected.
        """
        if every is None or every == self.correct_every or self.all_dense:
            return self
        key = (CORRECTED, every)
        plan: BlockPlan | None = self.memo.get(key)
        if plan is None:
            plan = self.memo[key] = replace(self, correct_every=every)
        return plan

    @property
    def anchors(self) -> BlockPlan | None:
        """The dense plan of the rows by which the others are corrected; None where nothing is."""
        return _anchors(self.geometry, self.samples, self.correct_every) if self.correct_every else None

    def dense_queries(self, sample: int) -> Tensor | None:
        """bool (P, q_end - q_first): the queries of a plan sample that keep every key, as far as the plan says."""
        return dense_queries(self, sample)

    def to_mask(self) -> Tensor:
        """bool (B, P, Q, K): the pairs that are computed. Quadratic: for tests, pictures and the reference."""
        return self.multiplicity() > 0

    def multiplicity(self) -> Tensor:
        """int32 (B, P, Q, K): how often each pair is computed. Anything above 1 is a broken plan."""
        return multiplicity(self)

    def sums(self) -> Tensor:
        """int64 (3,): pairs, tiles and single columns computed, over all plan samples and heads.

        On the plan's device, by arithmetic on entries and bits; kept with the plan, and the host does not wait. Of a
        ranked plan: what the last execution visited; before the first, all that it may visit.
        """
        if self.ranked is not None:
            return plan_sums(self)
        sums: Tensor | None = self.memo.get(SUMS)
        if sums is None:
            sums = self.memo[SUMS] = plan_sums(self)
        return sums

    def totals(self) -> PlanTotals:
        """What is computed in all, without the plan's own tensors; the host does not wait until a number is read."""
        return totals_of(self, self.sums())

    def kept_pairs(self) -> int:
        """Query-key pairs computed, over all samples and plan heads, anchors included. Counted by arithmetic, nothing
        quadratic."""
        return self.totals().kept_pairs()

    def visited_tiles(self) -> float:
        """Tiles the kernel multiplies, over all samples and plan heads; `block_kv` single columns are one tile."""
        return self.totals().visited_tiles()

    def density(self) -> float:
        """Pairs computed / causal pairs, over the valid queries of all samples and heads."""
        return self.totals().density()

    def tile_density(self) -> float:
        """Visited tiles / tiles of dense causal attention."""
        return self.totals().tile_density()


@per_geometry
def _anchors(geometry: Geometry, samples: int, every: int) -> BlockPlan:
    """One for all layers: those of a dynamic pattern have a plan each, and this one keeps its launches."""
    return BlockPlan(geometry.anchors(every), samples=samples, on_grid=True)


def pointers(counts: Tensor) -> Tensor:
    """Where each row's entries start, (rows + 1,), from how many each has: int32, or int64 past 2^31 entries."""
    total = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=total[1:])
    # numel bounds the sum without reading it back from a GPU: a row lists at most 2^31 / rows tiles in practice.
    large = counts.device.type == "cpu" and int(total[-1]) >= 2**31
    return total if large else total.to(torch.int32)


def heaviest_first(work: Tensor) -> Tensor:
    """int32 (S*R,): launch order from tiles per (sample, head, row)."""
    return torch.argsort(work.sum(1).flatten(), descending=True, stable=True).to(torch.int32)

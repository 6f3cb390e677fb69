"""The tensors of a plan: rows of query tiles, the key tiles and columns that each visits, and ranked keys.

CSR over rows; a row is (plan sample, plan head, query tile). A plan sample or plan head dimension of 1 is shared by
all. All token numbers in a plan are POSITIONS (geometry.py): kernels add `kv_start[b]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsekit.call.caches import Memo
from sparsekit.call.geometry import Geometry, Span
from sparsekit.errors import SparsekitError
from sparsekit.plan.bounds import row_starts, upload
from sparsekit.plan.entries import unpack
from sparsekit.plan.memo import VISITED
from sparsekit.plan.rule import TokenRule

__all__ = ["PlanRows", "Ranked", "nothing_visited"]

# Entries looked at in one go by counts and masks: 64K entries x 128 rows of int64 are 64 MiB.
ENTRIES_AT_ONCE = 1 << 16

Plan = TypeVar("Plan", bound="PlanRows")


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
    """

    segment_tokens: int
    q_index: Tensor
    keys: Tensor
    key_ptr: Tensor
    stop_tau: float
    patience: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"q_index": self.q_index, "keys": self.keys, "key_ptr": self.key_ptr}

    def to(self, device: torch.device | str) -> Ranked:
        moved: dict[str, Any] = {name: upload(t, device) for name, t in self.tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class PlanRows:
    """What one attention call computes, as data; `BlockPlan` says what it means.

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
        on_grid: whether the host knows that each tile starts at a multiple of `block_kv`.
        ranked: keys in order of importance with an early stop, in place of rows; one plan sample a sample.
        correct_every: above 0: outputs are corrected by dense attention's for every n-th query, n this number
            (`BlockPlan.anchors`). A property of the result: the pairs above are those before the correction. 0 where
            all is dense, whatever is said: such rows lack nothing.
        memo: what executions derived from this plan and learnt of it, by the names in memo.py. Nothing above changes.

    Raises:
        SparsekitError: a tensor whose shape or type is not the one above. What they hold is checked where plans are
            made (`plan_from_rule`, `plan_from_block_mask`, static patterns) and by `sparsekit.testing.check_pattern`.
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
    on_grid: bool = False
    ranked: Ranked | None = None
    correct_every: int = 0
    memo: Memo = field(default_factory=Memo, init=False, repr=False)

    def __post_init__(self) -> None:
        g, samples, heads = self.geometry, self.samples, self.heads
        rows = samples * g.rows
        if samples != g.batch and (samples != 1 or not g.uniform):
            raise SparsekitError(f"plan of {samples} samples: want {g.batch}, the batch, or 1 if all are alike.")
        if self.all_dense:
            object.__setattr__(self, "correct_every", 0)
        elif g.q_step > 1:
            raise SparsekitError(f"plan of every {g.q_step}th query: only a dense one can be, without any tensor.")
        if (self.row_ptr is None) != (self.entries is None) or (self.tokens is None) != (self.token_bits is None):
            raise SparsekitError("plan: row_ptr comes with entries, and tokens with token_bits.")
        if self.row_ptr is None:
            if not (self.rule is None and self.dense_rows is None and self.tokens is None and self.order is None):
                raise SparsekitError("plan: rule, dense_rows, tokens and order need row_ptr and entries.")
            return
        if self.ranked is not None:
            raise SparsekitError("plan: ranked stands in place of row_ptr and entries.")
        per_row = rows * heads
        _fits("row_ptr", self.row_ptr, (per_row + 1,), torch.int32, torch.int64)
        _fits("entries", self.entries, (-1,), torch.int32)
        _fits("dense_rows", self.dense_rows, (per_row,), torch.bool)
        _fits("order", self.order, (rows,), torch.int32)
        if self.rule is not None:
            alike = self.rule.shape[:1] == (1,), self.rule.shape[1:2] == (1,)
            _fits("rule", self.rule, (1 if alike[0] else samples, 1 if alike[1] else heads, 3), torch.int32)
        if self.tokens is not None:
            _fits("tokens", self.tokens, (samples, heads, -1), torch.int32)
            _fits("token_bits", self.token_bits, (per_row, -(-self.tokens.shape[2] // 32)), torch.int32)

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
    def _row_tensors(self) -> dict[str, Tensor]:
        named = ("row_ptr", "entries", "rule", "dense_rows", "tokens", "token_bits", "order")
        return {name: value for name in named if (value := getattr(self, name)) is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        tensors = self._row_tensors
        if self.ranked is not None:
            tensors |= {f"ranked.{name}": value for name, value in self.ranked.tensors.items()}
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's own tensors; a dense plan has none."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def visited(self) -> Tensor | None:
        """int32 (S, P, n, T): the ranked tiles that each query tile visited when the plan was last executed."""
        visited: Tensor | None = self.memo.get(VISITED)
        return visited

    def to(self: Plan, device: torch.device | str) -> Plan:
        moved: dict[str, Any] = {name: upload(t, device) for name, t in self._row_tensors.items()}
        ranked = None if self.ranked is None else self.ranked.to(device)
        names = ("long_rows", "on_grid", "correct_every")
        known: dict[str, Any] = {name: getattr(self, name) for name in names}
        plan = type(self)(self.geometry, self.samples, self.heads, ranked=ranked, **known, **moved)
        if self.visited is not None:
            plan.memo[VISITED] = upload(self.visited, device)
        return plan

    def spans(self) -> tuple[Span, ...]:
        """The span of each plan sample."""
        return self.geometry.spans[: self.samples]

    def row_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 (S, R): position at which each query tile starts."""
        return row_starts(self.geometry, self.samples, device)

    def columns_of(self, sample: int, head: int, row: int) -> Tensor:
        """bool (T,): the single columns that a row still needs."""
        assert self.tokens is not None and self.token_bits is not None
        words = self.token_bits[(sample * self.heads + head) * self.rows + row]
        bits = (words[:, None] >> torch.arange(32, device=words.device)) & 1
        return bits.flatten()[: self.tokens.shape[-1]].bool()

    def rows_of(self, flags: Tensor | None, sample: int) -> Tensor:
        """Rows of one plan sample (head * R + r) whose flag is set."""
        if flags is None:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        return flags.view(self.samples, -1)[sample].nonzero().flatten().cpu()

    def rule_of(self, sample: int, head: Tensor) -> TokenRule:
        """The rule of plan heads `head`, int64 like them."""
        assert self.rule is not None
        rule = self.rule[sample if self.rule.shape[0] > 1 else 0].long()
        return TokenRule(*rule[head if rule.shape[0] > 1 else torch.zeros_like(head)].unbind(-1))

    def entry_blocks(self, sample: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(row in 0..R, head, flags, first key position) of one plan sample's entries, each int64 (n,)."""
        if self.row_ptr is None or self.entries is None:
            return
        per_sample = self.heads * self.rows
        ptr = self.row_ptr[sample * per_sample : (sample + 1) * per_sample + 1].long().cpu()
        owner = torch.repeat_interleave(torch.arange(per_sample, device="cpu"), ptr.diff())
        first = int(ptr[0])
        for at in range(0, len(owner), ENTRIES_AT_ONCE):
            part = owner[at : at + ENTRIES_AT_ONCE]
            entry = self.entries[first + at : first + at + len(part)].long().cpu()
            key, flags = unpack(entry)
            yield part % self.rows, part // self.rows, flags, key


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """An error unless the tensor is of such a type and of that shape; -1 is any length."""
    if tensor is None:
        return
    there = tuple(tensor.shape)
    if len(there) != len(shape) or any(n not in (m, -1) for m, n in zip(there, shape, strict=True)):
        wanted = ", ".join("n" if n < 0 else str(n) for n in shape)
        raise SparsekitError(f"plan.{name} {there}: want ({wanted}{',' if len(shape) == 1 else ''}).")
    if tensor.dtype not in dtypes:
        raise SparsekitError(f"plan.{name} is {tensor.dtype}: want {' or '.join(map(str, dtypes))}.")


def nothing_visited(plan: PlanRows, ranked: Ranked) -> Tensor:
    """int32 (S, P, n, T) of zeros, in which an execution counts the ranked tiles that each query tile visits."""
    return ranked.q_index.new_zeros(*ranked.q_index.shape[:3], ranked.q_index.shape[3] // plan.block_q)

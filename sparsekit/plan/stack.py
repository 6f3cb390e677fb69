"""One plan for a layer whose heads run different patterns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.errors import SparsekitError
from sparsekit.plan.bounds import row_bounds, upload
from sparsekit.plan.build import dense_plan
from sparsekit.plan.plan import BlockPlan, heaviest_first, pointers
from sparsekit.plan.rule import INT32

__all__ = ["stack_heads"]


def stack_heads(plans: Sequence[BlockPlan], plan_of_head: Sequence[int]) -> BlockPlan:
    """One plan for a layer whose heads differ: query head h runs `plans[plan_of_head[h]]`. The host does not wait.

    A plan whose head dimension is 1 serves every head given to it; one with as many heads as `plan_of_head` serves
    head h with its own head h. Single columns are kept; tiles are those of the plan with the fewest keys a tile.

    Raises:
        SparsekitError: plans that do not fit together, or are corrected differently where they are not dense.
    """
    heads, used = len(plan_of_head), sorted(set(plan_of_head))
    if any(plan.heads not in (1, heads) for plan in plans):
        raise SparsekitError(f"plans of one layer have 1 or {heads} heads, got {[plan.heads for plan in plans]}.")
    block_kv = min([plans[i].block_kv for i in used if not plans[i].all_dense], default=plans[used[0]].block_kv)
    geometry = plans[0].geometry.with_tile(plans[0].block_q, block_kv)
    if any(plan.geometry.with_tile(plan.block_q, block_kv) != geometry for plan in plans):
        raise SparsekitError("plans of one layer must share their geometry and query tile.")
    if all(plans[i].all_dense for i in used) or not geometry.rows:
        return dense_plan(geometry)
    if len(used) == 1:
        return plans[used[0]]
    corrections = {plans[i].correct_every for i in used if not plans[i].all_dense}
    if len(corrections) > 1:
        raise SparsekitError(f"plans of one layer with correct_every {sorted(corrections)}: they must share it.")
    if any(plans[i].ranked is not None for i in used):
        raise SparsekitError("a ranked plan is a layer's only one: it cannot be stacked with those of other heads.")
    parts = [plans[i].with_block_kv(block_kv) if plans[i].row_ptr is not None else plans[i] for i in used]
    device = next(part.row_ptr.device for part in parts if part.row_ptr is not None)
    forms = tuple((part.samples, part.heads) for part in parts)
    of_head = tuple(used.index(i) for i in plan_of_head)
    block, row, most = _row_sources(forms, of_head, geometry.rows, device)
    samples = max(part.samples for part in parts)
    tokens, bits = _stacked_columns(parts, block, row, device)
    row_ptr, entries = _stacked_entries(parts, most, row, device)
    dense = _stacked_dense(parts, row, device)
    tiles = row_bounds(geometry, samples, device)[2][:, None]
    listed = row_ptr.diff().view(samples, heads, -1)
    work = listed if dense is None else torch.where(dense.view(samples, heads, -1), tiles, listed)
    return BlockPlan(
        geometry,
        samples=samples,
        heads=heads,
        row_ptr=row_ptr,
        entries=entries,
        rule=_stacked_rules(parts, block, device, (samples, heads)),
        dense_rows=dense,
        tokens=None if tokens is None else tokens.view(samples, heads, -1),
        token_bits=bits,
        order=heaviest_first(work),
        long_rows=max(part.long_rows for part in parts),
        on_grid=all(part.on_grid for part in parts),
        correct_every=corrections.pop(),
    )


@per_geometry
def _row_sources(
    forms: tuple[tuple[int, int], ...], of_head: tuple[int, ...], rows: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Where each (sample, head) and each row of a stacked plan comes from, in its parts' rows laid end to end.

    Args:
        forms: samples and heads of each part.

    Returns:
        int64 (S*H,) and (S*H*R,), and for each part how often its most wanted head is wanted.
    """
    samples, bases, wanted = max(s for s, _ in forms), [0], []
    for s, p in forms:
        bases.append(bases[-1] + s * p)
    block = []
    for sample in range(samples):
        for head, part in enumerate(of_head):
            s, p = forms[part]
            block.append(bases[part] + (sample if s > 1 else 0) * p + (head if p > 1 else 0))
    for part in range(len(forms)):
        own = [b for b in block if bases[part] <= b < bases[part + 1]]
        wanted.append(max(map(own.count, set(own)), default=0))
    blocks = torch.tensor(block, dtype=torch.int64, device="cpu")
    row = (blocks[:, None] * rows + torch.arange(rows, dtype=torch.int64, device="cpu")).flatten()
    return upload(blocks, device), upload(row, device), tuple(wanted)


def _stacked_entries(
    parts: Sequence[BlockPlan], wanted: tuple[int, ...], row: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(row_ptr, entries) of rows picked from the parts; on a GPU entries have room for all that could be picked."""
    counts: list[Tensor] = []
    begins: list[Tensor] = []
    pieces, before, room = [], 0, 0
    for part, times in zip(parts, wanted, strict=True):
        if part.row_ptr is None or part.entries is None:
            nothing = torch.zeros(part.samples * part.heads * part.rows, dtype=torch.int64, device=device)
            counts.append(nothing)
            begins.append(nothing)
            continue
        ptr = part.row_ptr.long()
        counts.append(ptr.diff())
        begins.append(ptr[:-1] + before)
        pieces.append(part.entries)
        before, room = before + part.entries.numel(), room + part.entries.numel() * times
    count = torch.cat(counts)[row]
    row_ptr, entries = pointers(count), torch.cat(pieces)
    size = int(row_ptr[-1]) if device.type == "cpu" else room
    if not size:
        return row_ptr, entries[:0]
    # Within a row the source runs on by one; at its start it jumps. Summed jumps are cheaper than looking rows up.
    start = (count.cumsum(0) - count).clamp(max=size)
    shift = torch.cat(begins)[row] - start
    small = torch.int32 if before + size < 2**31 else torch.int64
    jumps = torch.zeros(size + 1, dtype=small, device=device)
    jumps.index_add_(0, start, shift.diff(prepend=shift.new_zeros(1)).to(small))
    source = jumps[:-1].cumsum(0, dtype=small) + torch.arange(size, dtype=small, device=device)
    return row_ptr, entries[source.clamp(0, before - 1)]


def _stacked_dense(parts: Sequence[BlockPlan], row: Tensor, device: torch.device) -> Tensor | None:
    if all(part.dense_rows is None and not part.all_dense for part in parts):
        return None
    flags = []
    for part in parts:
        none = torch.full((part.samples * part.heads * part.rows,), part.all_dense, dtype=torch.bool, device=device)
        flags.append(none if part.dense_rows is None else part.dense_rows)
    return torch.cat(flags)[row]


def _stacked_rules(
    parts: Sequence[BlockPlan], block: Tensor, device: torch.device, form: tuple[int, int]
) -> Tensor | None:
    if all(part.rule is None for part in parts):
        return None
    rules = []
    for part in parts:
        none = _no_rule(device)
        rule = none if part.rule is None else part.rule
        rules.append(rule.expand(part.samples, part.heads, 3).flatten(0, 1))
    return torch.cat(rules)[block].view(*form, 3)


@per_geometry
def _no_rule(device: torch.device) -> Tensor:
    """int32 (1, 1, 3), of a part without RULE tiles, in which no row is dense by a rule."""
    return upload(torch.tensor([[[0, 0, INT32]]], dtype=torch.int32, device="cpu"), device)


def _stacked_columns(
    parts: Sequence[BlockPlan], block: Tensor, row: Tensor, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    width = max((part.tokens.shape[-1] for part in parts if part.tokens is not None), default=0)
    if not width:
        return None, None
    tokens: list[Tensor] = []
    bits: list[Tensor] = []
    words = -(-width // 32)
    for part in parts:
        own = part.samples * part.heads
        token = torch.full((own, width), INT32, dtype=torch.int32, device=device)
        bit = torch.zeros(own * part.rows, words, dtype=torch.int32, device=device)
        if part.tokens is not None and part.token_bits is not None:
            token[:, : part.tokens.shape[-1]] = part.tokens.flatten(0, 1)
            bit[:, : part.token_bits.shape[-1]] = part.token_bits
        tokens.append(token)
        bits.append(bit)
    return torch.cat(tokens)[block], torch.cat(bits)[row]

"""Several plans of one call -> one plan that keeps what any of them keeps.

A torch path for the CPU, which is the definition, and a Triton path for CUDA (`join_triton.py`), which does not wait
for the device. Both give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import pack_bits, unpack_bits
from sparsekit.kernels.select.grid import Form
from sparsekit.plan import CAUSAL, RULE, BlockPlan, dense_plan, heaviest_first, pack, row_bounds, unpack

__all__ = ["join_plans"]

BEFORE = -(1 << 40)  # a tile that ends before any key
# Bits of single columns laid out one by one in one go.
BITS_AT_ONCE = 1 << 24


def join_plans(plans: Sequence[BlockPlan], *, impl: str | None = None) -> BlockPlan:
    """One plan that keeps every pair that any of `plans` keeps, and as few others as whole tiles allow.

    The plans are of one call and one query tile; their head counts divide the largest. Tiles are those of the plan with
    the fewest keys a tile. Tiles of one plan stay where they are, and equal ones become one; where tiles of two plans
    overlap in part, the row goes on from the end of the earlier one. A tile under the token rule that meets another
    plan's tile, or holds a single column that the row needs, is kept whole; a column is dropped where a tile holds it.
    A row that is dense by bounds in one plan is so in the result, and rules grow to what either keeps.

    Args:
        impl: "torch" or "triton"; None: what the device runs.

    Raises:
        SparsekitError: plans that do not fit together, or a ranked one.
    """
    if any(plan.ranked is not None for plan in plans):
        raise SparsekitError("a ranked plan is a layer's only one: it cannot be joined with others.")
    if any(plan.all_dense for plan in plans) or not plans[0].rows:
        return dense_plan(plans[0].geometry)
    block_kv = min(plan.block_kv for plan in plans)
    plans = [plan.with_block_kv(block_kv) for plan in plans]
    geometry, heads = plans[0].geometry, max(plan.heads for plan in plans)
    if any(plan.geometry != geometry or heads % plan.heads for plan in plans):
        raise SparsekitError("plans that are joined must share their geometry, query tile and heads.")
    form = Form(max(plan.samples for plan in plans), heads, geometry.rows)
    return reduce(lambda a, b: _join(a, b, geometry, form, impl), plans)


def _join(a: BlockPlan, b: BlockPlan, geometry: Geometry, form: Form, impl: str | None) -> BlockPlan:
    device = next(plan.row_ptr.device for plan in (a, b) if plan.row_ptr is not None)
    first, last, tiles, _ = row_bounds(geometry, form.samples, device)
    dense = None
    for plan in (a, b):
        if plan.dense_rows is not None:
            own = _spread(plan.dense_rows, plan, form).flatten()
            dense = own if dense is None else dense | own
    tokens, bits = _joined_columns((a, b), form, dense)
    if runs_triton(device, impl):
        from sparsekit.kernels.select.join_triton import drop_columns_triton, merge_triton

        row_ptr, entries = merge_triton(a, b, form, first, last, dense)
        if tokens is not None and bits is not None:
            bits = drop_columns_triton(row_ptr, entries, tokens, bits, form, geometry)
    else:
        row_ptr, entries = _merge(a, b, form, first, last, dense)
        if tokens is not None and bits is not None:
            bits = _drop_columns(row_ptr, entries, tokens, bits, geometry.block_kv)
    counts = row_ptr.diff().view(form)
    return BlockPlan(
        geometry,
        samples=form.samples,
        heads=form.heads,
        row_ptr=row_ptr,
        entries=entries,
        rule=_joined_rule((a, b), form),
        dense_rows=dense,
        tokens=tokens,
        token_bits=bits,
        order=heaviest_first(counts if dense is None else torch.where(dense.view(form), tiles[:, None], counts)),
        long_rows=max(a.long_rows, b.long_rows),
        on_grid=a.on_grid and b.on_grid,
    )


def source_rows(plan: BlockPlan, form: Form, row: Tensor) -> Tensor:
    """The plan's own row for rows (s * H + h) * R + r of the joined one."""
    sample, head = row // (form.rows * form.heads), row // form.rows % form.heads
    own = head // (form.heads // plan.heads) + (sample * plan.heads if plan.samples > 1 else 0)
    return own * form.rows + row % form.rows


def _spread(values: Tensor, plan: BlockPlan, form: Form) -> Tensor:
    """(S, H, R, ...) of what a plan holds for its own rows, (S_own * P * R, ...)."""
    own = values.view(plan.samples, plan.heads, 1, plan.rows, *values.shape[1:])
    wide = own.expand(form.samples, plan.heads, form.heads // plan.heads, plan.rows, *values.shape[1:])
    return wide.reshape(*form, *values.shape[1:])


def _joined_rule(plans: Sequence[BlockPlan], form: Form) -> Tensor | None:
    rules = []
    for plan in plans:
        if plan.rule is not None:
            alike = plan.rule.shape[1] == 1
            rules.append(plan.rule if alike else plan.rule.repeat_interleave(form.heads // plan.heads, 1))
    if not rules:
        return None
    sink = reduce(torch.maximum, (rule[..., 0] for rule in rules))
    window = reduce(torch.maximum, (rule[..., 1] for rule in rules))
    return torch.stack([sink, window, reduce(torch.minimum, (rule[..., 2] for rule in rules))], -1)


# ---- tiles
def _merge(
    a: BlockPlan, b: BlockPlan, form: Form, first: Tensor, last: Tensor, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(row_ptr, entries) of the disjoint tiles: all rows at once, one listed tile of each a step.

    The last two tiles of a row stay open, since a later one may still touch them.
    """
    row = torch.arange(form.total, device=first.device)
    low, high = (x[row // (form.rows * form.heads), row % form.rows] for x in (first, last))
    if dense is not None:
        high = torch.where(dense, 0, high)
    key, whole, count = _side_by_side([_listed(plan, form, row, high) for plan in (a, b)], form.total)
    width = a.block_kv
    out_key, out_whole = torch.zeros_like(key), torch.zeros_like(whole)
    place = torch.zeros_like(row)
    earlier, current = torch.full_like(row, BEFORE), torch.full_like(row, BEFORE)
    earlier_whole, current_whole = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row, dtype=torch.bool)

    def emit(now: Tensor) -> None:
        at = (now & (earlier >= 0)).nonzero().flatten()
        out_key[at, place[at]], out_whole[at, place[at]] = earlier[at], earlier_whole[at]
        place[at] += 1

    for i in range(key.shape[1]):
        start, full, live = key[:, i], whole[:, i], i < count
        earlier_whole |= live & (start < current) & full
        current_whole |= live & (start < current + width) & full
        new = live & (start > current)
        emit(new)
        earlier, earlier_whole = torch.where(new, current, earlier), torch.where(new, current_whole, earlier_whole)
        current_whole = torch.where(new, full, current_whole)
        current = torch.where(new, torch.maximum(start, current + width), current)
    for _ in range(2):
        emit(torch.ones_like(current_whole))
        earlier, earlier_whole, current = current, current_whole, torch.full_like(current, BEFORE)
    used = torch.arange(out_key.shape[1], device=row.device) < place[:, None]
    flags = (out_key + width - 1 > low[:, None]) * CAUSAL + ~out_whole * RULE
    entries = pack(out_key, flags)[used].to(torch.int32)
    return torch.nn.functional.pad(place.cumsum(0), (1, 0)).to(torch.int32), entries


def _listed(plan: BlockPlan, form: Form, row: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, first key, whole?) of each tile that joined rows take from a plan, those past the last query left out."""
    assert plan.row_ptr is not None and plan.entries is not None
    own = source_rows(plan, form, row)
    begin, count = plan.row_ptr[own].long(), plan.row_ptr.diff()[own].long()
    owner = torch.repeat_interleave(row, count)
    place = torch.arange(len(owner), device=row.device) - (count.cumsum(0) - count)[owner] + begin[owner]
    entry = plan.entries[place].long()
    key, flags = unpack(entry)
    live = key < high[owner]
    return owner[live], key[live], (flags & RULE == 0)[live]


def _side_by_side(lists: Sequence[tuple[Tensor, Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(keys (rows, most) ascending, whole? alike, how many (rows,))."""
    row, key, whole = (torch.cat(parts) for parts in zip(*lists, strict=True))
    order = torch.argsort(row << 32 | key, stable=True)
    row, key, whole = row[order], key[order], whole[order]
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    keys, wholes = (part.new_zeros(rows, int(count.max())) for part in (key, whole))
    keys[row, place], wholes[row, place] = key, whole
    return keys, wholes, count


# ---- single columns
def _joined_columns(
    plans: Sequence[BlockPlan], form: Form, dense: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """tokens (S, H, T) ascending, and the bits (S*H*R, words) of columns that any plan's row needs."""
    having = [plan for plan in plans if plan.tokens is not None and plan.token_bits is not None]
    if not having:
        return None, None
    listed, bits = [], []
    for plan in having:
        assert plan.tokens is not None and plan.token_bits is not None
        listed.append(plan.tokens.repeat_interleave(form.heads // plan.heads, 1).expand(form.samples, -1, -1))
        own = _spread(plan.token_bits, plan, form).flatten(0, 2)
        bits.append(own if dense is None else own.masked_fill(dense[:, None], 0))
    if len(having) == 1:
        return listed[0].contiguous(), bits[0]
    tokens, order = torch.cat(listed, -1).sort(stable=True, dim=-1)
    twin = tokens == torch.nn.functional.pad(tokens, (1, 0), value=-1)[..., :-1]
    order, twin = order.flatten(0, 1), twin.flatten(0, 1)
    packed = []
    for rows in torch.arange(form.total, device=tokens.device).split(max(BITS_AT_ONCE // tokens.shape[-1], 1)):
        head = rows // form.rows
        apart = [unpack_bits(bit[rows], part.shape[-1]) for bit, part in zip(bits, listed, strict=True)]
        needed = torch.cat(apart, -1).gather(-1, order[head])
        # A column that both list is kept at its first place.
        needed[:, :-1] |= needed[:, 1:] & twin[head][:, 1:]
        packed.append(pack_bits(needed & ~twin[head]))
    return tokens, torch.cat(packed)


def _drop_columns(row_ptr: Tensor, entries: Tensor, tokens: Tensor, bits: Tensor, width: int) -> Tensor:
    """The bits without columns that a row's tiles hold; takes the rule off tiles that hold a needed one, in place."""
    rows = len(bits)
    row = torch.repeat_interleave(torch.arange(rows, device=bits.device), row_ptr.long().diff())
    key, _ = unpack(entries.long())
    every = tokens.flatten(0, 1).long()
    out = []
    for part in torch.arange(rows, device=bits.device).split(max(BITS_AT_ONCE // every.shape[1], 1)):
        needed = unpack_bits(bits[part], every.shape[1])
        column = every[part // (rows // len(every))]
        # The last tile of the row that starts at the column or before it.
        place = torch.searchsorted(row << 32 | key, part[:, None] << 32 | column, right=True) - 1
        at = place.clamp(min=0)
        held = (place >= 0) & (row[at] == part[:, None]) & (column < key[at] + width) if len(key) else needed & False
        entries[at[held & needed]] &= ~RULE
        out.append(pack_bits(needed & ~held))
    return torch.cat(out)

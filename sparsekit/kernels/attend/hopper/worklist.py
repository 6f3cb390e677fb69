"""The work list of a plan for the Hopper form: items, their order, and rows split over keys.

The work list is made once per plan, on the device, and stays in `plan.memo`: one item a (sample, head, query tile),
heaviest first inside a section of heads whose K and V stay in L2, and items so long that they would decide the finish
before all others. Where even that does not help (the dense last rows of Triangle with few heads, short chunks over a
long cache), those rows are split over keys and merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.hopper.halves import own_list, pair_rows
from sparsekit.kernels.attend.hopper.load import _device_code
from sparsekit.kernels.device import processors_of
from sparsekit.plan import CAUSAL, RULE, BlockPlan, causal_tiles, upload
from sparsekit.plan.memo import HOPPER_WORK, SLOTS

BLOCK_Q = 128
# Key heads worked on at once, so that their K and V stay in L2: worth 3% dense, and 15 to 24% on lists of each head's
# own, which like 1 a little better (random tiles, 10% density, 128K: 613 against 600 TFLOP/s, H100).
KEY_HEADS_AT_ONCE = 2
KEY_HEADS_AT_ONCE_LISTED = 1
# Rows of fewer steps are not worth a second launch for the merge.
SPLIT_FROM_STEPS = 64
# A row is long from this many times a processor's share on. At 1.0 a chunk of 512 queries over 128K keys, whose 128
# items fill 132 processors as they are, lost 7% to the merge (H100).
LONG_SHARE = 1.5
SHORTEST_PIECE = 16
# Workspace of split rows, as a share of q, k, v and out, or this many bytes.
WORKSPACE_SHARE = 0.015
WORKSPACE_BYTES = 8 << 20
H100_SMS = 132
ITEMS_A_PROGRAM = 32
MERGE_ROWS = 32
WORK_BITS = 24  # of a sort key: steps of an item; its section stands above


_Pair = tuple["Tensor | None", "Tensor | None"]


def _processors(device: torch.device) -> int:
    return processors_of(device) if device.type == "cuda" else H100_SMS


@dataclass(frozen=True)
class _Work:
    """One launch: the samples that share their last valid key, where the K and V descriptors end.

    items: int32 (n, 8), see device.py. entries: what they list. merges: int32 (slots, 4), see `merge` there.
    """

    items: Tensor
    entries: Tensor | None
    merges: Tensor | None
    slots: int
    kv_end: int
    blocks: int


def _step_keys(dim: int) -> int:
    """Keys of a step: an entry, half of one, or several. At head size 256 registers and shared memory hold 64."""
    return 64 if dim == 256 else 128


def _works(plan: BlockPlan, q: Tensor, k: Tensor, pack: int = 1) -> tuple[_Work, ...]:
    """pack: query heads that are rows of one head beside one another, where queries have a step."""
    batch, heads, _, dim = q.shape
    step = _step_keys(dim)
    slots = _workspace_slots(plan, q, k, step, pack)
    key = (HOPPER_WORK, q.device, heads, k.shape[1], step, slots, pack)
    works: tuple[_Work, ...] | None = plan.memo.get(key)
    if works is None:
        g = plan.geometry
        ends = sorted({end for end, span in zip(g.kv_end, g.spans, strict=True) if span.q_end > span.q_first})
        groups = [tuple(b for b in range(batch) if g.kv_end[b] == end) for end in ends]
        entries = own_list(plan, q.device) if _halves(plan) else plan.entries
        works = tuple(
            _make_work(plan, entries, samples, end, heads, heads // k.shape[1], step, slots, pack, q.device)
            for samples, end in zip(groups, ends, strict=True)
        )
        plan.memo.keep(key, works)
    return works


def _workspace_slots(plan: BlockPlan, q: Tensor, k: Tensor, step: int, pack: int) -> int:
    """Partial results (128 rows each) a launch may write: 0 where no row is long against all the work.

    Decided by what the host knows: the longest row there can be, against the entries listed.
    """
    batch, heads, _, dim = q.shape
    key = (SLOTS, batch, heads, k.shape[1], dim, step, pack)
    if key not in plan.memo:
        g = plan.geometry
        longest = -(-max(span.q_end for span in g.spans) // step)
        if plan.entries is None:
            total = heads * pack * int(causal_tiles(g, plan.samples).sum())
            total = total * (batch // plan.samples) * plan.block_kv * plan.block_q // (step * BLOCK_Q)
        else:
            shared = batch * heads // (plan.samples * plan.heads)
            total = plan.entries.numel() * shared * plan.block_kv // step
        key_bytes = batch * k.shape[1] * g.kv_len * dim * k.element_size()
        budget = max(int(WORKSPACE_SHARE * 2 * (q.nbytes + key_bytes)), WORKSPACE_BYTES)
        wanted = (
            not _halves(plan) and longest >= SPLIT_FROM_STEPS and longest * _processors(q.device) > LONG_SHARE * total
        )
        plan.memo[key] = min(budget // (BLOCK_Q * (dim + 1) * 4), 4 * _processors(q.device)) if wanted else 0
    return int(plan.memo[key])


def _workspace(work: _Work, q: Tensor) -> _Pair:
    """Room for partial results (slots, 128, D) and their lse, which `_merge` joins; None where no row is split."""
    if not work.slots:
        return None, None
    partial = q.new_empty((work.slots, BLOCK_Q, q.shape[3]), dtype=torch.float32)
    return partial, q.new_empty((work.slots, BLOCK_Q), dtype=torch.float32)


def _merge(work: _Work, partial: _Pair, out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> None:
    """Partial results of rows split over keys -> out and lse (B, H, Q). partial: (slots, 128, D), and their own lse."""
    _, heads, q_len, dim = out.shape
    _device_code().merge[(work.slots, BLOCK_Q // MERGE_ROWS)](
        work.merges, *partial, out, lse, sinks, heads, q_len, *out.stride()[:3],
        D=dim, BM=MERGE_ROWS, LSE=lse is not None, SINKS=sinks is not None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """What the work list owes to lengths and head counts alone, as tensors of one entry an item, (n, H, R) flattened.

    items: int32 (n*H*R, 8), as if every row were dense. rows: index into the plan's rows. dense_steps: their lengths.
    section: launch sections, << WORK_BITS. tile: the valid query rows, low | high << 8. dead: no valid query.
    """

    items: Tensor
    rows: Tensor
    dense_steps: Tensor
    section: Tensor
    tile: Tensor
    dead: Tensor


@per_geometry
def _grid(
    g: Geometry, samples: tuple[int, ...], shared: bool, plan_heads: int, heads: int, group: int, step: int,
    pack: int, device: torch.device,
) -> _Grid:  # fmt: skip
    """The grid of `samples`; `shared`: one plan sample serves them all. Kept for plans that are made anew each call."""
    rows = g.rows if g.q_step == 1 else -(-g.q_rows * pack // BLOCK_Q)
    spans = [(g.kv_start[b], g.spans[b].q_first, g.spans[b].q_end, b, 0 if shared else b) for b in samples]
    there = upload(torch.tensor(spans, dtype=torch.int32, device="cpu"), device)
    kv_start, q_first, q_end, sample, plan_sample = there[:, :, None, None].unbind(1)  # (n, 1, 1) each
    row = torch.arange(rows, device=device, dtype=torch.int32)
    head = torch.arange(heads, device=device, dtype=torch.int32)[:, None]
    diagonal: Tensor | int
    if g.q_step == 1:
        start = (q_first // BLOCK_Q + row) * BLOCK_Q
        low, high = (q_first - start).clamp(0, BLOCK_Q), (q_end - start).clamp(0, BLOCK_Q)
        q_row, end, diagonal = start + kv_start - g.q_offset, start + high, BLOCK_Q // step
    else:
        q_row, base = row * BLOCK_Q + torch.zeros_like(q_first), q_first // g.q_step
        count = torch.where(q_end > q_first, (-(-q_end // g.q_step) - base) * pack, 0)
        low, high = torch.zeros_like(q_row), (count - q_row).clamp(0, BLOCK_Q)
        first, last = (((base + at // pack) * g.q_step).maximum(q_first) for at in (q_row, q_row + high - 1))
        end, diagonal = last + 1, (last + step) // step - (first + 1) // step
    dead = high <= low
    steps = torch.where(dead, 1, (end + (step - 1)) // step)
    begin = steps - 1 if g.q_step == 1 else torch.zeros_like(steps)
    by_bounds = item.DENSE | torch.where(dead, BLOCK_Q // step, diagonal) << item.DIAGONAL_SHIFT
    tile = item.pack_tile(low, high)
    kind = tile | torch.where(dead, by_bounds | item.EMPTY, by_bounds)
    plan_row = (plan_sample * plan_heads + head // (heads // plan_heads)) * rows + row
    shape = (len(samples), heads, rows)
    fields = [
        q_row, sample * heads + head, torch.where(dead, 0, begin), steps, kv_start, kind,
        torch.full_like(row, -1), plan_row,
    ]  # fmt: skip
    items = torch.stack([x.expand(shape) for x in fields], -1).view(-1, len(fields)).to(torch.int32)
    at_once = KEY_HEADS_AT_ONCE if plan_heads == 1 else KEY_HEADS_AT_ONCE_LISTED
    section = (items[:, item.HEAD] // (group * at_once)).clamp(max=120) + 1
    if g.q_step > 1:  # few and long: in sections, processors would wait for the last ones 12% of the time
        section = torch.ones_like(section)
    # Contiguous: an expanded dimension may survive `reshape` as a view of stride 0, which the device code cannot see.
    flat = [x.expand(shape).reshape(-1).contiguous() for x in (plan_row, steps, tile, dead)]
    return _Grid(items, flat[0].long(), flat[1], section << WORK_BITS, flat[2], flat[3])


def _make_work(
    plan: BlockPlan,
    entries: Tensor | None,
    samples: tuple[int, ...],
    kv_end: int,
    heads: int,
    group: int,
    step: int,
    slots: int,
    pack: int,
    device: torch.device,
) -> _Work:
    geometry = plan.geometry.with_tile(BLOCK_Q, plan.block_kv)
    grid = _grid(geometry, samples, plan.samples == 1, plan.heads, heads, group, step, pack, device)
    section = grid.section
    if plan.row_ptr is None:
        items, work = grid.items, grid.dense_steps
    elif _halves(plan):
        assert entries is not None
        items, work = pair_rows(plan, grid.items, grid.rows, entries, samples, heads, step)
        section = section.repeat(len(items) // len(section))
    else:
        items, work = _listed(plan, grid, step)
    processors = _processors(device)
    order = torch.sort(_sort_keys(work, section, processors), stable=True).indices
    items = items[order]
    merges = None
    if slots:
        work = work[order]
        items, merges = _split(items, work, slots, plan.block_kv, step, processors, up=plan.geometry.q_step > 1)
    return _Work(items, entries, merges, slots, kv_end, min(len(items), processors))


def _listed(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    """(items, steps of each) of a plan with lists. On a GPU one launch: a dynamic plan is made anew in each layer."""
    return _listed_on_gpu(plan, grid, step) if grid.items.is_cuda else _listed_by_torch(plan, grid, step)


def _listed_on_gpu(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    from sparsekit.kernels.launch import launch

    assert plan.row_ptr is not None and plan.entries is not None
    items, work = torch.empty_like(grid.items), torch.empty_like(grid.dense_steps)
    rule, bits, dense = plan.rule, plan.token_bits, plan.dense_rows
    if not plan.entries.numel():
        rule = None
    rule_sample = rule_head = 0
    if rule is not None:
        rule_sample = rule.stride(0) if rule.shape[0] > 1 else 0
        rule_head = rule.stride(1) if rule.shape[1] > 1 else 0
    args = (
        grid.items, grid.rows, plan.row_ptr, plan.entries, None if dense is None else dense.view(torch.uint8), bits,
        rule, items, work, len(items), plan.rows, plan.heads, 0 if bits is None else bits.shape[1], rule_sample,
        rule_head, plan.geometry.q_offset, max(plan.entries.numel() - 1, 0),
    )  # fmt: skip
    options = {
        "STEP": step, "BLOCK_KV": plan.block_kv, "HALF_STEPS": _has_half_steps(plan, step), "PER": ITEMS_A_PROGRAM,
        "WORDS": 32, "num_warps": 4,
    }  # fmt: skip
    launch(_device_code().list_items, -(-len(items) // ITEMS_A_PROGRAM), args, options)
    return items, work


def _listed_by_torch(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    """The same with torch ops: what `list_items` is tested against."""
    assert plan.row_ptr is not None and plan.entries is not None
    parts = _parts(plan, step)
    begin = plan.row_ptr[:-1][grid.rows]
    count = (plan.row_ptr[1:] - plan.row_ptr[:-1])[grid.rows]
    kind = grid.tile
    if parts > 1:
        kind = kind | (-count & (parts - 1)) << item.MISSING_SHIFT
        count = (count + (parts - 1)) // parts
    elif plan.rule is not None and plan.entries.numel():
        narrow = _only_sinks(plan, grid, begin, count, item.NARROW_KEYS)
        kind = kind | narrow * item.NARROW
        begin, count = begin + narrow, count - narrow
        if _has_half_steps(plan, step):
            kind = kind | _half_steps(plan, grid, begin, count)
    if plan.block_kv > step:
        count = count * (plan.block_kv // step)
    dense = columns = None
    if plan.dense_rows is not None:
        dense = plan.dense_rows[grid.rows]
        count = torch.where(dense, grid.dense_steps, count)
    work = count
    if plan.token_bits is not None:
        columns = _column_steps(plan.token_bits, step)[grid.rows]
        work = count + columns
        count = item.pack_steps(count, columns)
    # Rows that keep nothing stay as the grid has them, dense by bounds, with one step that is masked whole.
    empty = grid.dead | (work == 0)
    bounded = empty if dense is None else empty | dense
    items = grid.items.clone()
    items[:, item.START] = torch.where(bounded, items[:, item.START], begin)
    items[:, item.START].masked_fill_(empty, 0)
    items[:, item.COUNT] = torch.where(empty, 1, count)
    items[:, item.KIND] = torch.where(bounded, items[:, item.KIND], kind) | empty * item.EMPTY
    return items, torch.where(empty, 1, work)


def _halves(plan: BlockPlan) -> bool:
    """Whether two rows of the plan share an item."""
    return plan.block_q == item.HALF and plan.row_ptr is not None


def _parts(plan: BlockPlan, step: int) -> int:
    """Entries of a step: 1, or several smaller ones; a plan that is dense everywhere has none."""
    return 1 if plan.row_ptr is None else max(step // plan.block_kv, 1)


def _only_sinks(plan: BlockPlan, grid: _Grid, begin: Tensor, count: Tensor, keys: int) -> Tensor:
    """int32 (n*H*R,): 1 where of the item's first entry the rule keeps nothing but sinks, and no more than `keys`.

    That is what Triangle's and the A-shape's rows look like, one entry in six at a window of 512 tokens.
    """
    assert plan.rule is not None and plan.entries is not None
    sink, window, dense_from, start = _rules(plan, grid)
    first = plan.entries[begin.clamp(max=plan.entries.numel() - 1)] == RULE
    few = first & (sink <= keys) & (count > 1)
    return (few & (start - window + 1 >= plan.block_kv) & (start + BLOCK_Q <= dense_from)).to(torch.int32)


def _has_half_steps(plan: BlockPlan, step: int) -> bool:
    return plan.block_kv == step == BLOCK_Q and plan.token_bits is None and plan.geometry.q_step == 1


def _half_steps(plan: BlockPlan, grid: _Grid, begin: Tensor, count: Tensor) -> Tensor:
    """int32 (n*H*R,): SHORT where 64 of an item's queries need half of the entry that the window's edge crosses, and
    the others half of the last one, on the diagonal; SECOND_EDGE beside it where that edge is in the second entry."""
    assert plan.entries is not None
    sink, window, dense_from, start = _rules(plan, grid)
    places = (begin, begin + 1, begin + count - 1)
    first, second, last = (plan.entries[at.clamp(0, plan.entries.numel() - 1)] for at in places)
    at_first, at_second = (
        (entry & RULE != 0) & (entry >> 2 >= sink) & (entry >> 2 <= start - window + 1) for entry in (first, second)
    )
    diagonal = (last & CAUSAL != 0) & (last >> 2 >= start) & (start + BLOCK_Q <= dense_from)
    short = (at_first | at_second) & diagonal & (count > 2)
    return short.to(torch.int32) * item.SHORT | (short & ~at_first).to(torch.int32) * item.SECOND_EDGE


def _rules(plan: BlockPlan, grid: _Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32 (n*H*R,): each item's sinks, window, first dense query, and position of its first query."""
    assert plan.rule is not None
    rule = plan.rule.expand(plan.samples, plan.heads, 3).reshape(-1, 3)[grid.rows // plan.rows]
    sink, window, dense_from = rule.unbind(1)
    return sink, window, dense_from, grid.items[:, item.ROW] + plan.geometry.q_offset - grid.items[:, item.KV]


def _column_steps(bits: Tensor, step: int) -> Tensor:
    """int32 (rows,): steps of single columns that a row runs, up to the last column it still needs."""
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int32)
    last_word = torch.where(bits != 0, place, 0).amax(1)
    return (last_word * 32 + (step - 1)) // step


def _sort_keys(work: Tensor, section: Tensor, processors: int) -> Tensor:
    """int32: ascending, heaviest first inside a section; items that would decide the finish before all sections.

    Items without steps come last: at the first of them a processor has done.
    """
    if not work.is_cuda:
        key = torch.where(work * (4 * processors) > work.sum(), 0, section) - work.clamp(max=(1 << WORK_BITS) - 1)
        return key.masked_fill(work == 0, 2**31 - 1)
    from sparsekit.kernels.launch import launch

    key = torch.empty_like(work)
    options = {"PER": 1024, "num_warps": 4}
    launch(
        _device_code().sort_keys,
        -(-len(work) // 1024),
        (work, work.sum(), section, key, len(work), processors),
        options,
    )
    return key


def _split(
    items: Tensor, work: Tensor, slots: int, block_kv: int, step: int, processors: int, *, up: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Items much longer than a processor's share of the work, cut into pieces of half of that: (items, merges).

    up: dense items begin with their first keys.
    """
    split_entry, parts = max(block_kv // step, 1), max(step // block_kv, 1)
    count, columns = item.unpack_steps(items[:, item.COUNT])
    share = work.sum() // (2 * processors) + 1
    long = torch.where(work > int(2 * LONG_SHARE) * share, work, 0).sum() * 2 // slots
    piece = torch.maximum(share, long).clamp(min=SHORTEST_PIECE) // split_entry * split_entry + split_entry
    pieces = torch.where(count > int(2 * LONG_SHARE) * piece, (count + piece - 1) // piece, 1)
    taken = torch.where(pieces > 1, pieces, 0).cumsum(0)
    pieces = torch.where(taken <= slots, pieces, 1)
    first_slot = torch.where(pieces > 1, taken - pieces, -1)

    ends = pieces.cumsum(0)
    at = torch.arange(len(items) + slots, device=items.device)
    owner = torch.searchsorted(ends, at, right=True).clamp(max=len(items) - 1)
    nth = at - (ends - pieces)[owner]
    exists = at < ends[-1]
    row, sample_head, begin, _, kv_start, kind, _, plan_row = items[owner].unbind(1)
    skipped = nth * piece
    many = pieces[owner] > 1
    length = torch.where(many, torch.minimum(count[owner] - skipped, piece), count[owner])
    final = nth == pieces[owner] - 1
    last_step = skipped + length
    length = torch.where(exists, item.pack_steps(length, torch.where(final, columns[owner], 0)), 0)
    dense = (kind & item.DENSE) != 0
    begin = torch.where(dense, begin + (skipped if up else -skipped), begin + skipped * parts // split_entry)
    # Only a listed row's first piece has the sinks, and only its last one lacks entries; half steps are of whole rows.
    missing, below = item.MISSING << item.MISSING_SHIFT, (1 << item.DIAGONAL_SHIFT) - 1
    elsewhere = count[owner] - last_step if up else skipped
    crossing = ((kind >> item.DIAGONAL_SHIFT) - elsewhere).clamp(min=0)  # of the diagonal, by a dense row's piece
    listed = torch.where(nth > 0, kind & (below | missing), kind)
    listed = torch.where(final, listed, listed & ~(missing | item.SHORT | item.SECOND_EDGE))
    kind = torch.where(dense, kind & below | crossing << item.DIAGONAL_SHIFT, listed)
    slot = torch.where(many & exists, first_slot[owner] + nth, -1)
    pieced = torch.stack([row, sample_head, begin, length, kv_start, kind, slot, plan_row], 1).to(torch.int32)

    merges = torch.zeros(slots + 1, 4, dtype=torch.int32, device=items.device)
    target = torch.where(first_slot >= 0, first_slot, slots)  # the extra row takes what is not split
    tile = items[:, item.KIND] & ((1 << item.TILE_BITS) - 1)
    merges[target] = torch.stack([items[:, item.ROW], items[:, item.HEAD], tile, pieces], 1).to(torch.int32)
    return pieced, merges[:slots]

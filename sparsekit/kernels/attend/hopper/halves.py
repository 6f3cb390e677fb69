"""Work of plans with rows of 64 queries, for the Hopper form: two rows to an item of 128.

Diagonals move with the query: of 128 rows they touch twice the keys that they touch of 64, so that narrow rows keep
fewer pairs. But a tile read for 64 queries alone costs as much bandwidth as one read for 128, and the kernel would
wait for its keys. So two rows share an item. A tile that both list is one step's for both consumers; tiles that one
lists alone come in turns, for the first half and for the second, and the other consumer passes them. On MInference's
diagonals a half needs seven steps in ten, while no more tiles are read than for rows of 128.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.hopper.items import HALF, SPARE
from sparsekit.plan import BlockPlan, unpack, upload

__all__ = ["FARTHEST_KEY", "own_list", "pair_rows"]

FARTHEST_KEY = 1 << 21  # counts of steps have 15 bits
ENTRIES_AT_ONCE = 256


def own_list(plan: BlockPlan, device: torch.device) -> Tensor:
    """int32 room for the entries of all items, kept with the work list: when nobody knows yet how many there are."""
    assert plan.entries is not None
    room = item.list_room(plan.entries.numel(), plan.samples * plan.heads, plan.rows)
    return torch.empty(room, dtype=torch.int32, device=device)


def pair_rows(
    plan: BlockPlan, items: Tensor, pairs: Tensor, entries: Tensor, samples: tuple[int, ...], heads: int, step: int
) -> tuple[Tensor, Tensor]:
    """Items and the steps of each; on a GPU one launch.

    Args:
        plan: rows of 64 queries, listed, with tiles of 64 keys and no token rule.
        items: (n, 8), those of rows of 128 queries as if all were dense (`worklist._grid`).
        pairs: int64 (n,), which two rows of the plan an item has: the number of its row, were there 128 queries to one.
        entries: `own_list(plan)`, which this fills in: what the items list. Each sample has its part of it.
        samples: those of the items. step: keys of a step, 64 or 128.

    Returns:
        items (n or 2n, 8), twice as many where one row of a pair may be dense by bounds and the other listed; int32
        (n or 2n,).
    """
    assert plan.row_ptr is not None and plan.entries is not None
    rows = _rows(plan.geometry, samples, plan.samples == 1, plan.heads, heads, items.device)
    count = len(items) * (1 if plan.dense_rows is None else 2)
    made, work = items.new_zeros(count, 8), items.new_zeros(count)
    if items.is_cuda:
        _on_gpu(plan, items, pairs, rows, made, work, entries, step)
    else:
        _by_hand(plan, items, pairs, rows, made, work, entries, step)
    return made, work


@per_geometry
def _rows(
    g: Geometry, samples: tuple[int, ...], shared: bool, plan_heads: int, heads: int, device: torch.device
) -> Tensor:
    """int32 (2, n * H * T): the plan's rows in each item's halves, -1 where a half has no query."""
    tiles = g.with_tile(2 * HALF, g.block_kv).rows
    numbers = [(g.spans[b].q_first // HALF % 2, 0 if shared else b, g.spans[b].tiles(HALF)) for b in samples]
    there = torch.tensor(numbers, dtype=torch.int64, device="cpu")[:, :, None, None]
    first, sample, rows = there.unbind(1)
    head = torch.arange(heads, device="cpu")[:, None] // (heads // plan_heads)
    tile = 2 * torch.arange(tiles, device="cpu")
    row = torch.stack([tile - first, tile + 1 - first])
    row = torch.where((row >= 0) & (row < rows), (sample * plan_heads + head) * g.rows + row, -1)
    return upload(row.flatten(1).to(torch.int32), device)


def _on_gpu(
    plan: BlockPlan, items: Tensor, pairs: Tensor, rows: Tensor, made: Tensor, work: Tensor, entries: Tensor, step: int
) -> None:
    from sparsekit.kernels.attend.hopper.halves_device import pair_rows as kernel
    from sparsekit.kernels.launch import launch

    dense, bits = plan.dense_rows, plan.token_bits
    args = (
        items, pairs, rows, plan.row_ptr, plan.entries, None if dense is None else dense.view(torch.uint8), bits,
        made, work, entries, len(items), 0 if bits is None else bits.shape[1],
    )  # fmt: skip
    longest = plan.geometry.kv_len // plan.block_kv + 2
    options = {
        "STEP": step, "PARTS": step // HALF, "SPARE": SPARE, "SEARCH": longest.bit_length(), "BLOCK": ENTRIES_AT_ONCE,
        "WORDS": 32, "num_warps": 4,
    }  # fmt: skip
    launch(kernel, len(items), args, options)


def _by_hand(
    plan: BlockPlan, items: Tensor, pairs: Tensor, rows: Tensor, made: Tensor, work: Tensor, entries: Tensor, step: int
) -> None:
    """The same in plain Python: what the device code is tested against."""
    from sparsekit.kernels.attend.hopper.halves_device import NOWHERE

    assert plan.row_ptr is not None and plan.entries is not None
    ptr, listed, parts = plan.row_ptr.tolist(), plan.entries.tolist(), step // HALF
    for i, (grid, pair, first, second) in enumerate(zip(items.tolist(), pairs.tolist(), *rows.tolist(), strict=True)):
        there = [row for row in (first, second) if row >= 0]
        lists = [{} if row < 0 else {unpack(e)[0]: e for e in listed[ptr[row] : ptr[row + 1]]} for row in rows[:, i]]
        alone = [[e for key, e in own.items() if key not in other] for own, other in (lists, lists[::-1])]
        both = [e | lists[1][key] for key, e in lists[0].items() if key in lists[1]]
        shared, *own = (_in_steps(some, parts, int(NOWHERE.value)) for some in (both, *alone))
        turns = min(map(len, own))
        steps = [*shared, *(s for two in zip_longest(*own) for s in two if s is not None)]
        begin = ptr[there[0]] + SPARE * pair if there else 0
        flat = [e for s in steps for e in s]
        entries[begin : begin + len(flat)] = torch.tensor(flat, dtype=torch.int32, device="cpu")

        last_words = [0] if plan.token_bits is None else [_last_word(plan.token_bits[row]) for row in there]
        columns = -(-max([*last_words, 0]) * 32 // step)
        dense = [plan.dense_rows is not None and bool(plan.dense_rows[row]) for row in there]
        low, high, by_bounds = item.unpack_tile(grid[item.KIND])
        empty = bool(by_bounds & item.EMPTY) or not (len(steps) + columns or (dense and all(dense)))
        if len(set(dense)) == 2:
            work[len(items) + i] = grid[item.COUNT]
            cut = (low, min(high, HALF)) if dense[0] else (max(low, HALF), high)
            other = [*grid[: item.KIND], by_bounds | item.pack_tile(*cut), grid[item.COUNT], grid[item.PLAN]]
            made[len(items) + i] = torch.tensor(other, dtype=torch.int32, device="cpu")
            low, high = (max(low, HALF), high) if dense[0] else (low, min(high, HALF))
        row, head, start, count, kv, *_ = grid
        plan_row = item.pack_pair(there[0] if there else -1, int(len(there) == 2))
        tile = item.pack_tile(low, high)
        if empty or (dense and all(dense)):
            start, count = (0, 1) if empty else (start, count)
            words = [row, head, start, count, kv, tile | by_bounds | empty * item.EMPTY, count, plan_row]
        else:
            count = len(steps) + columns
            halves = item.pack_halves(len(shared) if steps else 1, turns, len(own[0]) < len(own[1]))
            words = [row, head, begin, item.pack_steps(len(steps), columns), kv, tile, halves, plan_row]
        made[i], work[i] = torch.tensor(words, dtype=torch.int32, device="cpu"), count


def _in_steps(entries: list[int], parts: int, nowhere: int) -> list[list[int]]:
    whole = [*entries, *[nowhere] * (-len(entries) % parts)]
    return [whole[at : at + parts] for at in range(0, len(whole), parts)]


def _last_word(bits: Tensor) -> int:
    used = bits.nonzero()
    return int(used[-1]) + 1 if len(used) else 0

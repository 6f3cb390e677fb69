"""The shared kernel's Hopper form: the same plans at the speed of the best dense kernels, on sm_90.

`hopper_kernel.py` is the device code, in Gluon (part of Triton >= 3.6). Here is what it covers, the work list of a
plan, and the launch. Nothing here synchronises with the host.

The work list is made once per plan, on the device, and stays in `plan.memo`: one item a (sample, head, query tile),
heaviest first inside a section of heads whose K and V stay in L2, and items so long that they would decide the finish
before all others. Where even that does not help (the dense last rows of Triangle with few heads, short chunks over a
long cache), those rows are split over keys and merged by their log-sum-exp.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsekit.geometry import Geometry
from sparsekit.kernels.halves import FARTHEST_KEY, HALF, own_list, pair_rows
from sparsekit.kernels.softmax import Softmax
from sparsekit.plan import FLAG_BITS, RULE, BlockPlan, upload

__all__ = ["attend_hopper", "compile_form", "covers"]

BLOCK_Q = 128
BLOCK_KV = (32, 64, 128)
HEAD_SIZES = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
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
LOG2E = 1.4426950408889634

_Pair = tuple["Tensor | None", "Tensor | None"]
MERGE_ROWS = 32
FARTHEST = 1 << (31 - FLAG_BITS)
ITEMS_A_PROGRAM = 32
COLUMNS_A_PROGRAM = 64
WORK_BITS = 24  # of a sort key: steps of an item; its section stands above


def covers(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool) -> str:
    """Why this call must go to the portable kernel, in one clause; "" where the Hopper form runs it.

    On the host, without a sync. Takes what `attend` has already checked. Single columns, LSE, sink logits, soft-cap,
    padding and chunks are covered.
    """
    if q.device.type != "cuda" or _capability(q.device.index) != (9, 0):
        return "needs a CUDA device of compute capability 9.0"
    missing = gluon_missing()
    if missing:
        return missing
    return _form_missing(q, k, v, plan, softmax)


def _form_missing(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> str:
    """The part of `covers` that looks at the call, not at the machine."""
    key = ("hopper covers", q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), softmax.scale > 0)
    reason = plan.memo.get(key)
    if reason is None:
        reason = plan.memo[key] = _shape_missing(q, k, v, plan, softmax)
    if not reason and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return "q, k or v not on a 16-byte boundary, as TMA wants them"
    return str(reason)


def _shape_missing(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> str:
    if q.dtype not in DTYPES:
        return f"dtype {str(q.dtype).removeprefix('torch.')}: float16 or bfloat16"
    if q.shape[3] not in HEAD_SIZES:
        return f"head size {q.shape[3]}: one of {', '.join(map(str, HEAD_SIZES))}"
    if plan.ranked is not None:
        return "ranked keys with an early stop"
    g = plan.geometry
    halves = (g.block_q, g.block_kv) == (HALF, HALF) and plan.rule is None and g.kv_len < FARTHEST_KEY
    if not halves and (g.block_q != BLOCK_Q or g.block_kv not in BLOCK_KV):
        allowed = f"128 x {', '.join(map(str, BLOCK_KV))}"
        return f"tile {g.block_q} x {g.block_kv}: {allowed}; 64 x 64 without a token rule, below {FARTHEST_KEY} keys"
    if plan.row_ptr is not None and plan.row_ptr.dtype != torch.int32:
        return f"row_ptr {str(plan.row_ptr.dtype).removeprefix('torch.')}: int32"
    if g.kv_len >= FARTHEST:
        return f"{g.kv_len} keys: fewer than {FARTHEST}"
    if not softmax.scale > 0:
        return f"softmax scale {softmax.scale}: above 0"
    for name, x in (("q", q), ("k", k), ("v", v)):
        outer = zip(x.stride()[:3], x.shape[:3], strict=True)
        if x.stride(3) != 1 or any(n > 1 and (s % 8 or s <= 0) for s, n in outer):
            return f"{name} with strides {x.stride()}: TMA wants the last one 1 and the others multiples of 8"
    return ""


@lru_cache(maxsize=16)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def _processors(device: int | None) -> int:
    return H100_SMS if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("sparsekit.kernels.hopper_kernel"), ""
    except (ImportError, AttributeError) as error:
        return None, f"needs Gluon as in Triton >= 3.6 ({type(error).__name__}: {str(error).splitlines()[0]})"


def gluon_missing() -> str:
    """Why the device code cannot be loaded here, or ""."""
    return _load()[1]


@lru_cache(maxsize=1)
def _driver() -> Any:
    """Triton's driver, whose way to the current stream is torch's own, without 5 us of wrapping."""
    from triton.runtime import driver

    return driver.active


def _device_code() -> Any:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def attend_hopper(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pairs of `plan`, for calls that `covers` has no word against.

    Args:
        q: (B, H, Q, D). k, v: (B, G, K, D), float16 or bfloat16, laid out (B, H, Q, D) or (B, Q, H, D); never copied.

    Returns:
        out (B, H, Q, D), laid out as (B, Q, H, D), and lse (B, H, Q) float32 where asked for.
    """
    if q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return attend_hopper(q, k, v, plan, softmax, return_lse)
    sinks = softmax.sink_logits
    stream = _driver().get_current_stream(q.device.index)
    key = (
        "hopper launches", q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), softmax.scale,
        softmax.softcap, None if sinks is None else sinks.dtype, return_lse, stream,
    )  # fmt: skip
    launches = plan.memo.get(key)
    if launches is None:
        launches = plan.memo[key] = _prepare(q, k, v, plan, softmax, return_lse, stream)
    batch, heads, q_len, dim = q.shape
    padded = launches.padded
    out = (q.new_zeros if padded else q.new_empty)((batch, q_len, heads, dim)).transpose(1, 2)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32) if return_lse else None
    if padded and lse is not None:
        lse.fill_(float("-inf"))
    pool = _pool(k, v, plan) if launches.columns else (None, None)
    for launch in launches.launches:
        launch.run(q, k, v, out, lse, pool, sinks, stream)
    return out, lse


# ---- the work list


@dataclass(frozen=True)
class _Work:
    """One launch: the samples that share their last valid key, where the K and V descriptors end.

    items: int32 (n, 8), see hopper_kernel.py. entries: what they list. merges: int32 (slots, 4), see `merge` there.
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


def _works(plan: BlockPlan, q: Tensor, k: Tensor) -> tuple[_Work, ...]:
    batch, heads, _, dim = q.shape
    step = _step_keys(dim)
    slots = _workspace_slots(plan, q, k, step)
    key = ("hopper", q.device, heads, k.shape[1], step, slots)
    works = plan.memo.get(key)
    if works is None:
        g = plan.geometry
        ends = sorted({end for end, span in zip(g.kv_end, g.spans, strict=True) if span.q_end > span.q_first})
        groups = [tuple(b for b in range(batch) if g.kv_end[b] == end) for end in ends]
        entries = own_list(plan, q.device) if _halves(plan) else plan.entries
        works = tuple(
            _make_work(plan, entries, samples, end, heads, heads // k.shape[1], step, slots, q.device)
            for samples, end in zip(groups, ends, strict=True)
        )
        plan.memo[key] = works
    return works


def _workspace_slots(plan: BlockPlan, q: Tensor, k: Tensor, step: int) -> int:
    """Partial results (128 rows each) a launch may write: 0 where no row is long against all the work.

    Decided by what the host knows: the longest row there can be, against the entries listed.
    """
    batch, heads, _, dim = q.shape
    key = ("hopper slots", batch, heads, k.shape[1], dim, step)
    if key not in plan.memo:
        g = plan.geometry
        longest = -(-max(span.q_end for span in g.spans) // step)
        if plan.entries is None:
            total = heads * sum(int(plan._causal_tiles(s).sum()) for s in range(plan.samples))
            total = total * (batch // plan.samples) * plan.block_kv * plan.block_q // (step * BLOCK_Q)
        else:
            shared = batch * heads // (plan.samples * plan.heads)
            total = plan.entries.numel() * shared * plan.block_kv // step
        budget = max(int(WORKSPACE_SHARE * 2 * (q.nbytes + k.nbytes)), WORKSPACE_BYTES)
        wanted = (
            not _halves(plan)
            and longest >= SPLIT_FROM_STEPS
            and longest * _processors(q.device.index) > LONG_SHARE * total
        )
        plan.memo[key] = min(budget // (BLOCK_Q * (dim + 1) * 4), 4 * _processors(q.device.index)) if wanted else 0
    return int(plan.memo[key])


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


@lru_cache(maxsize=8)
def _grid(
    g: Geometry, samples: tuple[int, ...], shared: bool, plan_heads: int, heads: int, group: int, step: int,
    device: torch.device,
) -> _Grid:  # fmt: skip
    """The grid of `samples`; `shared`: one plan sample serves them all. Kept for plans that are made anew each call."""
    code, rows = _device_code(), g.rows
    spans = [(g.kv_start[b], g.spans[b].q_first, g.spans[b].q_end, b, 0 if shared else b) for b in samples]
    there = upload(torch.tensor(spans, dtype=torch.int32), device)
    kv_start, q_first, q_end, sample, plan_sample = there[:, :, None, None].unbind(1)  # (n, 1, 1) each
    row = torch.arange(rows, device=device, dtype=torch.int32)
    head = torch.arange(heads, device=device, dtype=torch.int32)[:, None]
    start = (q_first // BLOCK_Q + row) * BLOCK_Q
    low, high = (q_first - start).clamp(0, BLOCK_Q), (q_end - start).clamp(0, BLOCK_Q)
    dead = high <= low
    steps = torch.where(dead, 1, (start + high + (step - 1)) // step)
    by_bounds = int(code.DENSE.value) | BLOCK_Q // step << int(code.DIAGONAL_SHIFT.value)
    tile = low | high << 8
    kind = tile | torch.where(dead, by_bounds | int(code.EMPTY.value), by_bounds)
    plan_row = (plan_sample * plan_heads + head // (heads // plan_heads)) * rows + row
    shape = (len(samples), heads, rows)
    fields = [
        start + kv_start - g.q_offset, sample * heads + head, torch.where(dead, 0, steps - 1), steps, kv_start, kind,
        torch.full_like(row, -1), plan_row,
    ]  # fmt: skip
    items = torch.stack([x.expand(shape) for x in fields], -1).view(-1, len(fields)).to(torch.int32)
    at_once = KEY_HEADS_AT_ONCE if plan_heads == 1 else KEY_HEADS_AT_ONCE_LISTED
    section = (items[:, 1] // (group * at_once)).clamp(max=120) + 1
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
    device: torch.device,
) -> _Work:
    geometry = plan.geometry.with_tile(BLOCK_Q, plan.block_kv)
    grid = _grid(geometry, samples, plan.samples == 1, plan.heads, heads, group, step, device)
    section = grid.section
    if plan.row_ptr is None:
        items, work = grid.items, grid.dense_steps
    elif _halves(plan):
        assert entries is not None
        items, work = pair_rows(plan, grid.items, grid.rows, entries, samples, heads, step)
        section = section.repeat(len(items) // len(section))
    else:
        items, work = _listed(plan, grid, step)
    processors = _processors(device.index)
    order = torch.sort(_sort_keys(work, section, processors), stable=True).indices
    items = items[order]
    merges = None
    if slots:
        work = work[order]
        items, merges = _split(items, work, slots, plan.block_kv, step, processors)
    return _Work(items, entries, merges, slots, kv_end, min(len(items), processors))


def _listed(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    """(items, steps of each) of a plan with lists. On a card one launch: a dynamic plan is made anew in each layer."""
    return _listed_on_card(plan, grid, step) if grid.items.is_cuda else _listed_by_torch(plan, grid, step)


def _listed_on_card(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    from sparsekit.kernels.select_kernel import launch

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
    options = {"STEP": step, "BLOCK_KV": plan.block_kv, "PER": ITEMS_A_PROGRAM, "WORDS": 32, "num_warps": 4}
    launch(_device_code().list_items, -(-len(items) // ITEMS_A_PROGRAM), args, options)
    return items, work


def _listed_by_torch(plan: BlockPlan, grid: _Grid, step: int) -> tuple[Tensor, Tensor]:
    """The same with torch ops: what `list_items` is tested against."""
    assert plan.row_ptr is not None and plan.entries is not None
    code, parts = _device_code(), _parts(plan, step)
    begin = plan.row_ptr[:-1][grid.rows]
    count = (plan.row_ptr[1:] - plan.row_ptr[:-1])[grid.rows]
    kind = grid.tile
    if parts > 1:
        kind = kind | (-count & (parts - 1)) << int(code.MISSING_SHIFT.value)
        count = (count + (parts - 1)) // parts
    elif plan.rule is not None and plan.entries.numel():
        narrow = _only_sinks(plan, grid, begin, count, int(code.NARROW_KEYS.value))
        kind = kind | narrow * int(code.NARROW.value)
        begin, count = begin + narrow, count - narrow
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
        count = count | columns << int(code.COLUMN_SHIFT.value)
    # Rows that keep nothing stay as the grid has them, dense by bounds, with one step that is masked whole.
    empty = grid.dead | (work == 0)
    bounded = empty if dense is None else empty | dense
    items = grid.items.clone()
    items[:, 2] = torch.where(bounded, items[:, 2], begin)
    items[:, 2].masked_fill_(empty, 0)
    items[:, 3] = torch.where(empty, 1, count)
    items[:, 5] = torch.where(bounded, items[:, 5], kind) | empty * int(code.EMPTY.value)
    return items, torch.where(empty, 1, work)


def _halves(plan: BlockPlan) -> bool:
    """Whether two rows of the plan share an item."""
    return plan.block_q == HALF and plan.row_ptr is not None


def _parts(plan: BlockPlan, step: int) -> int:
    """Entries of a step: 1, or several smaller ones; a plan that is dense everywhere has none."""
    return 1 if plan.row_ptr is None else max(step // plan.block_kv, 1)


def _only_sinks(plan: BlockPlan, grid: _Grid, begin: Tensor, count: Tensor, keys: int) -> Tensor:
    """int32 (n*H*R,): 1 where of the item's first entry the rule keeps nothing but sinks, and no more than `keys`.

    That is what Triangle's and the A-shape's rows look like, one entry in six at a window of 512 tokens.
    """
    assert plan.rule is not None and plan.entries is not None
    rule = plan.rule.expand(plan.samples, plan.heads, 3).reshape(-1, 3)[grid.rows // plan.rows]
    sink, window, dense_from = rule.unbind(1)
    start = grid.items[:, 0] + plan.geometry.q_offset - grid.items[:, 4]
    first = plan.entries[begin.clamp(max=plan.entries.numel() - 1)] == RULE
    few = first & (sink <= keys) & (count > 1)
    return (few & (start - window + 1 >= plan.block_kv) & (start + BLOCK_Q <= dense_from)).to(torch.int32)


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
    from sparsekit.kernels.select_kernel import launch

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
    items: Tensor, work: Tensor, slots: int, block_kv: int, step: int, processors: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Items much longer than a processor's share of the work, cut into pieces of half of that: (items, merges)."""
    code = _device_code()
    split_entry, parts = max(block_kv // step, 1), max(step // block_kv, 1)
    shift = int(code.COLUMN_SHIFT.value)
    count, columns = items[:, 3] & ((1 << shift) - 1), items[:, 3] >> shift
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
    length = torch.where(exists, length | torch.where(final, columns[owner], 0) << shift, 0)
    dense = (kind & int(code.DENSE.value)) != 0
    begin = torch.where(dense, begin - skipped, begin + skipped * parts // split_entry)
    # Only a row's first piece crosses the diagonal and has the sinks, and only its last one lacks entries.
    later = (1 << int(code.DIAGONAL_SHIFT.value)) - 1 | 3 << int(code.MISSING_SHIFT.value)
    kind = torch.where(nth > 0, kind & later, kind)
    kind = torch.where(final, kind, kind & ~(3 << int(code.MISSING_SHIFT.value)))
    slot = torch.where(many & exists, first_slot[owner] + nth, -1)
    pieced = torch.stack([row, sample_head, begin, length, kv_start, kind, slot, plan_row], 1).to(torch.int32)

    merges = torch.zeros(slots + 1, 4, dtype=torch.int32, device=items.device)
    target = torch.where(first_slot >= 0, first_slot, slots)  # the extra row takes what is not split
    merges[target] = torch.stack([items[:, 0], items[:, 1], items[:, 5] & 0xFFFF, pieces], 1).to(torch.int32)
    return pieced, merges[:slots]


# ---- the launch


@dataclass(frozen=True)
class _Launches:
    launches: tuple[_Launch, ...]
    padded: bool  # some row of q is no query of the plan
    columns: bool


@dataclass(frozen=True)
class _Launch:
    """One launch with all that stays the same from call to call: a call puts its own tensors in.

    arguments: the kernel's, those of the call None. boxes: descriptor contents of q, k, v, out, the two pools, and
    again of k and v in smaller boxes.
    """

    kernel: Any
    work: _Work
    arguments: tuple[Any, ...]
    descriptor: type
    boxes: tuple[dict[str, Any] | None, ...]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, pool: _Pair, sinks: Tensor | None,
        stream: int,
    ) -> None:  # fmt: skip
        arguments, partial = self.fill(q, k, v, out, lse, pool, sinks)
        self.kernel[(self.work.blocks, 1, 1)](*arguments, stream=stream)
        if self.work.slots:
            _, heads, q_len, dim = out.shape
            _device_code().merge[(self.work.slots, BLOCK_Q // MERGE_ROWS)](
                self.work.merges, *partial, out, lse, sinks, heads, q_len, *out.stride()[:3],
                D=dim, BM=MERGE_ROWS, LSE=lse is not None, SINKS=sinks is not None,
            )  # fmt: skip

    def fill(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, pool: _Pair, sinks: Tensor | None
    ) -> tuple[list[Any], _Pair]:  # fmt: skip
        """The call's arguments, and its workspace."""
        arguments = list(self.arguments)
        for i, (box, x) in enumerate(zip(self.boxes, (q, k, v, out, *pool, k, v), strict=True)):
            if box is not None:
                # Past the constructor, whose checks cost 5 us each and were made by `covers`.
                made: Any = object.__new__(self.descriptor)
                made.__dict__.update(box, base=x)
                arguments[i] = made
        partial = partial_lse = None
        if self.work.slots:
            partial = q.new_empty((self.work.slots, BLOCK_Q, q.shape[3]), dtype=torch.float32)
            partial_lse = q.new_empty((self.work.slots, BLOCK_Q), dtype=torch.float32)
        arguments[OUT_ARGUMENT : OUT_ARGUMENT + 5] = (out, lse, sinks, partial, partial_lse)
        return arguments, (partial, partial_lse)


OUT_ARGUMENT = 12  # place of p_out, which p_lse, p_sinks, p_part and p_part_lse follow
_FORMS: dict[tuple[Any, ...], Any] = {}


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool, stream: int = 0
) -> _Launches:
    """Work lists, descriptor contents, scalars and compiled kernels of such a call."""
    g = plan.geometry
    columns = plan.tokens is not None and plan.token_bits is not None
    launches = tuple(_launch(q, k, v, plan, softmax, return_lse, work, stream) for work in _works(plan, q, k))
    return _Launches(launches, any(span.q_end - span.q_first != g.q_len for span in g.spans), columns)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool, work: _Work, stream: int
) -> _Launch:
    batch, heads, q_len, dim = q.shape
    key_heads, g, half = k.shape[1], plan.geometry, BLOCK_Q // 2
    step = _step_keys(dim)
    parts = _parts(plan, step)
    narrow = plan.rule is not None and parts == 1
    rule, cap, sinks = plan.rule, softmax.softcap, softmax.sink_logits
    width, pool_heads = 0, heads if plan.heads == heads else key_heads
    boxes = [
        _box(q.shape, q.stride(), q_len, half, q.dtype),
        _box(k.shape, k.stride(), work.kv_end, step, q.dtype),
        _box(v.shape, v.stride(), work.kv_end, step, q.dtype),
        _box(q.shape, (q_len * heads * dim, dim, heads * dim, 1), q_len, half, q.dtype),
        None,
        None,
        None,
        None,
    ]
    if parts > 1 or narrow:
        code = _device_code()
        rows = plan.block_kv if parts > 1 else int(code.NARROW_KEYS.value)
        for i, x in enumerate((k, v)):
            boxes[6 + i] = _box(x.shape, x.stride(), work.kv_end, rows, q.dtype, int(code.CHUNK.value))
    columns = plan.tokens is not None and plan.token_bits is not None
    if columns:
        assert plan.tokens is not None
        width = plan.tokens.shape[2]
        shape = (batch, pool_heads, width, dim)
        boxes[4] = boxes[5] = _box(shape, (pool_heads * width * dim, width * dim, dim, 1), width, step, q.dtype)
    rule_sample = rule_head = 0
    if rule is not None:
        rule_sample = rule.shape[1] * 3 if rule.shape[0] > 1 else 0
        rule_head = 3 if rule.shape[1] > 1 else 0
    early = any(
        span.q_first // BLOCK_Q * BLOCK_Q + start < g.q_offset
        for span, start in zip(g.spans, g.kv_start, strict=True)
        if span.q_end > span.q_first
    )
    halves = _halves(plan)
    stages, q_stages = _buffers(dim, step, halves)
    flags = (
        stages, q_stages, max(plan.block_kv // step, 1), parts, plan.row_ptr is not None,
        rule is not None, cap is not None, return_lse, sinks is not None, columns, work.slots > 0, early, q_stages == 1,
        narrow, halves,
    )  # fmt: skip
    scale = float(softmax.scale)
    arguments = (
        *boxes,
        work.items, work.entries, _counters(q.device, stream), rule, None, None, None, None, None, plan.tokens,
        plan.token_bits,
        scale if cap is None else float(cap), 0.0 if cap is None else 2 * LOG2E * scale / cap,
        len(work.items), heads, heads // key_heads, q_len, g.q_offset, rule_sample, rule_head,
        heads // plan.heads, heads // pool_heads, width, plan.heads * width if plan.samples > 1 else 0,
        *flags,
    )  # fmt: skip
    launch = _Launch(None, work, arguments, _layout(half, dim, q.dtype)[0], tuple(boxes))
    form = (q.device, q.dtype, dim, step, plan.block_kv, None if sinks is None else sinks.dtype, *flags)
    if form not in _FORMS:
        out = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2)
        lse = q.new_empty((1,), dtype=torch.float32) if return_lse else None
        filled, _ = launch.fill(q, k, v, out, lse, (k, v), sinks)
        # Compiled once, then launched directly: Triton's own argument handling costs 40 us more a call.
        # 168 registers x 384 threads fill the register file; `warp_specialize` gives consumers 232, the producer 40.
        _FORMS[form] = _device_code().attention.warmup(*filled, grid=(1,), num_warps=4, maxnreg=168)
    return replace(launch, kernel=_FORMS[form])


def _buffers(dim: int, step: int, halves: bool) -> tuple[int, int]:
    """(K and V buffers each, Q buffers): 64 KiB of K and as much of V, and two tiles of Q; 227 KiB in all.

    At size 256 one tile of Q takes as much, and the result goes where it was; likewise with halves, where a consumer
    that passes a step wants a third buffer.
    """
    if dim == 256:
        return 2, 1
    return (3, 1) if halves and dim == 128 else (2 * (128 // dim) * (128 // step), 2)


def compile_form(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool = False) -> Any:
    """Triton's compiled kernel for such a call, not launched: q, k, v may lie on the CPU where a driver is mocked."""
    return _prepare(q, k, v, plan, softmax, return_lse).launches[0].kernel


@lru_cache(maxsize=64)
def _counters(device: torch.device, stream: int) -> Tensor:
    """Two int32 zeros that the kernel itself puts back to zero; a pair a stream, since launches of two may overlap."""
    return torch.zeros(2, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _layout(rows: int, dim: int, dtype: torch.dtype) -> tuple[type, list[int], Any]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, dim]
    return TensorDescriptor, block, gl.NVMMASharedLayout.get_default_for(block, element)


def _box(
    shape: Sequence[int], strides: Sequence[int], tokens: int, rows: int, dtype: torch.dtype, width: int | None = None
) -> dict[str, Any]:
    """What a TMA descriptor of a tensor (B, heads, N, D) holds: tokens end at `tokens`, boxes are `rows` x `width`."""
    batch, heads, _, dim = shape
    _, block, layout = _layout(rows, width or dim, dtype)
    steps = [s if n > 1 else dim for s, n in zip(strides[:3], shape[:3], strict=True)]
    contents = {"shape": [batch, heads, tokens, dim], "strides": [*steps, 1], "block_shape": block, "layout": layout}
    return {**contents, "padding": "zero", "round_f32_to_tf32": False}


@lru_cache(maxsize=64)
def _key_bounds(g: Geometry, device: torch.device) -> Tensor:
    """int32 (B, 2): kv_start, and the last valid position."""
    bounds = [(start, max(end - start - 1, 0)) for start, end in zip(g.kv_start, g.kv_end, strict=True)]
    return upload(torch.tensor(bounds, dtype=torch.int32), device)


def _pool(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """K and V of the single columns, (B, G or H, T, D): read as tiles by TMA, at the cost of a gather in the kernel.

    Measured on an H100, Triangle + 1024 columns a head at 128K: pool 9.9 ms, gather 10.1 ms in portable Triton.
    """
    from sparsekit.kernels.select_kernel import launch

    assert plan.tokens is not None
    batch, key_heads, kv_len, dim = k.shape
    tokens = plan.tokens.shape[2]
    heads = key_heads if plan.heads in (1, key_heads) else plan.heads
    pool_k, pool_v = (x.new_empty((batch, heads, tokens, dim)) for x in (k, v))
    args = (
        k, v, plan.tokens, _key_bounds(plan.geometry, k.device), pool_k, pool_v, tokens, heads, plan.heads,
        1 if plan.samples > 1 else 0, heads // key_heads, *k.stride()[:3], *v.stride()[:3], kv_len - 1,
        -(-tokens // COLUMNS_A_PROGRAM),
    )  # fmt: skip
    options = {"D": dim, "PER": COLUMNS_A_PROGRAM, "num_warps": 4}
    launch(_device_code().gather_columns, -(-tokens // COLUMNS_A_PROGRAM) * batch * heads, args, options)
    return pool_k, pool_v

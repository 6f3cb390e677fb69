"""The shared kernel's Hopper form: the same plans at the speed of the best dense kernels, on sm_90.

`hopper_kernel.py` is the device code, in Gluon (part of Triton >= 3.6). Here is what it covers, the work list of a plan,
and the launch. Nothing here synchronises with the host.

The work list is made once per plan, on the device, and stays in `plan.memo`: one item a (sample, head, query tile),
heaviest first inside a section of heads whose K and V stay in L2, and items so long that they would decide the finish
before all others. Where even that does not help (the dense last rows of Triangle with few heads, short chunks over a long
cache), those rows are split over keys and merged by their log-sum-exp.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsekit.kernels.softmax import Softmax
from sparsekit.plan import FLAG_BITS, BlockPlan

__all__ = ["attend_hopper", "compile_form", "covers"]

BLOCK_Q = 128
HEAD_SIZES = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
# Key heads worked on at once, so that their K and V stay in L2: worth 3% dense and 15 to 24% on per-head lists (H100).
KEY_HEADS_AT_ONCE = 2
# Rows of fewer steps are not worth a second launch for the merge.
SPLIT_FROM_STEPS = 64
SHORTEST_PIECE = 16
# Workspace of split rows, as a share of q, k, v and out, or this many bytes.
WORKSPACE_SHARE = 0.015
WORKSPACE_BYTES = 8 << 20
H100_SMS = 132
MERGE_ROWS = 32
FARTHEST = 1 << (31 - FLAG_BITS)


def covers(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool) -> str:
    """Why this call must go to the portable kernel, in one clause; "" where the Hopper form runs it. Host only, no sync.

    Takes what `attend` has already checked. Single columns, LSE, sink logits, soft-cap, padding and chunks are covered.
    """
    if q.device.type != "cuda" or _capability(q.device.index) != (9, 0):
        return "needs a CUDA device of compute capability 9.0"
    missing = gluon_missing()
    if missing:
        return missing
    return _form_missing(q, k, v, plan, softmax)


def _form_missing(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> str:
    """The part of `covers` that looks at the call, not at the machine."""
    if q.dtype not in DTYPES:
        return f"dtype {str(q.dtype).removeprefix('torch.')}: float16 or bfloat16"
    if q.shape[3] not in HEAD_SIZES:
        return f"head size {q.shape[3]}: one of {', '.join(map(str, HEAD_SIZES))}"
    g = plan.geometry
    if g.block_q != BLOCK_Q or g.block_kv not in (64, 128):
        return f"tile {g.block_q} x {g.block_kv}: 128 x 64 or 128 x 128"
    if plan.row_ptr is not None and plan.row_ptr.dtype != torch.int32:
        return f"row_ptr {str(plan.row_ptr.dtype).removeprefix('torch.')}: int32"
    if g.kv_len >= FARTHEST:
        return f"{g.kv_len} keys: fewer than {FARTHEST}"
    if not softmax.scale > 0:
        return f"softmax scale {softmax.scale}: above 0"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = x.stride()
        if strides[3] != 1 or x.data_ptr() % 16 or any(
            n > 1 and (s % 8 or s <= 0) for s, n in zip(strides[:3], x.shape[:3], strict=True)
        ):
            return f"{name} with strides {tuple(strides)}: TMA wants the last one 1, others multiples of 8, a 16-byte base"
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
    batch, heads, q_len, dim = q.shape
    padded = _is_padded(plan)
    make = q.new_zeros if padded else q.new_empty
    out = make(batch, q_len, heads, dim).transpose(1, 2)
    lse = None
    if return_lse:
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        if padded:
            lse.fill_(float("-inf"))
    for work in _works(plan, q, k):
        call = _call(q, k, v, out, lse, plan, softmax, work)
        _compiled(call)[(work.blocks, 1, 1)](*call.arguments)
        if work.slots:
            _merge(call, out, lse, softmax, work)
    return out, lse


def _is_padded(plan: BlockPlan) -> bool:
    """Whether some row of q is no query of the plan."""
    if "hopper padded" not in plan.memo:
        g = plan.geometry
        plan.memo["hopper padded"] = any(span.q_end - span.q_first != g.q_len for span in g.spans)
    return bool(plan.memo["hopper padded"])


# ---- the work list


@dataclass(frozen=True)
class _Work:
    """One launch: the samples that share their last valid key, where the K and V descriptors end.

    items: int32 (n, 8), see hopper_kernel.py. merges: int32 (slots, 4), see `merge` there.
    """

    items: Tensor
    merges: Tensor | None
    slots: int
    kv_end: int
    blocks: int


def _step_keys(dim: int, block_kv: int) -> int:
    """Keys of a step. At head size 256 registers and shared memory hold no more than 64."""
    return min(block_kv, 64) if dim == 256 else block_kv


def _works(plan: BlockPlan, q: Tensor, k: Tensor) -> tuple[_Work, ...]:
    batch, heads, _, dim = q.shape
    step = _step_keys(dim, plan.block_kv)
    slots = _workspace_slots(plan, q, k, step)
    key = ("hopper", q.device, heads, k.shape[1], step, slots)
    works = plan.memo.get(key)
    if works is None:
        g = plan.geometry
        ends = sorted({end for end, span in zip(g.kv_end, g.spans, strict=True) if span.q_end > span.q_first})
        groups = [[b for b in range(batch) if g.kv_end[b] == end] for end in ends]
        works = tuple(
            _make_work(plan, samples, end, heads, heads // k.shape[1], step, slots, q.device)
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
            total = heads * sum(int(plan._causal_tiles(s).sum()) for s in range(plan.samples)) * (plan.block_kv // step)
            total *= batch // plan.samples
        else:
            shared = batch * heads // (plan.samples * plan.heads)
            total = plan.entries.numel() * shared * (plan.block_kv // step)
        budget = max(int(WORKSPACE_SHARE * 2 * (q.nbytes + k.nbytes)), WORKSPACE_BYTES)
        wanted = longest >= SPLIT_FROM_STEPS and longest * _processors(q.device.index) > total
        plan.memo[key] = min(budget // (BLOCK_Q * (dim + 1) * 4), 4 * _processors(q.device.index)) if wanted else 0
    return int(plan.memo[key])


def _upload(values: list[Any], device: torch.device) -> Tensor:
    """int32 on `device`, without waiting for it: from pinned memory, since a pageable copy synchronises."""
    host = torch.tensor(values, dtype=torch.int32)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _make_work(
    plan: BlockPlan, samples: list[int], kv_end: int, heads: int, group: int, step: int, slots: int, device: torch.device
) -> _Work:
    code = _device_code()
    g, rows = plan.geometry, plan.rows
    spans = [(g.kv_start[b], g.spans[b].q_first, g.spans[b].q_end, b) for b in samples]
    kv_start, q_first, q_end, sample = _upload(spans, device)[:, :, None].unbind(1)  # (n, 1) each
    first_row = q_first // BLOCK_Q
    start = (first_row + torch.arange(rows, device=device, dtype=torch.int32)) * BLOCK_Q  # (n, R)
    low, high = (q_first - start).clamp(0, BLOCK_Q), (q_end - start).clamp(0, BLOCK_Q)
    live = high > low
    dense_steps = (start + high + (step - 1)) // step  # (n, R)

    split_entry = plan.block_kv // step
    shape = (len(samples), heads, rows)

    def per_head(x: Tensor) -> Tensor:
        """(S * P * R,) of the plan -> (n, H, R)."""
        x = x.view(plan.samples, plan.heads, 1, rows).expand(-1, -1, heads // plan.heads, -1).flatten(1, 2)
        if plan.samples > 1 and len(samples) < plan.samples:
            return x[samples[0] : samples[-1] + 1] if samples[-1] - samples[0] + 1 == len(samples) else x[sample[:, 0]]
        return x.expand(shape)

    diagonal = BLOCK_Q // step
    by_bounds = int(code.DENSE.value) | diagonal << int(code.DIAGONAL_SHIFT.value)
    columns = None
    if plan.row_ptr is None:
        count = dense_steps[:, None].expand(shape)
        begin = count - 1
        kind = torch.full_like(count, by_bounds)
    else:
        count = per_head(plan.row_ptr.diff() * split_entry)
        begin = per_head(plan.row_ptr[:-1])
        kind = torch.zeros_like(count)
        if plan.dense_rows is not None:
            dense = per_head(plan.dense_rows)
            count = torch.where(dense, dense_steps[:, None], count)
            begin = torch.where(dense, dense_steps[:, None] - 1, begin)
            kind = torch.where(dense, by_bounds, kind)
        if plan.token_bits is not None:
            columns = per_head(_column_steps(plan.token_bits, step))
    work = count if columns is None else count + columns
    empty = ~(live[:, None] & (work > 0))
    count, begin = torch.where(empty, 1, count), torch.where(empty, 0, begin)
    kind = torch.where(empty, by_bounds | int(code.EMPTY.value), kind) | (low | high << 8)[:, None]
    work = torch.where(empty, 1, work)
    if columns is not None:
        count = count | torch.where(empty, 0, columns) << int(code.COLUMN_SHIFT.value)

    head = torch.arange(heads, device=device, dtype=torch.int32)[:, None]
    plan_sample = sample if plan.samples > 1 else torch.zeros_like(sample)
    plan_row = (plan_sample[:, None] * plan.heads + head // (heads // plan.heads)) * rows
    row = (start + kv_start - g.q_offset)[:, None]
    fields = [row, sample[:, None] * heads + head, begin, count, kv_start[:, None], kind, torch.full_like(head, -1)]
    fields.append(plan_row + torch.arange(rows, device=device, dtype=torch.int32))
    items = torch.stack([x.expand(shape) for x in fields], -1).view(-1, len(fields))
    work = work.reshape(-1)
    processors = _processors(device.index)
    items, work = _in_order(items, work, heads, group, processors)
    if slots:
        items, merges = _split(items, work, slots, split_entry, processors)
    else:
        merges = None
    return _Work(items.contiguous(), merges, slots, kv_end, min(len(items), processors))


def _column_steps(bits: Tensor, step: int) -> Tensor:
    """int32 (rows,): steps of single columns that a row runs, up to the last column it still needs."""
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int32)
    last_word = torch.where(bits != 0, place, 0).amax(1)
    return (last_word * 32 + (step - 1)) // step


def _in_order(items: Tensor, work: Tensor, heads: int, group: int, processors: int) -> tuple[Tensor, Tensor]:
    section = (items[:, 1] // (group * KEY_HEADS_AT_ONCE)).clamp(max=120) + 1
    section = torch.where(work * (4 * processors) > work.sum(), 0, section)
    order = torch.sort(section * (1 << 24) - work.clamp(max=(1 << 24) - 1), stable=True).indices
    return items[order].to(torch.int32), work[order]


def _split(
    items: Tensor, work: Tensor, slots: int, split_entry: int, processors: int
) -> tuple[Tensor, Tensor]:
    """Items longer than a processor's share of the work, cut into pieces of half of that: (items, merges)."""
    code = _device_code()
    shift = int(code.COLUMN_SHIFT.value)
    count, columns = items[:, 3] & ((1 << shift) - 1), items[:, 3] >> shift
    share = work.sum() // (2 * processors) + 1
    long = torch.where(work > 2 * share, work, 0).sum() * 2 // slots
    piece = torch.maximum(share, long).clamp(min=SHORTEST_PIECE) // split_entry * split_entry + split_entry
    pieces = torch.where(count > 2 * piece, (count + piece - 1) // piece, 1)
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
    begin = torch.where(dense, begin - skipped, begin + skipped // split_entry)
    kind = torch.where(dense & (nth > 0), kind & ((1 << int(code.DIAGONAL_SHIFT.value)) - 1), kind)
    slot = torch.where(many & exists, first_slot[owner] + nth, -1)
    pieced = torch.stack([row, sample_head, begin, length, kv_start, kind, slot, plan_row], 1).to(torch.int32)

    merges = torch.zeros(slots + 1, 4, dtype=torch.int32, device=items.device)
    target = torch.where(first_slot >= 0, first_slot, slots)  # the extra row takes what is not split
    merges[target] = torch.stack([items[:, 0], items[:, 1], items[:, 5] & 0xFFFF, pieces], 1).to(torch.int32)
    return pieced, merges[:slots]


# ---- the launch


@dataclass(frozen=True)
class _Call:
    """Kernel arguments, and the form of the kernel that they need."""

    form: tuple[Any, ...]
    arguments: tuple[Any, ...]
    partial: Tensor | None
    partial_lse: Tensor | None


_FORMS: dict[tuple[Any, ...], Any] = {}


def _call(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, plan: BlockPlan, softmax: Softmax, work: _Work
) -> _Call:
    batch, heads, q_len, dim = q.shape
    key_heads = k.shape[1]
    step = _step_keys(dim, plan.block_kv)
    listed, rule, sinks, cap = plan.entries, plan.rule, softmax.sink_logits, softmax.softcap
    columns = plan.tokens is not None and plan.token_bits is not None
    partial = partial_lse = pool_k = pool_v = None
    if work.slots:
        partial = q.new_empty(work.slots, BLOCK_Q, dim, dtype=torch.float32)
        partial_lse = q.new_empty(work.slots, BLOCK_Q, dtype=torch.float32)
    width = 0
    if columns:
        assert plan.tokens is not None
        width = plan.tokens.shape[2]
        pool_k, pool_v = (_descriptor(x, width, step) for x in _pool(k, v, plan))
    half = BLOCK_Q // 2
    pool_heads = heads if plan.heads == heads else key_heads
    rule_sample = rule_head = 0
    if rule is not None:
        rule_sample = rule.shape[1] * 3 if rule.shape[0] > 1 else 0
        rule_head = 3 if rule.shape[1] > 1 else 0
    flags = (
        _stages(dim, step), 1 if dim == 256 else 2, plan.block_kv // step,
        listed is not None, rule is not None, cap is not None, lse is not None, sinks is not None, columns,
        work.slots > 0, dim == 256,
    )  # fmt: skip
    scale = float(softmax.scale)
    arguments = (
        _descriptor(q, q_len, half), _descriptor(k, work.kv_end, step), _descriptor(v, work.kv_end, step),
        _descriptor(out, q_len, half), pool_k, pool_v,
        work.items, listed, _counters(plan, q.device), rule, lse, sinks, partial, partial_lse, plan.tokens, plan.token_bits,
        scale if cap is None else float(cap), 0.0 if cap is None else 2 * 1.4426950408889634 * scale / cap,
        len(work.items), heads, heads // key_heads, q_len, plan.geometry.q_offset, rule_sample, rule_head,
        heads // plan.heads, heads // pool_heads, width, plan.heads * width if plan.samples > 1 else 0,
        *flags,
    )  # fmt: skip
    form = (q.device, q.dtype, dim, step, None if sinks is None else sinks.dtype, *flags)
    return _Call(form, arguments, partial, partial_lse)


def _stages(dim: int, step: int) -> int:
    """K and V buffers each: 64 KiB of K and as much of V at every size but 256, whose q takes more (227 KiB in all)."""
    return 2 if dim == 256 else 2 * (128 // dim) * (128 // step)


def _compiled(call: _Call) -> Any:
    """The compiled kernel of this form. Launched directly: Triton's own argument handling costs 40 us more a call."""
    kernel = _FORMS.get(call.form)
    if kernel is None:
        # 168 registers x 384 threads fill the register file; `warp_specialize` then gives consumers 232 and the producer 32.
        kernel = _device_code().attention.warmup(*call.arguments, grid=(1,), num_warps=4, maxnreg=168)
        _FORMS[call.form] = kernel
    return kernel


def compile_form(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool = False
) -> Any:
    """Triton's compiled kernel for such a call, without a launch: q, k, v may lie on the CPU where a driver is mocked."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    return _compiled(_call(q, k, v, out, lse, plan, softmax, _works(plan, q, k)[0]))


def _counters(plan: BlockPlan, device: torch.device) -> Tensor:
    """Two int32 zeros that the kernel itself puts back to zero; one pair a stream, since launches of two may overlap."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = ("hopper counters", device, stream)
    counters = plan.memo.get(key)
    if counters is None:
        counters = plan.memo[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return counters


@lru_cache(maxsize=64)
def _layout(rows: int, dim: int, dtype: torch.dtype) -> tuple[type, list[int], Any]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, dim]
    return TensorDescriptor, block, gl.NVMMASharedLayout.get_default_for(block, element)


def _descriptor(x: Tensor, tokens: int, rows: int) -> Any:
    """TMA descriptor of x (B, heads, N, D) whose token dimension ends at `tokens`, in boxes of `rows` tokens.

    Filled in past the constructor, whose checks cost 5 us each and were made by `covers`.
    """
    batch, heads, _, dim = x.shape
    kind, block, layout = _layout(rows, dim, x.dtype)
    strides = [s if n > 1 else dim for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[3] = 1
    made = object.__new__(kind)
    made.__dict__.update(
        base=x, shape=[batch, heads, tokens, dim], strides=strides, block_shape=block, layout=layout, padding="zero",
        round_f32_to_tf32=False,
    )  # fmt: skip
    return made


def _pool(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """K and V of the single columns, (B, G or H, T, D): read as tiles by TMA, at the cost of a gather in the kernel.

    Measured on an H100, Triangle + 1024 columns a head at 128K: pool 9.9 ms, gather 10.1 ms (portable prototype).
    """
    key = ("hopper pool", k.device, k.shape[1])
    index = plan.memo.get(key)
    if index is None:
        assert plan.tokens is not None
        g, device = plan.geometry, k.device
        bounds = [(start, max(end - start - 1, 0)) for start, end in zip(g.kv_start, g.kv_end, strict=True)]
        kv_start, last = _upload(bounds, device)[:, :, None, None].unbind(1)
        tokens = (torch.minimum(plan.tokens, last) + kv_start).clamp(max=g.kv_len - 1).long()
        batch = torch.arange(g.batch, device=device)[:, None, None]
        per_key_head = plan.heads in (1, k.shape[1])
        heads = torch.arange(k.shape[1] if per_key_head else plan.heads, device=device)[:, None]
        index = (batch, heads if per_key_head else heads // (plan.heads // k.shape[1]), tokens)
        plan.memo[key] = index
    return k[index], v[index]


def _merge(call: _Call, out: Tensor, lse: Tensor | None, softmax: Softmax, work: _Work) -> None:
    batch, heads, q_len, dim = out.shape
    sinks = softmax.sink_logits
    _device_code().merge[(work.slots, BLOCK_Q // MERGE_ROWS)](
        work.merges, call.partial, call.partial_lse, out, lse, sinks, heads, q_len, *out.stride()[:3],
        D=dim, BM=MERGE_ROWS, LSE=lse is not None, SINKS=sinks is not None,
    )  # fmt: skip

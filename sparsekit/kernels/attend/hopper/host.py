"""The shared kernel's Hopper form: the same plans at the speed of the best dense kernels, on sm_90.

`device.py` is the device code, in Gluon (part of Triton >= 3.6). Here is what it covers, and the
launch. Nothing here synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import MAX_TOKENS, Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels.attend.covers import DTYPES, sixteen_bits
from sparsekit.kernels.attend.hopper.descriptors import box, layout, put_descriptors
from sparsekit.kernels.attend.hopper.halves import FARTHEST_KEY
from sparsekit.kernels.attend.hopper.items import AGAIN, FIXED, HALF, NARROW_KEYS, RUNNING
from sparsekit.kernels.attend.hopper.load import _device_code, gluon_missing
from sparsekit.kernels.attend.hopper.worklist import (
    BLOCK_Q,
    _halves,
    _merge,
    _Pair,
    _parts,
    _step_keys,
    _Work,
    _works,
    _workspace,
    _workspace_slots,
)
from sparsekit.kernels.device import capability_of
from sparsekit.plan import BlockPlan, key_bounds
from sparsekit.plan.memo import COVERED, HOPPER_LAUNCHES

__all__ = ["attend_corrected", "attend_hopper", "compile_form", "covers", "missing", "tile"]

BLOCK_KV = (32, 64, 128)
FARTHEST_STEP = 4096  # of queries: an item counts its steps across the diagonal in 13 bits
PAGES = (16, 32, 64, 128, 256)
COLUMNS_A_PROGRAM = 64
FIXED_FROM = 1 << 15  # tiles of 128 x 128 of all heads: from there on a second launch takes less than it saves


def missing(device: torch.device) -> str:
    """Why the Hopper form cannot run on `device`, or ""."""
    if device.type != "cuda":
        return "it is not a CUDA device"
    if torch.version.cuda is None:
        return "it needs an NVIDIA device of compute capability 9.0"
    major, minor = capability_of(device)
    if (major, minor) != (9, 0):
        return f"it needs compute capability 9.0, this device has {major}.{minor}"
    return gluon_missing()


def tile(q: Tensor | None, narrow: bool) -> tuple[int, int]:
    """128 x 128; for what keeps less in narrow rows 64 x 64, of which two rows share what they read."""
    halves = narrow and q is not None and q.dtype in DTYPES and q.shape[3] in (64, 128)
    return (HALF, HALF) if halves else (BLOCK_Q, 128)


def covers(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> list[str]:
    """Why this call must go to another implementation, each reason in a clause; none where the Hopper form runs it.

    On the host, without a sync. Takes what `attend` has already checked. Single columns, LSE, sink logits, soft-cap,
    padding, chunks and pages are covered.
    """
    k, v, table = keys
    key = (COVERED, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), table is None)
    reasons: list[str] | None = plan.memo.get(key)
    if reasons is None:
        reasons = plan.memo[key] = list(_against(q, keys, plan))
    if (q.data_ptr() | k.data_ptr() | v.data_ptr() | (0 if out is None else out.data_ptr())) % 16:
        reasons = [*reasons, "q, k, v or out not on a 16-byte boundary, as TMA wants them"]
    if out is not None and not _rows_first(out):
        reasons = [*reasons, f"out with strides {out.stride()}: (B, Q, H, D) without gaps"]
    return reasons


def _rows_first(out: Tensor) -> bool:
    """Whether (B, H, Q, D) is laid out (B, Q, H, D), as the device code's stores have it."""
    _, heads, tokens, dim = out.shape
    wanted = (tokens * heads * dim, dim, heads * dim, 1)
    return all(n == 1 or s == want for n, s, want in zip(out.shape, out.stride(), wanted, strict=True))


def _against(q: Tensor, keys: Keys, plan: BlockPlan) -> Iterator[str]:
    yield from sixteen_bits(q)
    if plan.ranked is not None:
        yield "ranked keys with an early stop"
    g = plan.geometry
    halves = (g.block_q, g.block_kv) == (HALF, HALF) and plan.rule is None and g.kv_len < FARTHEST_KEY
    if plan.ranked is None and not halves and (g.block_q != BLOCK_Q or g.block_kv not in BLOCK_KV):
        allowed = f"128 x {', '.join(map(str, BLOCK_KV))}"
        yield f"tile {g.block_q} x {g.block_kv}: {allowed}; 64 x 64 without a token rule, below {FARTHEST_KEY} keys"
    if plan.row_ptr is not None and plan.row_ptr.dtype != torch.int32:
        yield f"row_ptr {str(plan.row_ptr.dtype).removeprefix('torch.')}: int32"
    if g.q_step > FARTHEST_STEP:
        yield f"every {g.q_step}th query: at most every {FARTHEST_STEP}th"
    if g.kv_len >= MAX_TOKENS:
        yield f"{g.kv_len} keys: fewer than {MAX_TOKENS}"
    if keys.page and keys.page not in PAGES:
        yield f"pages of {keys.page} tokens: one of {', '.join(map(str, PAGES))}"
    if keys.page and plan.row_ptr is not None and not plan.on_grid:
        yield "tiles that start anywhere in pages: a box of TMA ends with its page"
    for name, x in (("q", q), ("k", keys.k), ("v", keys.v)):
        outer = zip(x.stride()[:3], x.shape[:3], strict=True)
        if x.stride(3) != 1 or any(n > 1 and (s % 8 or s <= 0) for s, n in outer):
            yield f"{name} with strides {x.stride()}: TMA wants the last one 1 and the others multiples of 8"


@lru_cache(maxsize=1)
def _driver() -> Any:
    """Triton's driver, whose way to the current stream is torch's own, without 5 us of wrapping."""
    from triton.runtime import driver

    return driver.active


def attend_hopper(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pairs of `plan`, for calls that `covers` has no word against.

    Args:
        q: (B, H, Q, D), float16 or bfloat16, laid out (B, H, Q, D) or (B, Q, H, D). keys: likewise; never copied.
        out: (B, H, Q, D), laid out (B, Q, H, D).

    Returns:
        `out`, or a new (B, H, Q, D), laid out as (B, Q, H, D), and lse (B, H, Q) float32 where asked for.
    """
    pack = _packed_heads(q, keys, plan, softmax)
    if pack == 1:
        return _run(q, keys, plan, softmax, return_lse, out)
    made, lse = _run(_pack(q, pack), keys, plan, softmax, return_lse, None, pack)
    made = _unpack(made, pack)
    lse = None if lse is None else _unpack(lse[..., None], pack)[..., 0]
    return (made if out is None else out.copy_(made)), lse


def attend_corrected(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, dense: Tensor, out: Tensor | None = None
) -> Tensor | None:
    """`attend_hopper` of a plan that is corrected, in one pass over the output; None where blocks of rows, or rows that
    are split over keys, do not allow it.

    Args:
        dense: (B, H, M, D), what `plan.anchors` gives.
    """
    every, dim = plan.correct_every, q.shape[3]
    if HALF % every or dim not in (64, 128) or _halves(plan) or plan.row_ptr is None:
        return None
    if _workspace_slots(plan, q, keys.k, _step_keys(dim), 1):
        return None
    return _run(q, keys, plan, softmax, False, out, dense=dense.contiguous())[0]


def _packed_heads(q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax) -> int:
    """Query heads of a key head that lie beside one another as rows of a tile. Those of queries with a step do, unless
    each has a sink logit of its own: 128 rows of 4 heads span a quarter of the positions, and waste that much less on
    the diagonal."""
    packs = plan.geometry.q_step > 1 and softmax.sink_logits is None
    return q.shape[1] // keys.k.shape[1] if packs else 1


def _pack(q: Tensor, pack: int) -> Tensor:
    """(B, H, M, D) -> (B, H / pack, M * pack, D), laid out (B, rows, heads, D)."""
    rows = q.unflatten(1, (-1, pack)).permute(0, 3, 2, 1, 4)
    return rows.reshape(q.shape[0], q.shape[2] * pack, -1, q.shape[3]).transpose(1, 2)


def _unpack(packed: Tensor, pack: int) -> Tensor:
    """The way back, as a copy."""
    return packed.unflatten(2, (-1, pack)).transpose(2, 3).flatten(1, 2)


def _run(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None, pack: int = 1,
    dense: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if q.device.index != torch.cuda.current_device():  # launches go to the current device
        with torch.cuda.device(q.device):
            return _run(q, keys, plan, softmax, return_lse, out, pack, dense)
    (k, v, table), sinks = keys, softmax.sink_logits
    stream = _driver().get_current_stream(q.device.index)
    key = (
        HOPPER_LAUNCHES, q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), softmax.scale,
        softmax.softcap, None if sinks is None else sinks.dtype, return_lse, stream,
        None if table is None else table.stride(0), dense is None,
    )  # fmt: skip
    launches: _Launches | None = plan.memo.get(key)
    if launches is None:
        launches = plan.memo.keep(key, _prepare(q, keys, plan, softmax, return_lse, stream, pack, dense))
    batch, heads, q_len, _ = q.shape
    padded = launches.padded
    out = output(q, out, padded)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32) if return_lse else None
    if padded and lse is not None:
        lse.fill_(float("-inf"))
    pool = _pool(keys, plan) if launches.columns else (None, None)
    for launch in launches.launches:
        launch.run(q, keys, out, lse, pool, sinks, stream, dense)
    return out, lse


# ---- the launch
@dataclass(frozen=True)
class _Launches:
    launches: tuple[_Launch, ...]
    padded: bool  # some row of q is no query of the plan
    columns: bool


@dataclass(frozen=True)
class _Launch:
    """One launch with all that stays the same from call to call: a call puts its own tensors in.

    arguments: the kernel's, those of the call None. boxes: descriptor contents of q, k, v, out, the two pools, again of
    k and v in smaller boxes, and of the values in a page that ends the keys.
    """

    kernel: Any
    work: _Work
    arguments: tuple[Any, ...]
    descriptor: type
    boxes: tuple[dict[str, Any] | None, ...]
    fixed: bool  # rows keep the maximum of their first step, and a second launch does again what outgrew it

    def run(
        self, q: Tensor, keys: Keys, out: Tensor, lse: Tensor | None, pool: _Pair, sinks: Tensor | None, stream: int,
        dense: Tensor | None,
    ) -> None:  # fmt: skip
        arguments, partial = self.fill(q, keys, out, lse, pool, sinks, dense)
        launch_by_mode(self.kernel, self.work.blocks, arguments, MODE_ARGUMENT, self.fixed, stream)
        if self.work.slots:
            _merge(self.work, partial, out, lse, sinks)

    def fill(
        self, q: Tensor, keys: Keys, out: Tensor, lse: Tensor | None, pool: _Pair, sinks: Tensor | None,
        dense: Tensor | None,
    ) -> tuple[list[Any], _Pair]:  # fmt: skip
        """The call's arguments, and its workspace."""
        arguments = list(self.arguments)
        k, v, table = keys
        put_descriptors(arguments, self.descriptor, self.boxes, (q, k, v, out, *pool, k, v, v))
        partial = _workspace(self.work, q)
        arguments[OUT_ARGUMENT : OUT_ARGUMENT + 6] = (out, lse, sinks, *partial, table)
        arguments[ANCHORS_ARGUMENT] = dense
        return arguments, partial


def launch_by_mode(
    kernel: Any, blocks: int, arguments: list[Any], at: int, fixed: bool, stream: int
) -> None:  # fmt: skip
    """Launches the kernel, whose argument `at` is the mode; twice where rows keep their first step's maximum."""
    for mode in (FIXED, AGAIN) if fixed else (RUNNING,):
        arguments[at] = mode
        kernel[(blocks, 1, 1)](*arguments, stream=stream)


def keeps_maximum(items: int, kv_end: int) -> bool:
    """Whether a launch of so many items over so many keys is long enough for a second one behind it."""
    return items * -(-kv_end // 128) >= FIXED_FROM


OUT_ARGUMENT = 13  # place of p_out, which p_lse, p_sinks, p_part, p_part_lse and p_table follow
ANCHORS_ARGUMENT = 21  # of p_anchors, which p_marks and the mode follow
MODE_ARGUMENT = 23
_FORMS: dict[tuple[Any, ...], Any] = {}


def _prepare(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, stream: int = 0, pack: int = 1,
    dense: Tensor | None = None,
) -> _Launches:  # fmt: skip
    """Work lists, descriptor contents, scalars and compiled kernels of such a call."""
    columns = plan.tokens is not None and plan.token_bits is not None
    works = _works(plan, q, keys.k, pack)
    launches = tuple(_launch(q, keys, plan, softmax, return_lse, work, stream, pack, dense) for work in works)
    return _Launches(launches, plan.geometry.padded, columns)


def _launch(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, work: _Work, stream: int, pack: int,
    dense: Tensor | None,
) -> _Launch:  # fmt: skip
    k, v, table = keys
    batch, heads, q_len, dim = q.shape
    key_heads, g, half = k.shape[1], plan.geometry, BLOCK_Q // 2
    step = _step_keys(dim)
    parts = _parts(plan, step)
    narrow = plan.rule is not None and parts == 1
    rule, cap, sinks = plan.rule, softmax.softcap, softmax.sink_logits
    width, pool_heads = 0, heads if plan.heads == heads else key_heads
    boxes = [
        box(q.shape, q.stride(), q_len, half, q.dtype),
        box(k.shape, k.stride(), keys.page or work.kv_end, step, q.dtype),
        box(v.shape, v.stride(), keys.page or work.kv_end, step, q.dtype),
        box(q.shape, (q_len * heads * dim, dim, heads * dim, 1), q_len, half, q.dtype),
        None,
        None,
        None,
        None,
        None,
    ]
    piece = _piece(keys.page, step // parts, narrow) if keys.page else 0
    chunk = int(_device_code().CHUNK.value)
    rows = NARROW_KEYS if narrow else piece or step // parts
    if rows < step:
        for i, x in enumerate((k, v)):
            boxes[6 + i] = box(x.shape, x.stride(), keys.page or work.kv_end, rows, q.dtype, chunk)
    if keys.page:
        last = (work.kv_end - 1) % keys.page + 1
        boxes[8] = box(v.shape, v.stride(), last, piece, q.dtype, None if piece == step else chunk)
    columns = plan.tokens is not None and plan.token_bits is not None
    if columns:
        assert plan.tokens is not None
        width = plan.tokens.shape[2]
        shape = (batch, pool_heads, width, dim)
        boxes[4] = boxes[5] = box(shape, (pool_heads * width * dim, width * dim, dim, 1), width, step, q.dtype)
    rule_sample = rule_head = 0
    if rule is not None:
        rule_sample = rule.shape[1] * 3 if rule.shape[0] > 1 else 0
        rule_head = 3 if rule.shape[1] > 1 else 0
    halves = _halves(plan)
    stages, q_stages = _buffers(dim, step, halves)
    flags = (
        stages, q_stages, max(plan.block_kv // step, 1), parts, plan.row_ptr is not None,
        rule is not None, cap is not None, return_lse, sinks is not None, columns, work.slots > 0,
        starts_early(g), q_stages == 1, narrow, halves, keys.page, g.q_step, pack,
        0 if dense is None else plan.correct_every,
    )  # fmt: skip
    scale = float(softmax.scale)
    arguments = (
        *boxes,
        work.items, work.entries, _counters(q.device, stream), rule, None, None, None, None, None, None,
        plan.tokens, plan.token_bits, None, _marks(q.device, stream, room(len(work.items))), RUNNING,
        scale if cap is None else float(cap), 0.0 if cap is None else 2 * math.log2(math.e) * scale / cap,
        len(work.items), heads, heads // key_heads, q_len, g.q_offset, rule_sample, rule_head,
        heads // plan.heads, heads // pool_heads, width, plan.heads * width if plan.samples > 1 else 0,
        None if table is None else table.stride(0), None if table is None else work.kv_end,
        None if dense is None else dense.shape[2], *flags,
    )  # fmt: skip
    # float16 holds no weights above 2^16: it keeps the running maximum.
    fixed = q.dtype == torch.bfloat16 and keeps_maximum(len(work.items), work.kv_end)
    launch = _Launch(None, work, arguments, layout(half, dim, q.dtype)[0], tuple(boxes), fixed)
    form = (q.device, q.dtype, dim, step, plan.block_kv, piece, None if sinks is None else sinks.dtype, *flags)
    if form not in _FORMS:
        out = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2)
        lse = q.new_empty((1,), dtype=torch.float32) if return_lse else None
        filled, _ = launch.fill(q, keys, out, lse, (k, v), sinks, dense)
        # Compiled once, then launched directly: Triton's own argument handling costs 40 us more a call.
        # 168 registers x 384 threads fill the register file; `warp_specialize` gives consumers 232, the producer 40.
        _FORMS[form] = _device_code().attention.warmup(*filled, grid=(1,), num_warps=4, maxnreg=168)
    return replace(launch, kernel=_FORMS[form])


def starts_early(g: Geometry) -> bool:
    """Whether some sample's first tile begins before q's first row."""
    return g.q_step == 1 and any(
        span.q_first // BLOCK_Q * BLOCK_Q + start < g.q_offset
        for span, start in zip(g.spans, g.kv_start, strict=True)
        if span.q_end > span.q_first
    )


def _piece(page: int, entry: int, narrow: bool) -> int:
    """Keys that one box takes out of pages: all of an entry that lies in one of them, else a page, or as few as the
    box that sinks alone need, of which there is one size."""
    return entry if page >= entry else NARROW_KEYS if narrow else page


def _buffers(dim: int, step: int, halves: bool) -> tuple[int, int]:
    """(K and V buffers each, Q buffers): 64 KiB of K and as much of V, and two tiles of Q; 227 KiB in all.

    At size 256 one tile of Q takes as much, and the result goes where it was; likewise with halves, where a consumer
    that passes a step wants a third buffer.
    """
    if dim == 256:
        return 2, 1
    return (3, 1) if halves and dim == 128 else (2 * (128 // dim) * (128 // step), 2)


def compile_form(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool = False, dense: Tensor | None = None
) -> Any:
    """Triton's compiled kernel for such a call, not launched; tensors may lie on the CPU where a driver is mocked."""
    pack = _packed_heads(q, keys, plan, softmax)
    return _prepare(_pack(q, pack), keys, plan, softmax, return_lse, pack=pack, dense=dense).launches[0].kernel


@per_geometry
def _counters(device: torch.device, stream: int) -> Tensor:
    """Two int32 zeros that the kernel itself puts back to zero; a pair a stream, since launches of two may overlap."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def room(items: int) -> int:
    """Places of marks for so many items, and whether there are any: a power of two, so that few buffers serve all."""
    return 1 << items.bit_length()


@per_geometry
def _marks(device: torch.device, stream: int, places: int) -> Tensor:
    """int32 zeros, which items are marked in and the second launch puts back."""
    return torch.zeros(places, dtype=torch.int32, device=device)


def _pool(keys: Keys, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """K and V of the single columns, (B, G or H, T, D): read as tiles by TMA, at the cost of a gather in the kernel.

    Measured on an H100, Triangle + 1024 columns a head at 128K: pool 9.9 ms, gather 10.1 ms in portable Triton.
    """
    from sparsekit.kernels.launch import launch

    assert plan.tokens is not None
    k, v, table = keys
    batch, key_heads, dim, kv_len = plan.geometry.batch, k.shape[1], k.shape[3], plan.geometry.kv_len
    tokens = plan.tokens.shape[2]
    heads = key_heads if plan.heads in (1, key_heads) else plan.heads
    pool_k, pool_v = (x.new_empty((batch, heads, tokens, dim)) for x in (k, v))
    args = (
        k, v, table, plan.tokens, key_bounds(plan.geometry, k.device), pool_k, pool_v, tokens, heads, plan.heads,
        1 if plan.samples > 1 else 0, heads // key_heads, *k.stride()[:3], *v.stride()[:3], kv_len - 1,
        -(-tokens // COLUMNS_A_PROGRAM), None if table is None else table.stride(0),
    )  # fmt: skip
    options = {"D": dim, "PAGE": keys.page, "PER": COLUMNS_A_PROGRAM, "num_warps": 4}
    launch(_device_code().gather_columns, -(-tokens // COLUMNS_A_PROGRAM) * batch * heads, args, options)
    return pool_k, pool_v

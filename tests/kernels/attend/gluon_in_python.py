"""The Hopper form's device code, executed in plain Python: what a card would have to show otherwise.

The functions of device.py run as they are written, on torch tensors and with a small stand-in for Gluon. A partition of
a block is a thread; one runs at a time, and which one is drawn anew at each barrier, product and copy. Copies by TMA
are late by chance too. Barriers have the hardware's phases. What waits too little shows: memory is NaN until it is
filled, again when both consumers have freed it, and while a copy is under way; and what a product reads may not change
between its issue and the wait for it. What waits for good is an error that names the barriers.

Numbers are float64, so that an error stands out. Not here: layouts, swizzling below rows of 64 columns, fences,
registers, rounding.
"""

# Stand-ins take what Gluon takes, and have no types to check.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,attr-defined,assignment,misc,type-arg"

from __future__ import annotations

import ast
import random
import threading
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels import primitives
from sparsekit.kernels.attend.hopper import descriptors, host, items, worklist
from sparsekit.kernels.attend.hopper.halves_device import NOWHERE
from sparsekit.plan import RULE, BlockPlan

CHUNK = 64
UNSENT = -777_777_777  # a word of mail that nobody has written, or that was freed
NAN = float("nan")


# ---- who runs when
class _Stopped(Exception):
    """Another partition has failed."""


class _Schedule:
    """Partitions and late copies, of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ranked = self.random.random() < 0.5
        self.copies_at_once = self.random.choice((0.3, 0.01))
        self.workers: list[_Worker] = []
        self.copies: list[Any] = []
        self.barriers: list[_Barrier] = []
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        for worker in self.workers:
            worker.thread.start()
        self._pass_on(None)
        self.done.wait()
        for worker in self.workers:
            worker.turn.release()
            worker.thread.join()
        if self.error is not None:
            raise self.error
        while self.copies:
            self.copies.pop()()

    def point(self, ready=None) -> None:
        """Somebody else may run here, and does until `ready`."""
        me = _HERE.worker
        if ready is None and self.random.random() < 0.6:
            return
        me.ready = ready
        if self._pass_on(me) is not me:
            me.turn.acquire()
        if self.error is not None:
            raise _Stopped
        me.ready = None

    def _pass_on(self, me):
        while True:
            able = [w for w in self.workers if not w.over and (w.ready is None or w.ready())]
            if self.copies and (not able or self.random.random() < self.copies_at_once):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if able:
                break
            if all(w.over for w in self.workers):
                self.done.set()
                return None
            waits = {w.name: w.place() for w in self.workers if not w.over}
            raise RuntimeError(f"deadlock: {waits}; {[b.state() for b in self.barriers]}")
        ranked = self.ranked and self.random.random() < 0.8
        nxt = max(able, key=lambda w: w.rank) if ranked else self.random.choice(able)
        if nxt is not me:
            nxt.turn.release()
        return nxt

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self.done.set()


class _Worker:
    def __init__(self, schedule: _Schedule, block: int, blocks: int, index: int, function, arguments) -> None:
        self.schedule, self.block, self.blocks = schedule, block, blocks
        self.name = f"{function.__name__}[{index}] of block {block}"
        self.rank, self.turn = schedule.random.random(), threading.Semaphore(0)
        self.over, self.ready = False, None
        self.products: list[_Product] = []
        self.stores = 0
        self.waits_for = ""
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)

    def place(self) -> str:
        return self.waits_for

    def _run(self, function, arguments) -> None:
        _HERE.worker = self
        self.turn.acquire()
        try:
            if self.schedule.error is None and not self.schedule.done.is_set():
                with torch.no_grad():
                    function(*arguments)
                assert not self.products, f"{self.name} ends with products that nobody waited for"
                self.over = True
                self.schedule._pass_on(None)
        except _Stopped:
            pass
        except BaseException as error:
            error.add_note(f"in {self.name}")
            self.schedule.fail(error)


_HERE = threading.local()


def _point(ready=None) -> None:
    _HERE.worker.schedule.point(ready)


# ---- memory
class _Pointer:
    def __init__(self, flat: Tensor, at) -> None:
        self.flat, self.at = flat, at

    @classmethod
    def to(cls, x: Tensor) -> _Pointer:
        return cls(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()), x.storage_offset())

    def __add__(self, more) -> _Pointer:
        return _Pointer(self.flat, self.at + more)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.flat.dtype)

    def places(self, mask) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at).long()
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(True if mask is None else mask).bool())
        outside = mask & ((at < 0) | (at >= self.flat.numel()))
        assert not bool(outside.any()), f"address {at[outside].tolist()[:3]} of {self.flat.numel()} elements"
        return at, mask


def _load(pointer: _Pointer, mask=None, other=0):
    at, mask = pointer.places(mask)
    if not at.dim():
        return pointer.flat[int(at)].item() if bool(mask) else other
    values = pointer.flat[torch.where(mask, at, 0)]
    return torch.where(mask, values, other)


def _store(pointer: _Pointer, value, mask=None) -> None:
    at, mask = pointer.places(mask)
    value = torch.as_tensor(value).to(pointer.flat.dtype).expand(at.shape)
    pointer.flat[at[mask]] = value[mask]


def _atomic_add(pointer: _Pointer, value: int) -> int:
    _point()
    old = int(pointer.flat[pointer.at])
    pointer.flat[pointer.at] = old + value
    return old


class _Descriptor:
    """Filled in by `put_descriptors`: base, shape, strides, block_shape."""

    layout = None

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def block_type(self):
        size = self.base.element_size()
        for n in self.block_shape:
            size *= n
        return SimpleNamespace(shape=list(self.block_shape), nbytes=size)

    @property
    def whole(self) -> Tensor:
        return self.base.as_strided(self.shape, self.strides, self.base.storage_offset())

    def box(self, at) -> tuple[Tensor, int]:
        """(the rows of a box that there are, how many rows of zeros come before them)."""
        sample, head, row, column = map(int, at)
        whole, (_, _, rows, width) = self.whole, self.block_shape
        if not (0 <= sample < whole.shape[0] and 0 <= head < whole.shape[1]):
            return whole[0, 0, :0, :width], 0
        low, high = max(row, 0), min(max(row + rows, 0), whole.shape[2])
        return whole[sample, head, low : max(high, low), column : column + width], min(low - row, rows)


class _Tile:
    """Rows of 64 columns beside one another, (chunks, rows, 64), as the swizzle stores a matrix (rows, columns)."""

    layout = None

    def __init__(self, memory: Tensor, lead: list[int], flipped: bool = False) -> None:
        self.memory, self.lead, self.flipped = memory, lead, flipped

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def shape(self) -> list[int]:
        chunks, rows, width = self.memory.shape[-3:]
        return [*self.lead, *((chunks * width, rows) if self.flipped else (rows, chunks * width))]

    def index(self, i) -> _Tile:
        assert len(self.lead) == 3
        assert 0 <= int(i) < self.lead[0]
        return _Tile(self.memory[int(i)], self.lead[1:])

    def reshape(self, shape) -> _Tile:
        assert self.shape == [1, 1, *shape]
        return _Tile(self.memory, [])

    def permute(self, order) -> _Tile:
        assert order == (1, 0)
        assert not self.lead
        return _Tile(self.memory, [], not self.flipped)

    def slice(self, start, length) -> _Tile:
        assert not self.lead
        assert not self.flipped
        return _Tile(self.memory[:, start : start + length], [])

    def reinterpret(self, dtype, shape, layout) -> _Tile:
        count, one, two, rows, columns = shape
        assert (one, two, dtype) == (1, 1, self.dtype)
        whole = self.memory.view(-1)[: count * rows * columns]
        return _Tile(whole.view(count, columns // CHUNK, rows, CHUNK), [count, 1, 1])

    def value(self) -> Tensor:
        made = self.memory.permute(1, 0, 2).reshape(self.memory.shape[1], -1)
        return made.T if self.flipped else made

    def store(self, x: Tensor) -> None:
        self.memory.copy_(x.unflatten(1, (-1, CHUNK)).permute(1, 0, 2))
        _point()


class _Mail:
    def __init__(self, count: int) -> None:
        self.words = [UNSENT] * count

    def clear(self, i: int) -> None:
        half = len(self.words) // 2
        self.words[i * half : (i + 1) * half] = [UNSENT] * half

    def index(self, i) -> _Word:
        return _Word(self, int(i))


class _Word:
    def __init__(self, mail: _Mail, i: int) -> None:
        self.mail, self.i = mail, i

    def store(self, x: Tensor) -> None:
        self.mail.words[self.i] = int(x)

    def load(self, layout) -> Tensor:
        word = self.mail.words[self.i]
        assert word != UNSENT, f"{_HERE.worker.name} reads mail {self.i} that is not there"
        return torch.tensor([word], dtype=torch.int32)


# ---- barriers, copies, products
class _Barrier:
    def __init__(self, schedule: _Schedule) -> None:
        self.schedule, self.name, self.count = schedule, "", 0
        self.pending = self.bytes = self.completed = 0
        self.freed = None
        schedule.barriers.append(self)

    def state(self) -> str:
        return f"{self.name}: {self.completed} phases, {self.pending} of {self.count} due, {self.bytes} bytes due"

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int) -> None:
        assert self.pending >= count, f"{_HERE.worker.name} arrives too often at {self.state()}"
        self.pending -= count
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed, self.pending = self.completed + 1, self.count
            if self.freed is not None:
                self.freed()

    def copied(self, size: int) -> None:
        self.bytes -= size
        self._turn()


class _Barriers:
    def __init__(self, schedule: _Schedule, count: int) -> None:
        self.shape = [count, 1]
        self.all = [_Barrier(schedule) for _ in range(count)]

    def index(self, i) -> _Barrier:
        assert 0 <= int(i) < len(self.all)
        return self.all[int(i)]


def _expect(barrier: _Barrier, size: int) -> None:
    barrier.bytes += size
    barrier.arrive(1)
    _point()


def _arrive(barrier: _Barrier, count: int = 1, pred=True) -> None:
    if pred:
        barrier.arrive(count)
        _point()


def _wait(barrier: _Barrier, phase, pred=True) -> None:
    if pred:
        assert phase in (0, 1)
        _HERE.worker.waits_for = f"{barrier.name} phase {phase}"
        _point(lambda: barrier.completed & 1 != phase)


def _copy_in(desc: _Descriptor, at, barrier: _Barrier, tile: _Tile) -> None:
    assert tile.shape == desc.block_type.shape, (tile.shape, desc.block_type.shape)
    tile.memory.fill_(NAN)
    rows, before = desc.box(at)

    def land() -> None:
        whole = torch.zeros(tile.shape[-2:], dtype=tile.dtype)
        whole[before : before + len(rows)] = rows
        tile.memory.copy_(whole.unflatten(1, (-1, CHUNK)).permute(1, 0, 2))
        barrier.copied(desc.block_type.nbytes)

    _HERE.worker.schedule.copies.append(land)
    _point()


def _copy_out(desc: _Descriptor, at, tile: _Tile) -> None:
    assert tile.shape == desc.block_type.shape
    assert int(at[2]) >= 0, "a store that starts before row 0"
    worker = _HERE.worker
    worker.stores += 1

    def land() -> None:
        rows, _ = desc.box(at)
        rows.copy_(tile.value()[: len(rows)])
        worker.stores -= 1

    worker.schedule.copies.append(land)
    _point()


def _store_wait(count: int) -> None:
    worker = _HERE.worker
    worker.waits_for = "its stores"
    _point(lambda: worker.stores <= count)


class _Product:
    def __init__(self, a, b: _Tile, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None
        self.before = [x.value().clone() for x in (a, b) if isinstance(x, _Tile)]

    def finish(self) -> None:
        now = [x.value().clone() for x in (self.a, self.b) if isinstance(x, _Tile)]
        # A block's first P V multiplies zeros by whatever is there, and is thrown away.
        if isinstance(self.a, _Tile) or bool(self.a.any()):
            for x, y in zip(self.before, now, strict=True):
                assert torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)), (
                    f"{_HERE.worker.name}: memory changed under a product"
                )
        a = self.a.value() if isinstance(self.a, _Tile) else self.a
        made = a @ self.b.value()
        self.result = made + self.acc if self.use_acc else made


def _product(a, b, acc, use_acc=True, is_async=False):
    assert isinstance(acc, Tensor), "an accumulator that nobody waited for"
    worker, made = _HERE.worker, _Product(a, b, acc, use_acc)
    worker.products.append(made)
    _point()
    return made if is_async else _product_wait(0, (made,))


def _product_wait(count, deps=()):
    products = _HERE.worker.products
    _point()
    while len(products) > count:
        products.pop(0).finish()
    (made,) = deps
    assert made.result is not None, "a product that is not done"
    return made.result


# ---- the language
class _Constexpr:
    def __new__(cls, x):
        return x


def _scalar(*xs) -> bool:
    return not any(isinstance(x, Tensor) for x in xs)


def _where(condition, a, b):
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    chosen, other = (a, b) if condition else (b, a)
    if isinstance(other, Tensor) and not isinstance(chosen, Tensor):
        return torch.full_like(other, chosen)
    return chosen


def _maximum(a, b):
    if _scalar(a, b):
        return max(a, b)
    return a.clamp(min=b) if _scalar(b) else b.clamp(min=a) if _scalar(a) else torch.maximum(a, b)


def _minimum(a, b):
    if _scalar(a, b):
        return min(a, b)
    return a.clamp(max=b) if _scalar(b) else b.clamp(max=a) if _scalar(a) else torch.minimum(a, b)


def _max(x: Tensor, axis: int):
    made = x.amax(axis)
    return made if made.dim() else made.item()


def _exp2(x):
    return 2.0**x if _scalar(x) else torch.exp2(x)


def _div(a, b):
    if _scalar(a, b):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return torch.div(a, b, rounding_mode="trunc")


def _mod(a, b):
    return a - _div(a, b) * b


def _cast(x, dtype):
    if isinstance(x, Tensor):
        return x.to(dtype)
    return float(x) if dtype.is_floating_point else int(x)


def _allocate(dtype, shape, layout):
    schedule = _HERE.schedule
    if dtype == torch.int64:
        return _Barriers(schedule, shape[0])
    if dtype == torch.int32:
        return _Mail(shape[0])
    count, _, _, rows, columns = shape
    return _Tile(torch.full((count, columns // CHUNK, rows, CHUNK), NAN, dtype=dtype), [count, 1, 1])


def _specialize(partitions, warps, registers) -> None:
    names = ["d_o", "qs", "ks", "vs", "os", "q_full", "q_free", "k_full", "k_free", "v_full", "v_free", "mail"]
    own = dict(zip([*names, "m_full", "m_free"], partitions[0][1], strict=False))
    for name, array in own.items():
        if isinstance(array, _Barriers):
            for i, barrier in enumerate(array.all):
                barrier.name = f"{name}[{i}] of block {_HERE.block}"
    for free, buffers, per in (("k_free", "ks", 1), ("v_free", "vs", 1), ("q_free", "qs", 2)):
        for i, barrier in enumerate(own[free].all):
            memory = own[buffers].memory[i * per : (i + 1) * per]
            barrier.freed = partial(memory.fill_, NAN)
    for i, barrier in enumerate(own["m_free"].all):
        barrier.freed = partial(own["mail"].clear, i)
    for i, (function, arguments) in enumerate(partitions):
        _HERE.schedule.workers.append(_Worker(_HERE.schedule, _HERE.block, _HERE.blocks, i, function, arguments))


def _jit(function=None, **options):
    return (lambda f: f) if function is None else function


def _program_id(axis: int) -> int:
    return _HERE.program[axis] if hasattr(_HERE, "program") else _HERE.worker.block


def _layout(*args, **options) -> None:
    return None


_LANGUAGE = SimpleNamespace(
    constexpr=_Constexpr, static_range=range, int32=torch.int32, int64=torch.int64, float32=torch.float64,
    NVMMADistributedLayout=_layout, BlockedLayout=_layout, SliceLayout=_layout, DotOperandLayout=_layout,
    SwizzledSharedLayout=_layout, shared_memory_descriptor=_Tile, convert_layout=lambda x, layout: x,
    arange=lambda low, high, layout=None: torch.arange(low, high, dtype=torch.int32),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype),
    full_like=torch.full_like, zeros_like=torch.zeros_like, where=_where, maximum=_maximum, minimum=_minimum, max=_max,
    sum=lambda x, axis: x.sum(axis), exp2=_exp2, log2=torch.log2, expand_dims=lambda x, axis: x.unsqueeze(axis),
    join=lambda a, b: torch.stack([a, b], -1), load=_load, store=_store, atomic_add=_atomic_add,
    program_id=_program_id, num_programs=lambda axis: _HERE.worker.blocks, allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
)  # fmt: skip


class _Plain(ast.NodeTransformer):
    """What numbers and torch tensors do otherwise: `.to`, integer division, and a tensor's layout."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(ast.Name("_cast", ast.Load()), [node.func.value, *node.args], [])
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = {ast.FloorDiv: "_div", ast.Mod: "_mod"}.get(type(node.op))
        return node if name is None else ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        inner = node.value
        if node.attr == "layout" and isinstance(inner, ast.Attribute) and inner.attr == "type":
            return ast.Constant(None)
        return node


@lru_cache(maxsize=1)
def device_code() -> SimpleNamespace:
    """device.py's functions, to be called with pointers and descriptors of this file."""
    file = Path(host.__file__).with_name("device.py")
    tree = ast.parse(file.read_text())
    shared = ast.parse(Path(primitives.__file__).read_text())
    pages = [node for node in shared.body if isinstance(node, ast.FunctionDef) and node.name == "_in_pages"]
    tree.body = pages + [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, Any] = {
        "triton": SimpleNamespace(jit=_jit), "gluon": SimpleNamespace(jit=_jit), "tl": _LANGUAGE, "gl": _LANGUAGE,
        "no_type_check": lambda f: f, "items": items, "NOWHERE": int(NOWHERE.value), "RULE_FLAG": RULE,
        "_cast": _cast, "_div": _div, "_mod": _mod, "fence_async_shared": lambda: None,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=_layout, init=lambda barrier, count: barrier.init(count), expect=_expect, arrive=_arrive,
            wait=_wait,
        ),
        "tma": SimpleNamespace(async_load=_copy_in, async_store=_copy_out, store_wait=_store_wait),
        "warpgroup_mma": _product, "warpgroup_mma_wait": _product_wait,
    }  # fmt: skip
    exec(compile(ast.fix_missing_locations(_Plain().visit(tree)), str(file), "exec"), names)
    names["_rescale"] = lambda acc, alpha, layout: acc * alpha[:, None]
    return SimpleNamespace(**names)


# ---- a call
def _given(x: Any) -> Any:
    return _Pointer.to(x) if isinstance(x, Tensor) else x


def _launch(kernel, grid, args, options) -> None:
    """A launch without partitions: its programs one after another."""
    options = {name: value for name, value in options.items() if name != "num_warps"}
    _programs(kernel, (grid,), *map(_given, args), **options)


def _programs(kernel, grid, *args, **options) -> None:
    for x in range(grid[0]):
        for y in range(grid[1] if len(grid) > 1 else 1):
            _HERE.program = (x, y)
            kernel(*args, **options)
    del _HERE.program


def _attention(arguments: list[Any], blocks: int, seed: int) -> None:
    _HERE.schedule, _HERE.blocks = _Schedule(seed), blocks
    for block in range(blocks):
        _HERE.block = block
        device_code().attention(*map(_given, arguments))
    _HERE.schedule.run()


def attend_in_python(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, dense: Tensor | None = None, *, blocks: int = 3,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of `host.attend_hopper`, or out of `host.attend_corrected` with `dense`. All in float64, on the CPU.

    blocks: of a launch, at most. seed: who runs when.
    """
    code = device_code()
    kernel = SimpleNamespace(warmup=lambda *args, **options: None)
    loaded = SimpleNamespace(CHUNK=SimpleNamespace(value=CHUNK), attention=kernel, gather_columns=code.gather_columns)
    with ExitStack() as patches, torch.no_grad():
        for module in (host, descriptors):
            shape = lambda rows, dim, dtype: (_Descriptor, [1, 1, rows, dim], None)  # noqa: E731
            patches.enter_context(patch.object(module, "layout", shape))
        patches.enter_context(patch.object(host, "_device_code", lambda: loaded))
        patches.enter_context(patch.object(host, "_FORMS", {}))
        patches.enter_context(patch("sparsekit.kernels.launch.launch", _launch))
        pack = host._packed_heads(q, keys, plan, softmax)
        own = host._pack(q, pack) if pack > 1 else q
        lse_too = dense is None
        launches = host._prepare(own, keys, plan, softmax, lse_too, 0, pack, dense)
        out = output(own, None, launches.padded)
        lse = own.new_full(own.shape[:3], float("-inf") if launches.padded else NAN)
        if not launches.padded:
            out.fill_(NAN)
        pool = host._pool(keys, plan) if launches.columns else (None, None)
        for launch in launches.launches:
            sinks = softmax.sink_logits
            arguments, partial_results = launch.fill(own, keys, out, lse if lse_too else None, pool, sinks, dense)
            pieces = [None if x is None else x.new_full(x.shape, NAN, dtype=q.dtype) for x in partial_results]
            arguments[host.OUT_ARGUMENT + 3 : host.OUT_ARGUMENT + 5] = pieces
            counters = host._counters(q.device, 0).zero_()  # a run that failed leaves them anyhow
            _attention(arguments, min(blocks, launch.work.blocks), seed)
            assert not counters.any(), "counters are not put back"
            if launch.work.slots:
                _, heads, q_len, dim = out.shape
                args = (launch.work.merges, *pieces, out, lse if lse_too else None, sinks)
                _programs(
                    code.merge, (launch.work.slots, 4), *map(_given, args), heads, q_len, *out.stride()[:3],
                    D=dim, BM=32, LSE=lse_too, SINKS=sinks is not None,
                )  # fmt: skip
        if pack > 1:
            out, lse = host._unpack(out, pack), host._unpack(lse[..., None], pack)[..., 0]
        return out, lse


def listed_in_python(plan: BlockPlan, grid: Any, step: int) -> tuple[Tensor, Tensor]:
    """`worklist._listed` by device code."""
    with patch.object(worklist, "_device_code", device_code), patch("sparsekit.kernels.launch.launch", _launch):
        return worklist._listed_on_gpu(plan, grid, step)

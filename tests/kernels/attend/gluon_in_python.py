"""Hopper device code, executed in plain Python: what a card would have to show otherwise.

The functions of device.py and fp8_device.py run as they are written, on torch tensors and with a small stand-in for
Gluon. A partition of a block is a thread; one runs at a time, and which one is drawn anew at each barrier, product and
copy. Copies by TMA are late by chance too. Barriers have the hardware's phases. What waits for good is an error that
names the barriers.

What waits too little shows, in two ways. Memory is NaN until it is filled, again when it was freed, and while a copy is
under way; what a product reads may not change between its issue and the wait for it. And each buffer knows who wrote
and read it: barriers alone order partitions (vector clocks), and a write or a read that they do not order with what
came before is an error, whoever ran first this time. Numbers in shared memory, of which some are read in vain, are then
NaN instead. Which barrier frees a buffer nobody has to say: the last one with "free" in its name that the writer waited
for.

Numbers are float64, so that an error stands out; conversions to e4m3 keep them, but for those beyond its largest.
Exponentials reach as far as float32 does: above are infinities, below is 0. Not here: layouts, swizzling below rows of
64 columns, registers, rounding.
"""

# Stand-ins take what Gluon takes, and have no types to check.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,attr-defined,assignment,misc,type-arg"

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels.attend.hopper import descriptors, host, items, worklist
from sparsekit.plan import BlockPlan

CHUNK = 64
UNSENT = -777_777_777  # a word of mail that nobody has written, or that was freed
NAN = float("nan")
E4M3_MOST = 448.0
NO_ROW = -(1 << 20)


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
        self.stores: list[_Cell] = []  # what is being copied out
        self.landed = 0  # of all copies out that there were
        self.sent = 0
        self.waits_for = ""
        self.epoch = 1
        self.seen: dict[Any, int] = {}  # up to which epoch of other partitions, which phase of copies
        self.waited_free: _Barrier | None = None
        self.unfenced: list[_Cell] = []  # written by threads, unseen by products and copies
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)

    def place(self) -> str:
        return self.waits_for

    def knows(self, agent, epoch: int) -> bool:
        return agent is self or self.seen.get(agent, 0) >= epoch

    def _run(self, function, arguments) -> None:
        _HERE.worker = self
        self.turn.acquire()
        try:
            if self.schedule.error is None and not self.schedule.done.is_set():
                with torch.no_grad():
                    function(*arguments)
                assert not self.products, f"{self.name} ends with products that nobody waited for"
                assert not self.stores, f"{self.name} ends with stores that nobody waited for"
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


class _Cell:
    """A buffer in shared memory: who wrote it last and who read it since, as barriers order them, and what frees it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.name = memory, ""
        self.written: tuple[Any, int] | None = None
        self.reads: dict[_Worker, int] = {}
        self.under_way: list[_Worker] = []  # reads by products, and by copies out
        self.free: tuple[_Barrier, int] | None = None

    def wrong(self) -> str:
        """Why the partition that runs may not read this now, or ""."""
        me = _HERE.worker
        if self.written is None or not me.knows(*self.written):
            return f"{me.name} reads {self.name}, whose contents it has not waited for"
        if self.free is not None and self.free[0].arrivals.get(me, -1) >= self.free[1]:
            return f"{me.name} reads {self.name}, which it has freed"
        return ""

    def read(self, by_threads: bool = True) -> None:
        wrong = self.wrong()
        assert not wrong, wrong
        assert by_threads or self not in _HERE.worker.unfenced, f"{_HERE.worker.name} reads {self.name} without a fence"
        self.reads[_HERE.worker] = _HERE.worker.epoch

    def begin(self) -> None:
        self.under_way.append(_HERE.worker)

    def end(self) -> None:
        self.under_way.remove(_HERE.worker)
        self.reads[_HERE.worker] = _HERE.worker.epoch

    def write(self, by: tuple[_Barrier, int] | None = None) -> None:
        """Of the partition that runs, or of a copy that is done with a phase of a barrier."""
        me = _HERE.worker
        others = [] if self.written is None or self.written == by else [self.written]
        late = [agent for agent, epoch in [*others, *self.reads.items()] if not me.knows(agent, epoch)]
        late += self.under_way
        assert not late, f"{me.name} writes {self.name}, not waiting for {[x.name for x in late]}"
        self.written, self.reads = by or (me, me.epoch), {}
        self.free = None
        if me.waited_free is not None:
            self.free = me.waited_free, me.waited_free.completed
            me.waited_free.frees.append(self)


class _Tile:
    """Rows of 64 columns beside one another, (chunks, rows, 64), as the swizzle stores a matrix (rows, columns)."""

    layout = None

    def __init__(self, memory: Tensor, lead: list[int], cells: list[_Cell], flipped: bool = False) -> None:
        self.memory, self.lead, self.cells, self.flipped = memory, lead, cells, flipped

    @classmethod
    def empty(cls, count: int, lead: list[int], rows: int, columns: int, dtype: torch.dtype) -> _Tile:
        width = min(columns, CHUNK)
        memory = torch.full((count, columns // width, rows, width), NAN, dtype=dtype)
        return cls(memory, lead, [_Cell(part) for part in memory])

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def shape(self) -> list[int]:
        chunks, rows, width = self.memory.shape[-3:]
        return [*self.lead, *((chunks * width, rows) if self.flipped else (rows, chunks * width))]

    @property
    def cell(self) -> _Cell:
        (cell,) = self.cells
        return cell

    def index(self, i) -> _Tile:
        assert self.memory.dim() == 4
        assert 0 <= int(i) < len(self.memory)
        cells = self.cells if len(self.cells) == 1 else [self.cells[int(i)]]
        return _Tile(self.memory[int(i)], self.lead[1:], cells)

    def reshape(self, shape) -> _Tile:
        assert self.shape == [1, 1, *shape]
        return _Tile(self.memory, [], self.cells)

    def permute(self, order) -> _Tile:
        assert order == (1, 0)
        assert not self.lead
        return _Tile(self.memory, [], self.cells, not self.flipped)

    def slice(self, start, length) -> _Tile:
        assert not self.lead
        assert not self.flipped
        return _Tile(self.memory[:, start : start + length], [], self.cells)

    def reinterpret(self, dtype, shape, layout) -> _Tile:
        count, one, two, rows, columns = shape
        assert (one, two, dtype) == (1, 1, self.dtype)
        assert self.memory.dim() == 3
        width = min(columns, CHUNK)
        count = min(count, self.memory.numel() // (rows * columns))  # all numbers have one size here
        whole = self.memory.view(-1)[: count * rows * columns]
        return _Tile(whole.view(count, columns // width, rows, width), [count, 1, 1], [self.cell])

    def value(self) -> Tensor:
        made = self.memory.permute(1, 0, 2).reshape(self.memory.shape[1], -1)
        return made.T if self.flipped else made

    def load(self, layout) -> Tensor:
        _point()
        self.cell.read()
        return self.value().clone()

    def put(self, x: Tensor) -> None:
        self.memory.copy_(x.unflatten(1, (-1, self.memory.shape[-1])).permute(1, 0, 2))

    def store(self, x: Tensor) -> None:
        self.cell.write()
        _HERE.worker.unfenced.append(self.cell)
        self.put(x)
        _point()


class _Vectors:
    """Mail, scales and other short rows of numbers."""

    def __init__(self, count: int, length: int, dtype: torch.dtype) -> None:
        self.blank = NAN if dtype.is_floating_point else UNSENT
        self.shape = [count, length]
        self.cells = [_Cell(row) for row in torch.full((count, length), self.blank, dtype=dtype)]

    def index(self, i) -> _Vector:
        assert 0 <= int(i) < len(self.cells)
        return _Vector(self.cells[int(i)], self.blank)


class _Vector:
    def __init__(self, cell: _Cell, blank: float) -> None:
        self.cell, self.blank = cell, blank

    def store(self, x: Tensor) -> None:
        assert x.shape == self.cell.memory.shape
        self.cell.write()
        self.cell.memory.copy_(x)

    def load(self, layout) -> Tensor:
        if self.blank == UNSENT:
            self.cell.read()
            assert int(self.cell.memory[0]) != UNSENT, f"{_HERE.worker.name} reads {self.cell.name}, not sent"
        elif self.cell.wrong():
            return torch.full_like(self.cell.memory, NAN)  # an error only where somebody uses it
        else:
            self.cell.read()
        return self.cell.memory.clone()


# ---- barriers, copies, products
class _Barrier:
    def __init__(self, schedule: _Schedule) -> None:
        self.schedule, self.name, self.count = schedule, "", 0
        self.pending = self.bytes = self.completed = 0
        self.frees: list[_Cell] = []
        self.arrivals: dict[_Worker, int] = {}  # the phase of a partition's last one
        self.gathered: dict[Any, int] = {}  # what those who arrived know
        self.known: dict[Any, int] = {}  # what those know who waited
        schedule.barriers.append(self)

    def state(self) -> str:
        return f"{self.name}: {self.completed} phases, {self.pending} of {self.count} due, {self.bytes} bytes due"

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int) -> None:
        assert self.pending >= count, f"{_HERE.worker.name} arrives too often at {self.state()}"
        me = _HERE.worker
        self.pending -= count
        self.arrivals[me] = self.completed
        _learn(self.gathered, {**me.seen, me: me.epoch})
        me.epoch += 1
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            _learn(self.known, {**self.gathered, self: self.completed + 1})
            for cell in self.frees:
                if cell.free == (self, self.completed):
                    cell.memory.fill_(NAN if cell.memory.is_floating_point() else UNSENT)
            self.completed, self.pending = self.completed + 1, self.count
            self.frees, self.gathered = [], {}

    def copied(self, size: int) -> None:
        self.bytes -= size
        self._turn()


def _learn(known: dict[Any, int], more: dict[Any, int]) -> None:
    for agent, epoch in more.items():
        known[agent] = max(known.get(agent, 0), epoch)


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
        me = _HERE.worker
        _learn(me.seen, barrier.known)
        if "free" in barrier.name:
            me.waited_free = barrier


def _fence() -> None:
    if hasattr(_HERE, "worker"):
        _HERE.worker.unfenced = []


def _copy_in(desc: _Descriptor, at, barrier: _Barrier, tile: _Tile) -> None:
    assert tile.shape == desc.block_type.shape, (tile.shape, desc.block_type.shape)
    tile.cell.write((barrier, barrier.completed + 1))
    tile.memory.fill_(NAN)
    rows, before = desc.box(at)

    def land() -> None:
        whole = torch.zeros(tile.shape[-2:], dtype=tile.dtype)
        whole[before : before + len(rows)] = rows
        tile.put(whole)
        barrier.copied(desc.block_type.nbytes)

    _HERE.worker.schedule.copies.append(land)
    _point()


def _copy_out(desc: _Descriptor, at, tile: _Tile) -> None:
    assert tile.shape == desc.block_type.shape
    assert int(at[2]) >= 0, "a store that starts before row 0"
    worker = _HERE.worker
    tile.cell.read(by_threads=False)
    tile.cell.begin()
    worker.stores.append(tile.cell)
    worker.sent += 1

    def land() -> None:
        rows, _ = desc.box(at)
        rows.copy_(tile.value()[: len(rows)])
        worker.landed += 1

    worker.schedule.copies.append(land)
    _point()


def _store_wait(count: int) -> None:
    worker = _HERE.worker
    worker.waits_for = "its stores"
    _point(lambda: worker.sent - worker.landed <= count)
    while len(worker.stores) > count:
        worker.stores.pop(0).end()


class _Product:
    def __init__(self, a, b: _Tile, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None
        # A block's first P V multiplies zeros by whatever is there, and is thrown away.
        counts = isinstance(a, _Tile) or bool(a.any())
        self.tiles = [x for x in (a, b) if isinstance(x, _Tile) and counts]
        self.before = [x.value().clone() for x in self.tiles]
        for x in self.tiles:
            x.cell.read(by_threads=False)
            x.cell.begin()

    def finish(self) -> None:
        for x, before in zip(self.tiles, self.before, strict=True):
            x.cell.end()
            same = torch.equal(x.value().nan_to_num(12345.0), before.nan_to_num(12345.0))
            assert same, f"{_HERE.worker.name}: {x.cell.name} changed under a product"
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
    """Of float32's range: infinite from 2^128 on, and 0 below 2^-149."""
    if _scalar(x):
        return float(_exp2(torch.tensor(x, dtype=torch.float64)))
    return torch.exp2(x).masked_fill(x >= 128.0, float("inf")).masked_fill(x < -149.0, 0.0)


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


class _Four:
    """Four e4m3 in a register: four numbers here."""

    def __init__(self, numbers: list[Tensor]) -> None:
        self.numbers, self.shape = numbers, numbers[0].shape

    def __rshift__(self, bits: int) -> Tensor:
        assert bits % 8 == 0
        return self.numbers[bits // 8]


def _assembly(code: str, constraints: str, arguments: list[Tensor], dtype, is_pure: bool, pack: int):
    """What rounds to e4m3, or keeps a number as it is. Rounding only keeps numbers below e4m3's largest."""
    assert "e4m3x2" in code or "nanosleep" in code, f"no stand-in for {code}"
    if "satfinite" in code:
        arguments = [x.clamp(-E4M3_MOST, E4M3_MOST) for x in arguments]
    return arguments[0] if len(arguments) == 1 else _Four(arguments)


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return _Barriers(_HERE.schedule, shape[0])
    if len(shape) == 2:
        return _Vectors(*shape, dtype)
    count, *ones, rows, columns = shape
    return _Tile.empty(count, [count, *ones], rows, columns, dtype)


def _specialize(partitions, warps, registers) -> None:
    schedule, block = _HERE.schedule, _HERE.block
    for i, (function, arguments) in enumerate(partitions):
        for name, array in inspect.signature(function).bind(*arguments).arguments.items():
            members = {_Barriers: "all", _Tile: "cells", _Vectors: "cells"}.get(type(array))
            for j, member in enumerate(getattr(array, members) if members else []):
                member.name = f"{name}[{j}] of block {block}"
        schedule.workers.append(_Worker(schedule, block, _HERE.blocks, i, function, arguments))


def _jit(function=None, **options):
    return (lambda f: f) if function is None else function


def _program_id(axis: int) -> int:
    return _HERE.program[axis] if hasattr(_HERE, "program") else _HERE.worker.block


def _layout(*args, **options) -> None:
    return None


_LANGUAGE = SimpleNamespace(
    constexpr=_Constexpr, static_range=range, int32=torch.int32, int64=torch.int64, float32=torch.float64,
    float16=torch.float16, bfloat16=torch.float64, float8e4nv=torch.float64, int8=torch.float64,
    inline_asm_elementwise=_assembly,
    NVMMASharedLayout=_layout, abs=torch.abs, split=lambda x: x.unbind(-1),
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


def _imported(node: ast.ImportFrom) -> dict[str, Any]:
    """What a module of device code takes from others of this package: functions and constants as they are here."""
    found = {}
    module = importlib.import_module(node.module or "")
    own = Path(module.__file__ or "").with_suffix("").name in ("device", "fp8_device")
    for alias in node.names:
        x = getattr(module, alias.name)
        if own:
            x = getattr(device_code(Path(module.__file__ or "").stem), alias.name)
        elif hasattr(x, "value"):
            x = x.value
        elif hasattr(x, "fn"):
            tree = ast.parse(Path(module.__file__ or "").read_text())
            tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == alias.name]
            x = _executed(tree, module.__file__ or "", {})[alias.name]
        found[alias.asname or alias.name] = x
    return found


def _executed(tree: ast.Module, file: str, names: dict[str, Any]) -> dict[str, Any]:
    names |= {
        "triton": SimpleNamespace(jit=_jit), "gluon": SimpleNamespace(jit=_jit), "tl": _LANGUAGE, "gl": _LANGUAGE,
        "no_type_check": lambda f: f, "_cast": _cast, "_div": _div, "_mod": _mod, "fence_async_shared": _fence,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=_layout, init=lambda barrier, count: barrier.init(count), expect=_expect, arrive=_arrive,
            wait=_wait,
        ),
        "tma": SimpleNamespace(async_load=_copy_in, async_store=_copy_out, store_wait=_store_wait),
        "warpgroup_mma": _product, "warpgroup_mma_wait": _product_wait,
    }  # fmt: skip
    exec(compile(ast.fix_missing_locations(_Plain().visit(tree)), file, "exec"), names)
    return names


def _most_of_vote(assembly: str) -> float:
    """The number that a warp's vote compares with, of which the assembly has the bits."""
    (bits,) = re.findall(r"setp\.gt\.s32 p, x, 0x([0-9A-F]{8});", assembly)
    most: float = struct.unpack(">f", bytes.fromhex(bits))[0]
    return most


@lru_cache(maxsize=8)
def device_code(module: str = "device", **constants: int) -> SimpleNamespace:
    """The functions of device.py or fp8_device.py, to be called with pointers and descriptors of this file.

    constants: of the module, to be others here.
    """
    file = Path(host.__file__).with_name(f"{module}.py")
    tree = ast.parse(file.read_text())
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsekit"):
            names |= _imported(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in constants:
            node.value = ast.Constant(constants.pop(node.targets[0].id))
    assert not constants, f"{module} has no {', '.join(constants)}"
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    _executed(tree, str(file), names)
    names["_rescale"] = lambda acc, alpha, layout: acc * alpha[:, None]
    names["_declare"] = lambda x: None
    if module == "fp8_device":
        most = _most_of_vote(names["VOTE"])
        names["_outgrown"] = lambda sums, x: int(not (sums <= most).all())
    return SimpleNamespace(**names)


# ---- a call
MARKED: list[int] = []  # how many items each launch with fixed maxima left to a second one


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


def _layout_of(rows: int, dim: int, dtype: torch.dtype) -> tuple[type, list[int], None]:
    return _Descriptor, [1, 1, rows, dim], None


@contextmanager
def hosted(host_side: Any, code: SimpleNamespace) -> Iterator[None]:
    """Within it host.py or fp8.py prepares launches of this file's device code."""
    loaded = {name: SimpleNamespace(value=x) if isinstance(x, int) else x for name, x in vars(code).items()}
    loaded["attention"] = SimpleNamespace(warmup=lambda *args, **options: None)
    with ExitStack() as patches, torch.no_grad():
        for module in (host_side, descriptors):
            patches.enter_context(patch.object(module, "layout", _layout_of))
        patches.enter_context(patch.object(host_side, "_device_code", lambda: SimpleNamespace(**loaded)))
        patches.enter_context(patch.object(host_side, "_FORMS", {}))
        patches.enter_context(patch("sparsekit.kernels.launch.launch", _launch))
        yield


def results(q: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) as a launch gets them; NaN where it is to write."""
    out, lse = output(q, None, padded), q.new_full(q.shape[:3], float("-inf") if padded else NAN)
    return out if padded else out.fill_(NAN), lse


def launched(
    code: SimpleNamespace, work: Any, arguments: list[Any], workspace: Sequence[Tensor | None], out: Tensor,
    lse: Tensor | None, sinks: Tensor | None, blocks: int, seed: int, place: int, fixed: bool,
) -> None:  # fmt: skip
    """A launch of `attention`, or two where rows keep their first step's maximum, and of `merge` where rows are split.

    workspace: among `arguments`. place: of the mode in them, which the marks precede.
    """
    pieces = [None if x is None else x.new_full(x.shape, NAN, dtype=out.dtype) for x in workspace]
    for x, piece in zip(workspace, pieces, strict=True):
        arguments = [piece if x is not None and given is x else given for given in arguments]
    counters = host._counters(out.device, 0).zero_()  # a run that failed leaves them anyhow
    blocks, marks = min(blocks, work.blocks), arguments[place - 1].zero_()
    for mode in (items.FIXED, items.AGAIN) if fixed else (items.RUNNING,):
        arguments[place] = mode
        if mode == items.AGAIN:  # whoever stores an item that is not marked finds no such row
            again = work.items.clone()
            again[marks[1 : 1 + len(again)] == 0, items.ROW] = NO_ROW
            arguments = [again if given is work.items else given for given in arguments]
        _HERE.schedule, _HERE.blocks = _Schedule(seed), blocks
        for block in range(blocks):
            _HERE.block = block
            code.attention(*map(_given, arguments))
        _HERE.schedule.run()
        assert not counters.any(), "counters are not put back"
        if mode == items.FIXED:
            MARKED.append(int(marks[1:].sum()))
            assert bool(marks[0]) == bool(MARKED[-1])
    assert not marks.any(), "marks are not put back"
    if work.slots:
        _, heads, q_len, dim = out.shape
        _programs(
            device_code().merge, (work.slots, 4), *map(_given, (work.merges, *pieces, out, lse, sinks)), heads, q_len,
            *out.stride()[:3], D=dim, BM=32, LSE=lse is not None, SINKS=sinks is not None,
        )  # fmt: skip


def nan_in_one_row(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], row: tuple[int, int, int]) -> None:
    """(out, lse): NaN in all of `row` (sample, head, query), and as expected in all others."""
    others = torch.ones(got[1].shape, dtype=torch.bool)
    others[row] = False
    for x, y in zip(got, expected, strict=True):
        assert bool(x[~others].isnan().all())
        assert float((x - y)[others].abs().max()) < 1e-9


def attend_in_python(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, dense: Tensor | None = None, *, blocks: int = 3,
    seed: int = 0, fixed: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of `host.attend_hopper`, or out of `host.attend_corrected` with `dense`. All in float64, on the CPU.

    blocks: of a launch, at most. seed: who runs when. fixed: rows keep the maximum of their first step.
    """
    code = device_code()
    with hosted(host, code):
        pack = host._packed_heads(q, keys, plan, softmax)
        own = host._pack(q, pack) if pack > 1 else q
        lse_too, sinks = dense is None, softmax.sink_logits
        launches = host._prepare(own, keys, plan, softmax, lse_too, 0, pack, dense)
        out, lse = results(own, launches.padded)
        own_lse = lse if lse_too else None
        pool = host._pool(keys, plan) if launches.columns else (None, None)
        for launch in launches.launches:
            arguments, workspace = launch.fill(own, keys, out, own_lse, pool, sinks, dense)
            launched(
                code, launch.work, arguments, workspace, out, own_lse, sinks, blocks, seed, host.MODE_ARGUMENT, fixed
            )  # fmt: skip
        if pack > 1:
            out, lse = host._unpack(out, pack), host._unpack(lse[..., None], pack)[..., 0]
        return out, lse


def listed_in_python(plan: BlockPlan, grid: Any, step: int) -> tuple[Tensor, Tensor]:
    """`worklist._listed` by device code."""
    with patch.object(worklist, "_device_code", device_code), patch("sparsekit.kernels.launch.launch", _launch):
        return worklist._listed_on_gpu(plan, grid, step)

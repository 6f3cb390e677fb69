"""What is kept between calls and holds tensors: one home, bounded in bytes, which `clear_caches` empties.

A forward's layers share what follows from lengths alone (plans, grids, masks), so it is made once; batches of ever new
lengths would pile it up. What was used longest ago goes first.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from functools import partial, wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["BUDGET", "Memo", "cached_bytes", "clear_caches", "per_geometry"]

# Bytes of all kept values together, host and devices: one CPU plan of Triangle for 4 samples of 32K tokens, whose masks
# take 67 MB, and as much again; on a GPU a plan's grids and work lists take 2 MB at 32 heads and 128K tokens.
BUDGET = 1 << 27
ENTRY_BYTES = 4096  # of a value's objects, so that values without tensors are bounded too

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Kept:
    """A function's result: the dictionary that holds it, under which arguments."""

    __slots__ = ("arguments", "home", "nbytes", "value")

    def __init__(self, value: Any, home: dict[Hashable, _Kept], arguments: Hashable) -> None:
        self.value, self.home, self.arguments = value, home, arguments
        self.nbytes = ENTRY_BYTES + _nbytes(value, set())

    def drop(self) -> None:
        self.home.pop(self.arguments, None)


class Memo(dict[Any, Any]):
    """What was derived from one object, and is kept as long as that.

    `memo[key] = value` is for values without tensors of their own. Those with some go through `keep`, which counts
    their bytes: they may be gone again where the budget is needed.
    """

    __slots__ = ("__weakref__", "counted", "nbytes")

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Hashable] = []
        self.nbytes = 0

    def keep(self, key: Hashable, value: _T) -> _T:
        """The value, held under `key` if it fits the budget."""
        size = _nbytes(value, set())
        if self.nbytes + size <= BUDGET:
            self[key] = value
            self.counted.append(key)
            self.nbytes += size
            _LEDGER.admit(self, size)
        return value

    def touch(self) -> None:
        """This memo is in use: others go first."""
        if self.nbytes:
            _LEDGER.touch(self)

    def drop(self) -> None:
        while self.counted:
            self.pop(self.counted.pop(), None)
        self.nbytes = 0


class _Ledger:
    """Who holds how many bytes, the longest unused first. Memos are not kept alive by it."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.held: OrderedDict[int, tuple[Callable[[], _Kept | Memo | None], int]] = OrderedDict()
        self.gone: deque[int] = deque()  # memos that died: garbage collection may come in the middle of anything
        self.nbytes = 0

    def admit(self, owner: _Kept | Memo, size: int) -> None:
        with self.lock:
            self.sweep()
            name = id(owner)
            before = self.held.pop(name, None)
            if before is not None:
                reference, size = before[0], before[1] + size
                self.nbytes -= before[1]
            elif isinstance(owner, Memo):
                reference = weakref.ref(owner, partial(self.died, name))
            else:
                reference = _always(owner)
            self.held[name] = reference, size
            self.nbytes += size
            while self.nbytes > BUDGET and len(self.held) > 1:
                self.drop_first()

    def died(self, name: int, _: object) -> None:
        self.gone.append(name)

    def touch(self, owner: _Kept | Memo) -> None:
        with self.lock:
            if id(owner) in self.held:
                self.held.move_to_end(id(owner))

    def sweep(self) -> None:
        while self.gone:
            self.nbytes -= self.held.pop(self.gone.popleft(), (None, 0))[1]

    def drop_first(self) -> None:
        _, (reference, size) = self.held.popitem(last=False)
        self.nbytes -= size
        owner = reference()
        if owner is not None:
            owner.drop()


_LEDGER = _Ledger()


def per_geometry(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Keep a function's results by its (positional, hashable) arguments, within the budget of all caches together.

    Results under FakeTensorMode or in a torch.func transform are not kept: they mean nothing outside.
    """
    found: dict[Hashable, _Kept] = {}

    @wraps(function)
    def cached(*arguments: _P.args, **named: _P.kwargs) -> _T:
        assert not named, f"{function.__name__}: positional arguments only"
        kept = found.get(arguments)
        if kept is not None:
            _LEDGER.touch(kept)
            return kept.value
        kept = _Kept(function(*arguments, **named), found, arguments)
        if kept.nbytes <= BUDGET:
            found[arguments] = kept
            _LEDGER.admit(kept, kept.nbytes)
        return kept.value

    return cached


def cached_bytes() -> int:
    """Bytes that kept values take now, on the host and on devices."""
    with _LEDGER.lock:
        _LEDGER.sweep()
        return _LEDGER.nbytes


def clear_caches() -> None:
    """Forget all plans, grids and masks that are kept between calls. What is in use stays with those who use it."""
    with _LEDGER.lock:
        _LEDGER.sweep()
        while _LEDGER.held:
            _LEDGER.drop_first()


def _always(owner: _Kept) -> Callable[[], _Kept]:
    return lambda: owner


def _nbytes(value: Any, seen: set[int]) -> int:
    """Bytes of the memory behind the tensors in a value, each counted once; more than fits if one is not to be kept.

    A tensor of another class, or one that torch.func wraps, belongs to the mode or transform that made it.
    """
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return BUDGET + 1
        storage = value.untyped_storage()
        if storage._cdata in seen:
            return 0
        seen.add(storage._cdata)
        return storage.nbytes()
    if isinstance(value, (tuple, list)):
        parts: Iterable[Any] = value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(getattr(value, "tensors", None), dict):  # a plan says itself what it holds
        parts = value.tensors.values()
    elif hasattr(value, "__dataclass_fields__"):
        parts = vars(value).values()
    else:
        return 0
    return sum([_nbytes(part, seen) for part in parts if not isinstance(part, _LIGHT)])


_PLAIN = (Tensor, torch.nn.Parameter)
_LIGHT = (int, float, str, type(None))

"""What is remembered: layers, models, and the call in progress of each config."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekit.call.geometry import Geometry
from sparsekit.config import LayerPatterns
from sparsekit.kernels import Choice
from sparsekit.plan import BlockPlan, PlanTotals

if TYPE_CHECKING:
    from sparsekit.patch.handle import Handle

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(slots=True)
class Layer:
    """One attention module of a patched model. Slots, because every layer of every token reads it."""

    handle: Handle
    module: weakref.ref[nn.Module]
    patterns: LayerPatterns
    own: str | None  # why the layer keeps its own attention, or None
    window: bool  # a sliding layer of the model, which a rule runs here
    attend: Attention  # the model's own function
    min_queries: int  # of the handle's config
    ran: str = "not run"
    why: str = ""
    plan: BlockPlan | PlanTotals | None = None
    choice: Choice | None = None
    times: tuple[Any, ...] = ()  # begun, planned, done: seconds, or events of a GPU


# Of each sample: the index of its first valid key, and that after its last.
Bounds = tuple[list[int], list[int]]


class DenseCall(NamedTuple):
    """What the layers of a call that runs dense need; on the descriptor of a config that one model alone has."""

    state: object  # the handle's then
    rows: int  # queries
    mask: Tensor | None  # the model's own
    why: str


@dataclass
class Call:
    """One forward of a model, as its mask function saw it."""

    kwargs: dict[str, Any]  # of the mask function, without the config, which must not be kept alive
    config: weakref.ref[Any]
    original: str
    bounds: Bounds | None  # None: not a plain causal prompt chunk, nor a plain window
    why: str = ""
    tokens: int = 0  # of the longest sample so far, those that a sliding cache has dropped included
    # What every layer asks, answered once: why it is dense, by a handle's state; masks, by device and rows.
    dense_because: dict[object, str] = field(default_factory=dict)
    masks: dict[tuple[torch.device, int], Tensor | None] = field(default_factory=dict)
    whole_masks: dict[tuple[torch.device, bool], Tensor | None] = field(default_factory=dict)

    @property
    def window(self) -> bool:
        """Whether it is the mask of sliding layers."""
        return self.kwargs.get("local_size") is not None

    @cached_property
    def geometry(self) -> Geometry | None:
        """None without bounds. Made when a layer asks: a prompt that runs dense needs none."""
        if self.bounds is None:
            return None
        dropped = int(self.kwargs.get("kv_offset", 0))
        starts, ends = ([max(key - dropped, 0) for key in bounds] for bounds in self.bounds)
        return Geometry.of(
            int(self.kwargs["q_length"]),
            int(self.kwargs["kv_length"]),
            batch=self.kwargs["batch_size"],
            q_offset=self.kwargs["q_offset"] - dropped,
            kv_start=starts,
            kv_end=ends,
        )

    def original_mask(self, device: torch.device, rows: int) -> Tensor | None:
        """The mask that the model's own implementation would have got; built once, and only where it is asked for.

        Its last `rows` rows: some models run their last layers for the last queries alone. No mask then means all keys,
        which is right for one query and not for several.
        """
        asked = (device, rows)
        if asked not in self.masks:
            mask = self._whole_mask(device, rows in (1, self.kwargs["q_length"]))
            self.masks[asked] = mask[:, :, -rows:] if isinstance(mask, Tensor) and mask.ndim == 4 else mask
        return self.masks[asked]

    def _whole_mask(self, device: torch.device, may_skip: bool) -> Tensor | None:
        if (device, may_skip) not in self.whole_masks:
            kwargs = {**self.kwargs, "config": self.config(), "device": device}
            kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and may_skip
            self.whole_masks[device, may_skip] = mask_functions()[self.original](**kwargs)
        return self.whole_masks[device, may_skip]


class _Calls(threading.local):
    """Of this thread's forward."""

    def __init__(self) -> None:
        self.by_width: dict[int, Call] = {}


@dataclass
class Door:
    """A config object that is switched to sparsekit. Several models may share one."""

    config: weakref.ref[Any]
    original: str
    composed: bool  # of a model with other parts, whose masks may hold blocks of pictures
    handles: list[Handle] = field(default_factory=list)
    _of_thread: _Calls = field(default_factory=_Calls)

    @property
    def calls(self) -> dict[int, Call]:
        """Of this thread's forward, by the width of their descriptors."""
        return self._of_thread.by_width


# By id: configs cannot be hashed, and a graph that torch.compile keeps for one module is not run for another where it
# looked up an id, but is where it looked into a weak dictionary. An object that goes takes its entry along.
LAYERS: dict[int, Layer] = {}
DOORS: dict[int, Door] = {}
HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
NAMES: dict[str, str] = {}  # original implementation -> our name for it


def forgetter(key: int) -> Callable[[Any], None]:
    """What a layer's weak reference calls when its module goes."""

    def forget(_: object) -> None:
        LAYERS.pop(key, None)

    return forget


def masking() -> Any:
    """transformers.masking_utils. Its import takes seconds, and an import statement microseconds of every token."""
    return sys.modules["transformers.masking_utils"]


def mask_functions() -> Any:
    return masking().ALL_MASK_ATTENTION_FUNCTIONS

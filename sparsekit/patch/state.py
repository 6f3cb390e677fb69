"""What is remembered: what is applied to which layers, and the call in progress of each config."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekit.call.geometry import Geometry
from sparsekit.config import LayerPatterns, ResolvedConfig, SparseConfig
from sparsekit.kernels import Choice
from sparsekit.patterns.shared import SharedPlans
from sparsekit.plan import BlockPlan, PlanTotals

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Prompt(threading.local):
    """What `Handle.prompt` was told; and of each thread, what its chunks of the prompt were.

    Attributes:
        tokens: columns of the prompt, one number or one for each sample.
        chunk: queries of this thread's last chunk; 0 before the first.
        over: columns by which that chunk ran past the prompt's end.
    """

    def __init__(self, tokens: int | tuple[int, ...]) -> None:
        self.tokens = tokens
        self.chunk = self.over = 0

    def columns(self, batch: int) -> Sequence[int]:
        return (self.tokens,) * batch if isinstance(self.tokens, int) else self.tokens

    @property
    def end(self) -> int:
        """Columns of the longest prompt."""
        return self.tokens if isinstance(self.tokens, int) else max(self.tokens)


@dataclass(eq=False)
class Applied:
    """sparsekit on one model's attention layers: what `apply` made, and `Handle` shows.

    Attributes:
        given: the config as it was given; `resolved` has numbers for its `auto`.
        windows: whether sliding layers run here.
        paused: depth of `Handle.pause` blocks.
        epoch: another object whenever `paused` or `prompt` changes; by it a Call remembers what they made of it.
        guarded: models whose switch of implementations is guarded.
        ended: why it is no longer active, or "".
    """

    given: SparseConfig
    resolved: ResolvedConfig
    text_config: weakref.ref[Any]
    windows: bool
    guarded: list[weakref.ref[nn.Module]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    paused: int = 0
    prompt: Prompt | None = None
    epoch: object = field(default_factory=object)
    ended: str = ""


@dataclass(slots=True)
class Layer:
    """One attention module of a patched model. Slots, because every layer of every token reads it."""

    applied: Applied
    module: weakref.ref[nn.Module]
    hooks: object  # its dictionary of hooks, which shallow copies share
    patterns: LayerPatterns
    own: str | None  # why the layer keeps its own attention, or None
    window: bool  # a sliding layer of the model, which a rule runs here
    attend: Attention  # the model's own function
    min_queries: int  # of the config
    given_back: str = ""  # why the contract runs it dense
    ran: str = "not run"
    why: str = ""
    plan: BlockPlan | PlanTotals | None = None
    choice: Choice | None = None
    times: tuple[Any, ...] = ()  # begun, planned, done: seconds, or events of a GPU


# Of each sample: the index of its first valid key, and that after its last.
Bounds = tuple[list[int], list[int]]


class Verdict(NamedTuple):
    """Whether a layer of a call runs sparse, and why not.

    Attributes:
        ran: sparse, dense, own (a layer that keeps its own attention), or "" for decoding, of which no record is kept.
        why: of all that run the model's own attention; "" where sparsekit's kernel runs.
    """

    ran: str
    why: str


class Settled(NamedTuple):
    """The verdict of a call that runs dense in every layer; on the descriptor of a config that one model alone has."""

    epoch: object  # of what was applied then
    rows: int  # queries
    mask: Tensor | None  # the model's own
    verdict: Verdict


@dataclass
class Call:
    """One forward of a model, as its mask function saw it."""

    kwargs: dict[str, Any]  # of the mask function, without the config, which must not be kept alive
    config: weakref.ref[Any]
    original: str
    window: bool  # whether it is the mask of sliding layers
    bounds: Bounds | None  # None: not a plain causal prompt chunk, nor a plain window
    why: str = ""
    tokens: int = 0  # of the longest sample so far, those that a sliding cache has dropped included
    # What every layer asks, answered once: the verdict, by epoch; masks, by device and rows.
    verdicts: dict[object, Verdict | None] = field(default_factory=dict)
    masks: dict[tuple[torch.device, int], Tensor | None] = field(default_factory=dict)
    whole_masks: dict[tuple[torch.device, bool], Tensor | None] = field(default_factory=dict)
    plans: SharedPlans = field(default_factory=SharedPlans)  # by what is applied, and the layer that made it

    @property
    def dropped(self) -> int:
        """First columns that a sliding cache no longer holds."""
        return int(self.kwargs.get("kv_offset", 0))

    @cached_property
    def geometry(self) -> Geometry | None:
        """None without bounds. Made when a layer asks: a prompt that runs dense needs none."""
        if self.bounds is None:
            return None
        starts, ends = ([max(key - self.dropped, 0) for key in bounds] for bounds in self.bounds)
        return Geometry.of(
            int(self.kwargs["q_length"]),
            int(self.kwargs["kv_length"]),
            batch=self.kwargs["batch_size"],
            q_offset=self.kwargs["q_offset"] - self.dropped,
            kv_start=starts,
            kv_end=ends,
        )

    def geometry_in(self, prompt: Prompt | None) -> Geometry | None:
        """The geometry as a part of the prompt that was told."""
        if prompt is None or self.geometry is None:
            return self.geometry
        return self.geometry.with_prompt([max(n - self.dropped, 1) for n in prompt.columns(self.geometry.batch)])

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

    def forget(self, _: object) -> None:
        """What holds tensors: the forward is over."""
        self.masks.clear()
        self.whole_masks.clear()
        self.plans.clear()

    def _whole_mask(self, device: torch.device, may_skip: bool) -> Tensor | None:
        if (device, may_skip) not in self.whole_masks:
            kwargs = {**self.kwargs, "config": self.config(), "device": device}
            kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and may_skip
            self.whole_masks[device, may_skip] = mask_functions()[self.original](**kwargs)
        return self.whole_masks[device, may_skip]


class Forward(NamedTuple):
    """A forward that may still run: it does while its descriptor lives and its outermost module is on the stack."""

    descriptor: weakref.ref[Tensor]
    thread: int
    frame: int  # id

    def runs(self) -> bool:
        frame = sys._current_frames().get(self.thread)
        while self.descriptor() is not None and frame is not None:
            if id(frame) == self.frame:
                return True
            frame = frame.f_back
        return False


class _Calls(threading.local):
    """Of this thread's forward."""

    def __init__(self) -> None:
        self.by_width: dict[int, Call] = {}


CALL = nn.Module._call_impl.__code__


@dataclass
class Door:
    """A config object that is switched to sparsekit. Several models may share one."""

    config: weakref.ref[Any]
    original: str
    composed: bool  # of a model with other parts, whose masks may hold blocks of pictures
    applied: list[Applied] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    _of_thread: _Calls = field(default_factory=_Calls)

    @property
    def calls(self) -> dict[int, Call]:
        """Of this thread's forward, by the width of their descriptors."""
        return self._of_thread.by_width

    def in_progress(self, width: int) -> int:
        """Forwards of this thread whose descriptors have that width and are still held."""
        held = [forward.descriptor() for forward in self.forwards if forward.thread == threading.get_ident()]
        return sum(descriptor is not None and descriptor.shape[-1] == width for descriptor in held)

    def begin(self, descriptor: Tensor, call: Call) -> None:
        """Remember the forward that this descriptor is made for: `apply` and `remove` must not come between layers.

        Its masks and shared plans go with the descriptor: a mask takes a byte for each pair of tokens.
        """
        frame: FrameType | None = sys._getframe(1)
        outermost = 0
        while frame is not None:
            if frame.f_code is CALL or frame.f_code.co_name == "generate":
                outermost = id(frame)
            frame = frame.f_back
        alive = [forward for forward in self.forwards if forward.descriptor() is not None]
        self.forwards = [*alive, Forward(weakref.ref(descriptor, call.forget), threading.get_ident(), outermost)]


# By id: configs cannot be hashed, and a graph that torch.compile keeps for one module is not run for another where it
# looked up an id, but is where it looked into a weak dictionary. An object that goes takes its entry along.
LAYERS: dict[int, Layer] = {}
DOORS: dict[int, Door] = {}
NAMES: dict[str, str] = {}  # original implementation -> our name for it
CHANGES = threading.RLock()  # held while something is put on or taken off


def forgetter(key: int) -> Callable[[Any], None]:
    """What a layer's weak reference calls when its module goes."""

    def forget(_: object) -> None:
        LAYERS.pop(key, None)

    return forget


def applied_to(model: nn.Module) -> list[Applied]:
    """What is applied to any of the model's layers: the modules count, not the object that holds them."""
    found = (LAYERS.get(id(module)) for module in model.modules())
    return list(dict.fromkeys(layer.applied for layer in found if layer is not None))


def layer_of_copy(module: nn.Module, door: Door) -> Layer | None:
    """The layer that `module` is a shallow copy of: nn.DataParallel's replicas share all dictionaries but a few."""
    hooks = module._forward_hooks
    return next((layer for applied in door.applied for layer in applied.layers if layer.hooks is hooks), None)


def masking() -> Any:
    """transformers.masking_utils. Its import takes seconds, and an import statement microseconds of every token."""
    return sys.modules["transformers.masking_utils"]


def mask_functions() -> Any:
    return masking().ALL_MASK_ATTENTION_FUNCTIONS
